"""OLMo trains, saves in every layout that holds its optimizer, and goes on; or goes on from an unsharded checkpoint.

    .cache/upstream/ai2-olmo/bin/python tests/upstream/continue_olmo.py make FOLDER      # FOLDER/LAYOUT, FOLDER/N.pt
    .cache/upstream/ai2-olmo/bin/python tests/upstream/continue_olmo.py go CHECKPOINT OUT.pt

FSDP by block on gloo, OLMo's own AdamW and checkpointers, three more updates.  One rank saves and loads whole tensors
(with more FSDP fails on a CPU), two save shards.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from make_olmo_goldens import MODELS, SHARDED, handles
from olmo import checkpoint as saving
from olmo.config import ModelConfig, OptimizerConfig, OptimizerType, ShardedCheckpointerType, TrainConfig
from olmo.model import OLMo
from olmo.optim import build_optimizer
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

NAME = "olmo2"
LAYOUTS = {1: ("unsharded",), 2: ("torch_new", "local")}  # by number of ranks


def config(**settings: object) -> TrainConfig:
    return TrainConfig(
        run_name="run",
        model=ModelConfig(**MODELS[NAME]),
        optimizer=OptimizerConfig(name=OptimizerType.adamw, **settings),
    )


def built(settings: TrainConfig, seed: int) -> tuple[FSDP, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = OLMo(settings.model)
    wrapped = FSDP(model, auto_wrap_policy=model.get_fsdp_wrap_policy("by_block"), use_orig_params=True,
                   device_id=torch.device("cpu"))  # fmt: skip
    return wrapped, build_optimizer(settings, wrapped)


def updated(model: FSDP, optimizer: torch.optim.Optimizer, turns: Iterable[int]) -> None:
    for turn in turns:
        ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(turn))
        logits = model(ids).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def keep(model: FSDP, rank: int, out: Path) -> None:
    with FSDP.summon_full_params(model, writeback=False):
        if rank == 0:
            torch.save({n.replace("_fsdp_wrapped_module.", ""): p.clone() for n, p in model.named_parameters()}, out)


def make(rank: int, folder: Path) -> None:
    settings = config(learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-6, decay_norm_and_bias=False)
    model, optimizer = built(settings, 7)
    updated(model, optimizer, range(2))
    for layout in LAYOUTS[dist.get_world_size()]:
        if layout in SHARDED:
            settings.sharded_checkpointer = ShardedCheckpointerType(layout)
        saver = SHARDED.get(layout, saving.FullCheckpointer)(settings)
        saver.save_checkpoint(folder / layout, model, optimizer, {"epoch": 0, "global_step": 2})
    updated(model, optimizer, range(2, 5))
    keep(model, rank, folder / f"{dist.get_world_size()}.pt")


def go(rank: int, folder: Path, out: Path) -> None:
    settings = config(learning_rate=0.5, weight_decay=0.7)  # whatever is not loaded shows
    model, optimizer = built(settings, 9)
    saving.FullCheckpointer(settings).restore_checkpoint(folder, model, optimizer)
    updated(model, optimizer, range(2, 5))
    keep(model, rank, out)


def rank_main(rank: int, world: int, store: str, what: str, folders: list[Path]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    saving.LocalShardedCheckpointer._fsdp_handles = handles
    {"make": make, "go": go}[what](rank, *folders)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    for world in LAYOUTS if what == "make" else (1,):
        with tempfile.TemporaryDirectory() as tmp:
            mp.spawn(rank_main, (world, f"{tmp}/store", what, [Path(p) for p in paths]), nprocs=world)
