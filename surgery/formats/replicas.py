"""Arithmetic over the tensors of tensor-parallel ranks: a sum kept in shares, and the mean of copies that differ.

    total(share(b, 0, 3), share(b, 1, 3), share(b, 2, 3))     # b again, bit for bit

GPT-NeoX's parallel residual adds every rank's own bias before the ranks are summed, so that the model's bias is the
sum of what they store.  A bias is written as equal shares wherever these add up to it exactly (always, for two ranks,
four ranks ..., but for the smallest numbers of a dtype); elsewhere the first rank's share makes up the difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def total(*shares: torch.Tensor) -> torch.Tensor:
    """The sum over ranks in fp32 (fp64 for doubles), of neighbours, then of their sums, ..., rounded once at the end.

    In this order 2, 4, 8 ... equal shares add up without rounding.
    """
    terms = [_wide(s) for s in shares]
    while len(terms) > 1:
        pairs = zip(terms[::2], terms[1::2], strict=False)
        terms = [a + b for a, b in pairs] + terms[len(terms) // 2 * 2 :]
    return terms[0].to(shares[0].dtype)


def share(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What one of `ranks` ranks stores of a sum, so that `total` of all shares is the tensor again."""
    import torch

    each = (_wide(tensor) / ranks).to(tensor.dtype)
    rest = (_wide(tensor) - _wide(each) * (ranks - 1)).to(tensor.dtype)
    others = [each] * (ranks - 1)
    first = torch.where(_equal(total(each, *others), tensor), each, rest)
    adds_up = _equal(total(first, *others), tensor)
    if rank == 0:
        return torch.where(adds_up, first, tensor)
    return torch.where(adds_up, each, torch.zeros_like(tensor))


def mean(*copies: torch.Tensor) -> torch.Tensor:
    """The mean of copies, in fp32 and rounded once; elements that are the same in all of them stay as they are."""
    import torch

    same = torch.ones_like(copies[0], dtype=torch.bool)
    for other in copies[1:]:
        same &= _equal(copies[0], other)
    wide = _wide(copies[0])
    for other in copies[1:]:
        wide = wide + _wide(other)
    return torch.where(same, copies[0], (wide / len(copies)).to(copies[0].dtype))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.element_size() == 8 else tensor.float()


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise equality of bits: NaNs are equal to themselves, -0.0 is not 0.0."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.contiguous().view(bits) == b.contiguous().view(bits)
