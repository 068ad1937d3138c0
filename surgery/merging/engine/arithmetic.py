"""Sums in a stated order: over sources one after the other, over a tensor chunk after chunk.  Masks as numbers.

    added([a, b, c])          # ((0 + a) + b) + c in fp32 or wider, rounded to the dtype of a once

A small tensor is summed by torch's own reduction; of a larger one every chunk is summed in groups, and the sums are
added in fp64, in the order of the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from surgery.merging.engine.inputs import Block, Inputs
from surgery.tensors.lazy import torch_dtype

if TYPE_CHECKING:
    import torch

GROUP = 128
Values = Callable[[Block], "Sequence[torch.Tensor]"]


def added(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of equal shapes, from the first to the last."""
    dtype = tensors[0].dtype
    out = (tensors[0] if dtype.itemsize > 2 else tensors[0].float()) + 0  # which makes 0 of -0
    for t in tensors[1:]:
        out += t
    return out.to(dtype)


def indicator(t: torch.Tensor, compare: str, limit: float) -> torch.Tensor:
    """1 where `t` is "gt", "ge" or "eq" to the limit, else 0, in the dtype of `t`.

    torch makes booleans, and multiplies by them, several times more slowly than it calculates.
    """
    import torch

    out = torch.empty_like(t)
    getattr(torch, compare)(t, limit, out=out)
    return out


def oriented(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sign of the sum of `deltas`, as 1 or -1 (of zero: 1).  They are multiplied by it, and what is then negative,
    which is what has the other sign, becomes zero."""
    sign = indicator(added(deltas), "ge", 0).mul_(2).sub_(1)
    for delta in deltas:
        delta.mul_(sign).clamp_(min=0)
    return sign


def sums(inputs: Inputs, values: Values, span: int = 0) -> list[torch.Tensor]:
    """The sum of each of the tensors that `values` makes of a block, as scalars of the working dtype."""
    if inputs.single and inputs.numel:
        return [v.sum() for v in whole(inputs, values, span)]
    return [total.to(torch_dtype(inputs.work)) for total in totals(inputs, values, span)]


def norms(inputs: Inputs, values: Values) -> list[torch.Tensor]:
    """The euclidean norm of each tensor, as `sums`."""
    import torch

    if inputs.single and inputs.numel:
        return [torch.linalg.vector_norm(v, dim=-1) for v in whole(inputs, values)]
    found = totals(inputs, lambda block: (squares(v) for v in values(block)))
    return [total.sqrt().to(torch_dtype(inputs.work)) for total in found]


def totals(inputs: Inputs, values: Callable[[Block], Iterable[torch.Tensor]], span: int = 0) -> list[torch.Tensor]:
    """The sums of a tensor of any size: of every chunk, then of the chunks in their order, in fp64."""
    import torch

    parts = inputs.scan(lambda block: [_total(v) for v in values(block)], span, inputs.piece)
    return [torch.tensor(column, dtype=torch.float64).sum() for column in zip(*parts, strict=True)]


def squares(values: torch.Tensor) -> torch.Tensor:
    """Of every element, in fp32 at least."""
    return (values if values.dtype.itemsize > 2 else values.float()).square()


def _total(values: torch.Tensor) -> float:
    """The sum, in fp64 but for GROUP numbers at a time: 2e-9 off where fp32 is 6e-8, in less than half the time."""
    import torch

    if values.dtype == torch.float32 and values.numel() % GROUP == 0:
        values = values.reshape(-1, GROUP).sum(1)
    return float(values.sum(dtype=torch.float64))


def whole(inputs: Inputs, values: Values, span: int = 0) -> Iterator[torch.Tensor]:
    """What `values` makes of all blocks, joined: for small tensors, whose reductions are torch's own."""
    import torch

    parts = inputs.scan(lambda block: [v.reshape(-1) for v in values(block)], span, inputs.piece)
    columns = [list(column) for column in zip(*parts, strict=True)]
    del parts
    while columns:
        yield torch.cat(columns.pop(0))
