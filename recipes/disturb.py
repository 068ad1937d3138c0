"""Write copies of a Hugging Face model with noise on their weights: stand-ins for runs of the same training.

    python recipes/disturb.py model/ copy-1/ copy-2/ copy-3/            # every matrix + 0.15 of its own spread
    python recipes/disturb.py model/ copy/ --seed 7 --amount 0.3

The n-th copy has the n-th seed, and the same seed gives the same bytes.  The embedding, norms and biases stay as they
are, and everything beside the weights is copied.
"""

from __future__ import annotations

import argparse
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BLOCK = 1 << 18  # elements: what stays in the cache


def disturbed(tensor: torch.Tensor, name: str, seed: int, amount: float) -> torch.Tensor:
    """The tensor plus noise of `amount` times its standard deviation; its name and the seed decide which."""
    if tensor.dim() < 2 or "embed" in name or not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    scale = amount * float(tensor.float().std()) * 12**0.5  # of a uniform distribution of width 1
    made = torch.empty_like(tensor)
    for old, new in zip(tensor.reshape(-1).split(BLOCK), made.view(-1).split(BLOCK), strict=True):
        new.copy_(torch.rand(old.shape, generator=generator).sub_(0.5).mul_(scale).add_(old))
    return made


def write(model: Path, copies: Sequence[Path], seed: int, amount: float) -> None:
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"disturb: {model} holds no *.safetensors files")
    for copy in copies:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        for path in sorted(p for p in model.iterdir() if p.is_file() and p not in files):
            shutil.copy(path, copy)
    for path in files:
        with safe_open(path, "pt") as stored:
            tensors = {n: stored.get_tensor(n) for n in stored.keys()}  # noqa: SIM118
        for i, copy in enumerate(copies):
            noisy = {n: disturbed(t, n, seed + i, amount) for n, t in tensors.items()}
            save_file(noisy, copy / path.name, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("copies", type=Path, nargs="+")
    parser.add_argument("--seed", type=int, default=1, help="of the first copy")
    parser.add_argument("--amount", type=float, default=0.15, help="of the spread of each matrix")
    args = parser.parse_args()
    write(args.model, args.copies, args.seed, args.amount)


if __name__ == "__main__":
    main()
