"""GPT-NeoX goes on from a checkpoint and the optimizer's state in it: three updates, and what every rank holds then.

    NEOX_HOME=... .cache/upstream/gpt-neox/bin/python tests/upstream/continue_neox.py FOLDER OUT.pt universal apex

Its own loader reads what DeepSpeed wrote (`zero`), or a `universal` checkpoint.  The optimizer counts updates as the
fused one of `apex` does, in groups, or as that of `deepspeed`, in states.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from fused_adam import FusedAdam
from load_neox import loaded, places_of, spawn

SETTINGS: dict[str, Any] = {
    "finetune": False, "no_load_optim": False, "no_load_rng": True, "precision": "bfloat16", "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}, "gradient_clipping": 1.0,
    "optimizer": {"type": "Adam", "params": {"lr": 5e-4, "betas": [0.9, 0.95], "eps": 1e-8}}, "weight_decay": 0.1,
    "lr_decay_style": "constant", "warmup": 0.0, "override_lr_scheduler": True,
}  # fmt: skip


class InStates(FusedAdam):
    """Counts updates where DeepSpeed's FusedAdam does."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.optim.Optimizer.load_state_dict(self, state_dict)

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = next(self.state[p]["step"] for p in group["params"])
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = group["step"]


def updated(engine: Any, tokens: torch.Tensor) -> None:
    from megatron import mpu

    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    losses = mpu.vocab_parallel_cross_entropy(engine((inputs, *places_of(inputs))).float(), labels)
    engine.backward(losses.mean())
    engine.step()


def held(engine: Any, rank: int) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, torch.Tensor] = {}
    for name, p in engine.module.named_parameters():
        found[f"{rank}/{name}/weight"] = p.detach().clone()
        found[f"{rank}/{name}/master"] = safe_get_full_fp32_param(p).clone()
        for role in ("exp_avg", "exp_avg_sq"):
            found[f"{rank}/{name}/{role}"] = safe_get_full_optimizer_state(p, role).clone()
    return found


def go(rank: int, checkpoint: Path, out: str, how: str, counts: str) -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    kind = sys.modules["apex.optimizers"].FusedAdam = {"apex": FusedAdam, "deepspeed": InStates}[counts]  # type: ignore
    ZERO_SUPPORTED_OPTIMIZERS.append(kind)
    engine = loaded(checkpoint, SETTINGS | ({"checkpoint": {"load_universal": True}} if how == "universal" else {}))
    engine.module.train()
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        updated(engine, torch.randint(0, 500, (1, 25), generator=generator))
    torch.save(held(engine, rank), f"{out}/{rank}.pt")


def main(folder: str, out: str, how: str, counts: str) -> None:
    found: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for rank in range(spawn(go, Path(folder), tmp, how, counts)):
            found |= torch.load(f"{tmp}/{rank}.pt", weights_only=True)
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
