"""Model Stock: between the base and the mean of the models, by the angle between them.

    model_stock(inputs, {"filter_wise": False}).apply(block)

Formulas: mergekit 0.1.5, `merge_methods/model_stock.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from surgery.merging.engine.arithmetic import squares, totals, whole
from surgery.merging.engine.inputs import Block, Inputs
from surgery.merging.engine.ready import Options, Ready
from surgery.tensors.lazy import torch_dtype

if TYPE_CHECKING:
    import torch


def model_stock(inputs: Inputs, options: Options) -> Ready:
    """Between the base and the mean, the further out the more the models agree (arXiv 2403.19522).

    The angle is that of whole tensors; with `filter_wise`, of every row.
    """
    import torch

    if options["filter_wise"]:
        return Ready(lambda block: _stock(block, _cosines_of_rows(block)), span=1)
    pairs = [(i, j) for i in range(inputs.count) for j in range(i + 1, inputs.count)]
    lengths, dots = _products(inputs, pairs)
    cosines = [_cosine(dot, lengths[i], lengths[j]) for dot, (i, j) in zip(dots, pairs, strict=True)]
    mean = torch.stack(cosines).mean(dim=0)
    share = _share(inputs.count, mean)

    def fused(block: Block, out: Any) -> None:
        t, rest = (x.reshape(()).numpy()[()] for x in (share, 1 - share))
        block.loops.stock(block.bits, t, rest, out)

    return Ready(lambda block: _stock(block, mean), fused=fused)


def _products(inputs: Inputs, pairs: Sequence[tuple[int, int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The norms of all offsets from the base, and the products of pairs of them."""
    import numpy as np
    import torch

    def products(block: Block) -> Iterator[torch.Tensor]:
        offsets = block.deltas()
        yield from map(squares, offsets)
        yield from (offsets[i] * offsets[j] for i, j in pairs)

    def compiled(block: Block) -> torch.Tensor:
        first, second = np.array([(i, i) for i in range(inputs.count)] + list(pairs)).T.copy()
        out = torch.zeros(len(first), dtype=torch.float64)
        block.loops.products(block.bits, first, second, out.numpy())
        return out

    if inputs.single:
        offsets = list(whole(inputs, Block.deltas))
        lengths = [torch.linalg.vector_norm(offset, dim=-1) for offset in offsets]
        return lengths, [(offsets[i] * offsets[j]).sum() for i, j in pairs]
    found = list(sum(inputs.scan(compiled), torch.zeros(()))) if inputs.loops else totals(inputs, products)
    dtype = torch_dtype(inputs.work)
    lengths = [s.sqrt().to(dtype) for s in found[: inputs.count]]
    return lengths, [d.to(dtype) for d in found[inputs.count :]]


def _cosine(dot: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (dot / (a * b).clamp(min=1e-6)).clamp(-1, 1)


def _cosines_of_rows(block: Block) -> torch.Tensor:
    import torch

    offsets = block.deltas()
    lengths = [torch.norm(o, dim=-1) for o in offsets]
    cosines = [
        _cosine((offsets[i] * offsets[j]).sum(dim=-1), lengths[i], lengths[j])
        for i in range(len(offsets))
        for j in range(i + 1, len(offsets))
    ]
    return torch.stack(cosines).mean(dim=0).unsqueeze(-1)


def _stock(block: Block, cosine: torch.Tensor) -> torch.Tensor:
    t = _share(len(block.others), cosine)
    mean = sum(block.others[1:], block.others[0]) / len(block.others)
    return t * mean + (1 - t) * block.base


def _share(count: int, cosine: torch.Tensor) -> torch.Tensor:
    """How far from the base to the mean."""
    import torch

    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6
    return torch.where(singular, 0, (count * cosine) / torch.where(singular, 1, denominator))
