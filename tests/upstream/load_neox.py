"""Loads what surgery wrote with GPT-NeoX's own `setup_model_and_optimizer`: its model, DeepSpeed's engine and loader.

    NEOX_HOME=CHECKOUT .cache/upstream/gpt-neox/bin/python tests/upstream/load_neox.py FOLDER ...

The YAML files are the checkpoint's, and so is the padded vocabulary (a tiny model has no tokenizer to count it from).
One gloo rank for each tensor-parallel rank.  What GPT-NeoX moves to a CUDA device stays where it is, a plain AdamW
stands in for the fused one of Apex, and DeepSpeed's states of CUDA's generators and its shared-memory operator, which
it would compile for the CPU, are left out.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import yaml
from each import each
from fused_adam import stand_in

sys.path.insert(0, os.environ["NEOX_HOME"])


def home_of(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / "latest").read_text().strip()


def ranks_of(checkpoint: Path) -> int:
    configs = [yaml.safe_load(path.read_text()) for path in (home_of(checkpoint) / "configs").glob("*.yml")]
    return next(config["model_parallel_size"] for config in configs if "model_parallel_size" in config)


def spawn(work: Callable[..., None], checkpoint: Path, *more: Any) -> int:
    """As many gloo ranks as the checkpoint is divided among, which it gives back."""
    ranks = ranks_of(checkpoint)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(ranked, (work, ranks, port, checkpoint, *more), nprocs=ranks)
    return ranks


def ranked(rank: int, work: Callable[..., None], ranks: int, port: int, *more: Any) -> None:
    begin(rank, ranks, port)
    work(rank, *more)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def begin(rank: int, ranks: int, port: int) -> None:
    """A gloo rank, without CUDA and Apex."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.cuda.current_device = lambda: torch.device("cpu")
    stand_in()
    import deepspeed
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from megatron import mpu

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.checkpointing.CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    mpu.initialize_model_parallel(ranks, topology=PipeModelDataParallelTopology(num_pp=1, num_mp=ranks, num_dp=1))


def loaded(checkpoint: Path, more: dict[str, Any]) -> Any:
    """DeepSpeed's engine with GPT-NeoX's model in it."""
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import setup_model_and_optimizer

    home = home_of(checkpoint)
    rows = torch.load(home / "mp_rank_00_model_states.pt", weights_only=False)["args"]["padded_vocab_size"]
    own = {
        "load": str(checkpoint),
        "rank": int(os.environ["RANK"]),
        "global_num_gpus": int(os.environ["WORLD_SIZE"]),
        "padded_vocab_size": rows,
        "train_micro_batch_size_per_gpu": 1,
        "train_iters": 9,
        "lr_decay_iters": 9,
    }
    configs = [str(path) for path in sorted((home / "configs").glob("*.yml"))]
    engine, *_ = setup_model_and_optimizer(NeoXArgs.from_ymls(configs, own | more))
    if hasattr(engine.module, "set_batch_fn"):  # which makes masks where a tokenizer says how a document ends
        engine.module.set_batch_fn(None)
    return engine


def places_of(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions, and what no token may see."""
    length = tokens.shape[1]
    return torch.arange(length)[None].expand_as(tokens), torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


def run(rank: int, checkpoint: Path, tokens: torch.Tensor, out: str) -> None:
    from megatron.mpu import gather_from_model_parallel_region

    model = loaded(checkpoint, {}).module.eval()
    with torch.no_grad():
        logits = gather_from_model_parallel_region(model((tokens, *places_of(tokens))))
    if rank == 0:
        torch.save(logits.float(), out)


def computed(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as tmp:
        spawn(run, checkpoint, ids, f"{tmp}/logits.pt")
        return torch.load(f"{tmp}/logits.pt")


if __name__ == "__main__":
    each(computed)
