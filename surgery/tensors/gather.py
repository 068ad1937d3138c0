"""Lazy pieces that upcycling needs: rows or columns by an index, and factors.

taken(gate, 0, range(0, 96))            # a slice
taken(down, 1, (5, 900, 17))            # columns in any order, read in windows of bounded size
scaled(down, 8.0)                       # multiplied in fp32, rounded once
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from surgery.tensors.lazy import ITEMSIZE, Box, Lazy, Map, Shape, Slice, boxes, lengths

if TYPE_CHECKING:
    import torch

MATRICES = ("gate", "up", "down")  # of an mlp, and of an expert
BLOCK = 8 << 20  # bytes that are looked at together
WINDOW = 4 << 20  # bytes of the source that are read at once
GAP = 1 << 16  # bytes that are read in vain rather than reading twice
Index = Sequence[int]


class Gather(Lazy):
    """`src` at the places of `index` along one dimension; they may be in any order and repeat."""

    __slots__ = ("dim", "index", "src")

    def __init__(self, src: Lazy, dim: int, index: Index) -> None:
        assert all(0 <= i < src.shape[dim] for i in index), (src, dim)
        self.src, self.dim, self.index = src, dim, tuple(index)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.src.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        s = self.src.shape
        return s[: self.dim] + (len(self.index),) + s[self.dim + 1 :]

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src,)

    def read(self, box: Box) -> torch.Tensor:
        import torch

        a, b = box[self.dim]
        out = torch.empty(lengths(box), dtype=self.torch_dtype)
        places = sorted(range(a, b), key=self.index.__getitem__)
        nbytes = max(1, math.prod(n for d, n in enumerate(lengths(box)) if d != self.dim) * ITEMSIZE[self.dtype])
        gap = max(1, GAP // nbytes) if self.dim == 0 else max(1, WINDOW // nbytes)
        at = 0
        while at < len(places):
            first = last = self.index[places[at]]
            stop = at
            while stop < len(places):
                here = self.index[places[stop]]
                if here - last > gap or here - first >= max(1, WINDOW // nbytes):
                    break
                last, stop = here, stop + 1
            got = self.src.read(box[: self.dim] + ((first, last + 1),) + box[self.dim + 1 :])
            from_ = torch.tensor([self.index[p] - first for p in places[at:stop]])
            to = torch.tensor([p - a for p in places[at:stop]])
            out.index_copy_(self.dim, to, got.index_select(self.dim, from_))
            at = stop
        return out


def taken(src: Lazy, dim: int, index: Index) -> Lazy:
    """`src` at the places of `index`; a range is a slice, and all of it is `src` itself."""
    if isinstance(index, range) and index.step == 1:
        whole = index == range(src.shape[dim])
        return src if whole else Slice(src, dim, index.start, index.stop)
    return Gather(src, dim, index)


def scaled(src: Lazy, factor: float) -> Lazy:
    """`src` times a factor: in fp32 (float64 for float64), rounded once to the dtype of `src`."""
    if factor == 1.0:
        return src

    def multiply(data: torch.Tensor) -> torch.Tensor:
        import torch

        wide = data if data.dtype == torch.float64 else data.float()
        return (wide * factor).to(data.dtype)

    return Map(multiply, (src,))


def blocks(part: Lazy) -> Iterator[torch.Tensor]:
    """A lazy tensor's data in blocks of bounded size."""
    return (part.read(box) for box in boxes(part.shape, ITEMSIZE[part.dtype], BLOCK))
