"""Arcee Fusion: take the changes that matter most, by size and by how they move a row's distribution.

    arcee_fusion(inputs, {}).apply(block)

Formulas: mergekit 0.1.5, `merge_methods/arcee_fusion.py`.  mergekit estimates the quartiles of large tensors from a
random million of elements; here they are exact, so that the result is the same every time.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from surgery.merging.engine.inputs import Block, Inputs
from surgery.merging.engine.ready import Options, Ready

if TYPE_CHECKING:
    import torch

BINS = 1 << 16
ROWS = 1 << 14  # elements, in whole rows, whose importance is computed at a time


def arcee_fusion(inputs: Inputs, options: Options) -> Ready:
    """The base plus those changes whose importance is at least median + 1.5 (q3 - q1)."""
    import torch

    quartiles = torch.tensor([0.25, 0.5, 0.75])
    ranks = (quartiles * (inputs.numel - 1)).long().tolist()
    q1, median, q3 = (value for value in _ordered(inputs, ranks))
    threshold = median + 1.5 * (q3 - q1)

    def apply(block: Block) -> torch.Tensor:
        base, other = block.tensors
        return base + (other - base) * (_importance(base, other) >= threshold).float()

    return Ready(apply, span=1)


def _importance(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """|change| times the Kullback-Leibler divergence of the softmax of its row."""
    import torch
    import torch.nn.functional as F

    p, q = F.softmax(other, dim=-1) + 1e-8, F.softmax(base, dim=-1) + 1e-8
    return (other - base).abs() * torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)


def _ordered(inputs: Inputs, ranks: list[int]) -> list[torch.Tensor]:
    """The values of these ranks among all importances, which may be slightly negative."""
    import torch

    if inputs.single:
        values = torch.cat(inputs.scan(lambda block: _importance(*block.tensors).reshape(-1), 1, inputs.piece))
        found = (values.float() if values.itemsize == 2 else values).numpy()
        found.partition(ranks)
        return list(torch.from_numpy(found[ranks]).to(values.dtype))
    low, left, width = [0] * len(ranks), list(ranks), 1 << 16
    for _ in range(2):
        tables = _counted(inputs, low, width)
        for i, start in enumerate(low):
            total = tables[start].cumsum(0)
            bin_ = int(torch.searchsorted(total, torch.tensor([left[i]]), right=True)[0])
            left[i] -= int(total[bin_ - 1]) if bin_ else 0
            low[i] += bin_ * width
        width = 1
    return [_value(key) for key in low]


def _counted(inputs: Inputs, low: list[int], width: int) -> dict[int, torch.Tensor]:
    """From each of these keys on, how many keys lie in each of 2^16 bins of a width: one table for the whole tensor."""
    import torch

    tables = {start: torch.zeros(BINS, dtype=torch.int64) for start in low}
    lock = threading.Lock()

    def count(block: Block) -> None:
        base, other = (t.reshape(-1, t.shape[-1]) for t in block.tensors)
        rows = max(1, ROWS // base.shape[-1])
        for a, b in zip(base.split(rows), other.split(rows), strict=True):
            keys = _keys(_importance(a, b).reshape(-1))
            for start, table in tables.items():
                inside = keys[(keys >= start) & (keys < start + width * BINS)] - start
                found = torch.bincount(inside // width, minlength=BINS)
                with lock:
                    table += found

    inputs.scan(count, 1, inputs.piece)
    return tables


def _keys(values: torch.Tensor) -> torch.Tensor:
    """Floats as integers of the same order in [0, 2^32)."""
    import torch

    bits = values.float().contiguous().view(torch.int32).long()
    return torch.where(bits >= 0, bits + (1 << 31), (-(bits + (1 << 31))) + (1 << 31))


def _value(key: int) -> torch.Tensor:
    import torch

    bits = key - (1 << 31) if key >= 1 << 31 else -(key - (1 << 31)) - (1 << 31)
    return torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
