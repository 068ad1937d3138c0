"""Loads a universal checkpoint that surgery wrote with DeepSpeed's own engine, and takes three more updates.

    python tests/upstream/load_deepspeed.py CHECKPOINT STATES.pt       # with DeepSpeed (tried: 0.19.8) beside torch

The module has the checkpoint's parameters under their names, and a loss that is linear in them: bf16, ZeRO stage 1,
one process, nothing clipped, torch's AdamW, which counts in tensors where DeepSpeed's own counts in numbers.  STATES.pt
gets what the engine holds of each parameter after loading, and after the updates.  DeepSpeed's shared-memory operator,
which it would compile for the CPU, is left out: one process reduces nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": os.environ.get("MASTER_PORT", "29571")}  # fmt: skip

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
CONFIG = {
    "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
    "checkpoint": {"load_universal": True}, "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1e9,
}  # fmt: skip


class Named(torch.nn.Module):
    """Parameters under dotted names; the loss is their sum times fixed weights."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            owner = self
            *path, leaf = name.split(".")
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, torch.nn.Module())
                owner = owner._modules[step]
            owner.register_parameter(leaf, torch.nn.Parameter(torch.zeros_like(tensor)))

    def forward(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sum((p.float() * torch.randn(p.shape, generator=generator)).sum() for p in self.parameters())


def held(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {"master": safe_get_full_fp32_param(p).clone(), "weight": p.detach().clone(),
               **{k: safe_get_full_optimizer_state(p, k).clone() for k in ("exp_avg", "exp_avg_sq")}}
        for name, p in model.named_parameters()
    }  # fmt: skip


def main() -> None:
    folder, out = Path(sys.argv[1]), sys.argv[2]
    tag = (folder / "latest_universal").read_text()
    model = Named(torch.load(folder / tag / "mp_rank_00_model_states.pt", weights_only=False)["module"])
    spared = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": spared}], lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
    groups = [{k: g[k] for k in ("lr", "betas", "eps", "weight_decay")} for g in engine.optimizer.param_groups]
    loaded, counts = held(model), []
    for state in optimizer.state.values():
        counts.append(state["step"])
        state["step"] = torch.tensor(float(state["step"]))
    for seed in range(3):
        engine.backward(engine(seed))
        engine.step()
    torch.save({"loaded": loaded, "later": held(model), "groups": groups, "steps": counts}, out)


if __name__ == "__main__":
    main()
