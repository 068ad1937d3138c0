"""Trains with Megatron-core's own optimizers, saves as Megatron does, and goes on from what was saved or converted.

    python load_megatron_optimizer.py begin START KIND RUN STATE.pt     # two updates from weights, saved as RUN
    python load_megatron_optimizer.py go-on RUN KIND STATE.pt           # loads RUN
    python load_megatron_optimizer.py again RUN flat SAVED.pt RANKS     # loads RUN's distrib_optim.pt and saves it

KIND: `plain` (legacy files, no distributed optimizer, torch's AdamW), `fused` (the same with a FusedAdam, as all that
follow), `flat` (legacy files and distrib_optim.pt), `dist` (torch_dist, fully_reshardable).  STATE gets weights,
masters and moments at the start, and after three more updates.  bf16; a gloo process for each of two data-parallel
ranks, one of `plain` and `fused`; a rate that falls as a cosine, by the run's own arguments, as
`--override-opt_param-scheduler` has it.  Done for it here: what asks for CUDA gets the CPU; tensors call themselves
CUDA's, as Megatron insists; Apex's FusedAdam is one of our own, for Megatron's distributed optimizer loads no state of
torch's AdamW, not even one that it saved.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fused_adam import stand_in
from torch.overrides import TorchFunctionMode

if sys.argv[3] != "plain":
    stand_in()  # Megatron asks for Apex when it is imported
from load_megatron import build
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

RANKS = {"plain": 1, "fused": 1, "flat": 2, "dist": 2}
METADATA = {"singleton_local_shards": False, "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True}  # fmt: skip
RATE = 1e-3
torch.cuda.synchronize = lambda: None
FILE = "mp_rank_00/model_optim_rng.pt"


class OnCpu(TorchFunctionMode):
    """What asks for CUDA gets the CPU, and a tensor's type is CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        found = func(*args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and isinstance(found, str) else found


class Run:
    """A model in bf16 under Megatron's data parallelism, and its optimizer."""

    def __init__(self, args: Namespace, kind: str) -> None:
        self.args, self.kind = args, kind
        inner = build(args, 1).train()
        inner.config.bf16 = True
        self.config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=kind in ("flat", "dist")
        )
        self.inner = inner
        self.wrap()

    def wrap(self) -> None:
        self.model = DistributedDataParallel(
            self.inner.config, self.config, Float16Module(self.inner.config, self.inner)
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=RATE, min_lr=1e-4, weight_decay=0.1, adam_beta2=0.95, bf16=True, clip_grad=1.0,
                use_distributed_optimizer=self.kind in ("flat", "dist"),
            ),
            [self.model],
        )  # fmt: skip
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, 0.0, RATE, 1e-4, 4, 40, "cosine", 0.1, 0.1, 1, "constant", False, True
        )

    def update(self, step: int) -> None:
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        tokens = torch.randint(0, self.args.padded_vocab_size, (2, 17), generator=generator)
        places, future = torch.arange(16)[None].expand(2, 16), torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.model(tokens[:, :-1], places, future, labels=tokens[:, 1:]).mean().backward()
        self.model.finish_grad_sync()
        done, _, _ = self.optimizer.step()
        assert done
        self.scheduler.step(2 * RANKS[self.kind])

    def held(self) -> dict[str, dict[str, torch.Tensor]]:
        """Weights, masters and moments of the parameters, as this rank holds them."""
        found = {}
        for name, weight in self.inner.named_parameters():
            if (main := weight.main_param) is None:  # another rank's
                continue
            state = self.optimizer.chained_optimizers[-1 if ".experts." in name else 0].optimizer.state[main]
            found[name] = {"weight": weight.detach().clone(), "master": main.detach().clone(),
                           **{k: v.clone() for k, v in state.items()}}  # fmt: skip
        return found

    # ------------------------------------------------------------------------------------------------ files

    def sharded(self, loading: bool) -> dict[str, Any]:
        model = self.inner.sharded_state_dict(metadata=METADATA)
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, loading, metadata=METADATA)}

    def save(self, run: Path, step: int) -> None:
        folder = run / f"iter_{step:07d}"
        (folder / FILE if self.kind != "dist" else folder / "x").parent.mkdir(parents=True, exist_ok=True)
        self.args.consumed_train_samples = self.scheduler.num_steps
        common = {"args": self.args, "checkpoint_version": 3.0, "iteration": step,
                  "opt_param_scheduler": self.scheduler.state_dict()}  # fmt: skip
        if self.kind == "dist":
            dist_checkpointing.save(common | self.sharded(False), str(folder), content_metadata=METADATA)
        else:
            state = {**common, "model": self.inner.state_dict_for_save_checkpoint(),
                     "optimizer": self.optimizer.state_dict()}  # fmt: skip
            if dist.get_rank() == 0:
                torch.save(state, folder / FILE)
            if self.kind == "flat":
                self.optimizer.save_parameter_state(str((folder / FILE).with_name("distrib_optim.pt")))
        if dist.get_rank() == 0:
            (run / "latest_checkpointed_iteration.txt").write_text(str(step))

    def load(self, folder: Path) -> None:
        if self.kind == "dist":
            found = dist_checkpointing.load(self.sharded(True), str(folder), strict="assume_ok_unexpected")
        else:
            found = torch.load(folder / FILE, weights_only=False)
        self.inner.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        if self.kind == "flat":
            self.optimizer.load_parameter_state(str((folder / FILE).with_name("distrib_optim.pt")))
        self.scheduler.load_state_dict(found["opt_param_scheduler"])


def newest(run: Path) -> Path:
    said = (run / "latest_checkpointed_iteration.txt").read_text().strip()
    return run / (said if said == "release" else f"iter_{int(said):07d}")


def args_of(folder: Path) -> Namespace:
    file = folder / "common.pt" if (folder / "common.pt").is_file() else folder / FILE
    return torch.load(file, weights_only=False)["args"]


def work(rank: int, ranks: int, store: str, what: str, source: Path, kind: str, *outs: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(1)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    with OnCpu():
        folder = newest(source)
        run = Run(args_of(folder), kind)
        if what == "begin":
            run.inner.load_state_dict(torch.load(folder / FILE, weights_only=False)["model"])
            run.optimizer.reload_model_params()
            for step in range(2):
                run.update(step)
            run.save(Path(outs[0]), 2)
        else:
            run.load(folder)
        if what == "again":
            run.optimizer.save_parameter_state(outs[0])
        else:
            start = run.held()
            for step in range(2, 5):
                run.update(step)
            torch.save({"start": start, "later": run.held()}, f"{outs[-1]}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def main(what: str, source: str, kind: str, *outs: str) -> None:
    ranks = int(outs[1]) if what == "again" else RANKS[kind]
    with tempfile.TemporaryDirectory() as tmp:
        mp.spawn(work, (ranks, f"{tmp}/store", what, Path(source), kind, *outs), nprocs=ranks)


if __name__ == "__main__":
    main(*sys.argv[1:])
