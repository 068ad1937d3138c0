"""Sums in a stated order: over sources one after the other, over a tensor chunk after chunk.

    added([a, b, c])          # ((0 + a) + b) + c in fp32 or wider, rounded to the dtype of a once

A tensor of one chunk is summed by torch's own reduction; of more, every chunk is summed in fp64 and the sums are
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


def sums(inputs: Inputs, values: Values) -> list[torch.Tensor]:
    """The sum of each of the tensors that `values` makes of a flat block, as scalars of the working dtype."""
    import torch

    from surgery.lazy import torch_dtype

    single = inputs.single
    parts = inputs.scan(lambda block: [v.sum() if single else v.double().sum() for v in values(block)])
    if single and parts:
        return parts[0]
    dtype = torch_dtype(inputs.work)
    return [torch.stack(list(column)).sum().to(dtype) for column in zip(*parts, strict=True)]


def norms(inputs: Inputs, values: Values) -> list[torch.Tensor]:
    """The euclidean norm of each tensor, as `sums`."""
    import torch

    from surgery.lazy import torch_dtype

    if inputs.single:
        return inputs.scan(lambda block: [torch.linalg.vector_norm(v.reshape(-1), dim=-1) for v in values(block)])[0]
    parts = inputs.scan(lambda block: [v.double().square().sum() for v in values(block)])
    dtype = torch_dtype(inputs.work)
    return [torch.stack(list(column)).sum().sqrt().to(dtype) for column in zip(*parts, strict=True)]
