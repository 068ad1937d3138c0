"""Loads what surgery wrote with llama-models: its `ModelArgs`, `Transformer` and `maybe_reshard_state_dict`.

    .cache/upstream/llama-models/bin/python tests/upstream/load_meta.py FOLDER ...

`Llama3.build` itself insists on the real tokenizer's 128256 tokens, so its steps are done here one by one, by as
many gloo ranks as there are files.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from each import each
from fairscale.nn.model_parallel.initialize import initialize_model_parallel
from llama_models.checkpoint import maybe_reshard_state_dict
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer


def rank_main(rank: int, world: int, store: str, folder: Path, tokens: torch.Tensor, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    initialize_model_parallel(world)
    params = json.loads((folder / "params.json").read_text())
    args = ModelArgs(max_seq_len=64, max_batch_size=len(tokens), **params)
    state = maybe_reshard_state_dict(sorted(folder.glob("*.pth")), args.n_kv_heads or args.n_heads)
    torch.set_default_dtype(torch.float32)  # the line above changes it
    model = Transformer(args).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        logits = model(tokens, 0).float()
    if rank == 0:
        torch.save(logits, out)
    dist.barrier()
    dist.destroy_process_group()


def load(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    world = len(list(checkpoint.glob("*.pth")))
    with tempfile.TemporaryDirectory() as tmp:
        mp.spawn(rank_main, (world, f"{tmp}/store", checkpoint, ids, f"{tmp}/logits.pt"), nprocs=world)
        return torch.load(f"{tmp}/logits.pt")


if __name__ == "__main__":
    each(load)
