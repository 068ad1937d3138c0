"""Sums in a stated order: over sources one after the other, over a tensor chunk after chunk.

    added([a, b, c])          # ((0 + a) + b) + c in fp32 or wider, rounded to the dtype of a once

A small tensor is summed by torch's own reduction; of a larger one every chunk is summed in fp64, and the sums are
added in the order of the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from surgery.soups.engine import Block, Inputs

Values = Callable[["Block"], "Sequence[torch.Tensor]"]


def added(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of equal shapes, from the first to the last."""
    import torch

    first = tensors[0]
    out = torch.zeros(first.shape, dtype=first.dtype if first.dtype.itemsize > 2 else torch.float32)
    for t in tensors:
        out += t
    return out.to(first.dtype)


def sums(inputs: Inputs, values: Values, span: int = 0) -> list[torch.Tensor]:
    """The sum of each of the tensors that `values` makes of a block, as scalars of the working dtype."""
    import torch

    from surgery.lazy import torch_dtype

    if inputs.single and inputs.numel:
        return [v.sum() for v in whole(inputs, values, span)]
    parts = inputs.scan(lambda block: [v.double().sum() for v in values(block)], span)
    dtype = torch_dtype(inputs.work)
    return [torch.stack(list(column)).sum().to(dtype) for column in zip(*parts, strict=True)]


def whole(inputs: Inputs, values: Values, span: int = 0) -> list[torch.Tensor]:
    """What `values` makes of all blocks, joined: for small tensors, whose reductions are torch's own."""
    import torch

    parts = inputs.scan(lambda block: [v.reshape(-1) for v in values(block)], span)
    return [torch.cat(list(column)) for column in zip(*parts, strict=True)]


def norms(inputs: Inputs, values: Values) -> list[torch.Tensor]:
    """The euclidean norm of each tensor, as `sums`."""
    import torch

    from surgery.lazy import torch_dtype

    if inputs.single and inputs.numel:
        return [torch.linalg.vector_norm(v, dim=-1) for v in whole(inputs, values)]
    parts = inputs.scan(lambda block: [v.double().square().sum() for v in values(block)])
    dtype = torch_dtype(inputs.work)
    return [torch.stack(list(column)).sum().sqrt().to(dtype) for column in zip(*parts, strict=True)]
