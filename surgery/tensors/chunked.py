"""A tensor stored as boxes that tile it, each box wherever it likes: the lazy side of sharded checkpoints.

    Chunked("w", (4, 6), "float32", [Chunk((0, 0), (2, 6), open_first), Chunk((2, 0), (2, 6), open_second)], file)

That the chunks cover the shape exactly once is proved before anything is read, so no element can be missing.
Only the chunks that a box touches are opened.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import FileError, show
from surgery.tensors.lazy import Box, Lazy, Shape, lengths

if TYPE_CHECKING:
    import torch

_PAIRS = 2_000_000  # comparisons that an irregular tiling may cost


@dataclass(frozen=True)
class Chunk:
    """A box of the tensor: where it begins, its sizes, and how to get it as a lazy tensor of that shape."""

    start: Shape
    sizes: Shape
    open: Callable[[], Lazy]

    @property
    def stop(self) -> Shape:
        return tuple(a + n for a, n in zip(self.start, self.sizes, strict=True))


class Chunked(Lazy):
    """`chunks` must tile `shape`; chunks without elements may be left out.  Raises FileError about `file` if not."""

    __slots__ = ("_grid", "_open", "chunks", "dtype", "name", "shape")

    def __init__(self, name: str, shape: Shape, dtype: str, chunks: Sequence[Chunk], file: str) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.chunks = tuple(chunk for chunk in chunks if math.prod(chunk.sizes))
        self._open: dict[Shape, Lazy] = {}
        self._grid = _check_tiling(name, shape, self.chunks, file)

    def read(self, box: Box) -> torch.Tensor:
        import torch

        out, filled = torch.empty(lengths(box), dtype=self.torch_dtype), 0
        for chunk in self.touched(box) if out.numel() else ():
            both = [(max(a, c), min(b, d)) for (a, b), c, d in zip(box, chunk.start, chunk.stop, strict=True)]
            part = self._part(chunk).read(tuple((a - c, b - c) for (a, b), c in zip(both, chunk.start, strict=True)))
            if part.numel() == out.numel():
                return part
            out[tuple(slice(a - lo, b - lo) for (a, b), (lo, _) in zip(both, box, strict=True))] = part
            filled += part.numel()
        assert filled == out.numel(), (self.name, box)  # the tiling has been proved
        return out

    def touched(self, box: Box) -> Iterator[Chunk]:
        """The chunks that a box (not an empty one) has elements of."""
        if self._grid is None:
            for chunk in self.chunks:
                if all(a < d and c < b for (a, b), c, d in zip(box, chunk.start, chunk.stop, strict=True)):
                    yield chunk
            return
        edges, by_start = self._grid
        ranges = [
            starts[bisect.bisect_right(starts, a) - 1 : bisect.bisect_left(starts, b)]
            for (a, b), starts in zip(box, edges, strict=True)
        ]
        for start in itertools.product(*ranges):
            yield by_start[start]

    def _part(self, chunk: Chunk) -> Lazy:
        if chunk.start not in self._open:
            self._open[chunk.start] = chunk.open()
        return self._open[chunk.start]

    def sources(self) -> tuple[Lazy, ...]:
        """The chunks, opened."""
        return tuple(self._part(chunk) for chunk in self.chunks)


Grid = tuple[list[list[int]], dict[Shape, Chunk]]


def _check_tiling(name: str, shape: Shape, chunks: Sequence[Chunk], file: str) -> Grid | None:
    """The chunks as a grid (starts along each dimension, chunk by start), or None if they tile irregularly."""
    by_start: dict[Shape, Chunk] = {}
    for chunk in chunks:
        where = f"chunk {list(chunk.start)[:8]} of {show(name)}"
        if len(chunk.start) != len(shape) or any(d > n for d, n in zip(chunk.stop, shape, strict=True)):
            sizes = list(chunk.sizes)[:8]
            raise FileError(f"{where}, sizes {sizes}, lies outside the shape {list(shape)[:8]}", file=file)
        if chunk.start in by_start:
            raise FileError(f"two chunks of {show(name)} begin at {list(chunk.start)[:8]}", file=file)
        by_start[chunk.start] = chunk
    held, needed = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
    if held != needed:
        raise FileError(
            f"the chunks of {show(name)} hold {show(held)} elements, its shape {list(shape)[:8]} has {show(needed)}",
            file=file,
            hint="a shard is missing, or shards of two saves are mixed",
        )
    edges = [sorted({chunk.start[dim] for chunk in chunks}) for dim in range(len(shape))]
    if _is_grid(shape, chunks, edges):
        return edges, by_start
    _no_overlaps(name, chunks, file)
    return None


def _is_grid(shape: Shape, chunks: Sequence[Chunk], edges: list[list[int]]) -> bool:
    """Whether each chunk ends where the next ones begin and all cells are there: then nothing can overlap."""
    if len(chunks) != math.prod(map(len, edges)):
        return False
    after = [dict(itertools.pairwise([*starts, n])) for starts, n in zip(edges, shape, strict=True)]
    return all(after[dim][chunk.start[dim]] == stop for chunk in chunks for dim, stop in enumerate(chunk.stop))


def _no_overlaps(name: str, chunks: Sequence[Chunk], file: str) -> None:
    """Equal volumes and no overlap: the chunks tile the shape."""
    ordered = sorted(chunks, key=lambda chunk: chunk.start)
    pairs = 0
    for k, one in enumerate(ordered):
        for other in itertools.islice(ordered, k + 1, None):
            if other.start[0] >= one.stop[0]:
                break
            pairs += 1
            if pairs > _PAIRS:
                raise FileError(f"the {len(chunks)} chunks of {show(name)} are too irregular to be checked", file=file)
            if all(a < d and c < b for a, b, c, d in zip(one.start, one.stop, other.start, other.stop, strict=True)):
                raise FileError(
                    f"chunks {list(one.start)[:8]} and {list(other.start)[:8]} of {show(name)} overlap", file=file
                )
