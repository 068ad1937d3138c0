"""The sources of a merged tensor, read in the same places: a box, a flat range, or chunk after chunk.

    inputs = Inputs("model.norm.weight", [a, b, base], 2, "float32", seed=0, engine=Engine(threads=2))
    inputs.flat(0, 100).tensors              # the first 100 elements of base, a and b, in fp32
    inputs.scan(lambda block: block.base.abs().max())

Chunks depend on the tensor alone and come back in their order, so that what is summed over them is the same bits
whatever the memory and the number of threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from surgery.merging.engine import random_masks as masks
from surgery.merging.engine.pool import Engine
from surgery.tensors.lazy import ITEMSIZE, Box, Lazy, Shape, boxes, lengths, torch_dtype, whole
from surgery.tensors.memory import buffer

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
CHUNK = 1 << 20  # elements up to which reductions over a tensor are torch's own
PIECE = 1 << 18  # elements that a scan looks at together: what stays in the cache of a core
LARGE_PIECE = 1 << 19  # the same for compiled loops, which take it in strips
CROWD = 4  # sources up to which this holds: of more, the pieces are smaller, not the memory larger


class Again(Enum):
    """Whether what is read will be read again: then it is kept in memory, if there is room; or is let go."""

    YES = 1
    MAYBE = 2
    NO = 3


class Block:
    """The same elements of every source, the base, if any, being the first: those of a box, or of a flat range.

    bits  [sources, elements] as they are stored (`Inputs.stored`), flat, for compiled loops; valid until this thread
          reads the next block; None where `Inputs.loops` is
    """

    __slots__ = ("_read", "_tensors", "box", "inputs", "numel", "shape", "start")

    def __init__(self, inputs: Inputs, read: Any, box: Box | None, start: int, shape: Shape) -> None:
        self.inputs, self.box, self.start, self.shape = inputs, box, start, shape
        self.numel, self._read = read.shape[1], read
        self._tensors: list[torch.Tensor] | None = None

    @property
    def bits(self) -> Any:
        return self._read if self.inputs.stored else None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """In the working dtype, each a tensor of its own."""
        if self._tensors is None:
            stored, work = self.inputs.stored, torch_dtype(self.inputs.work)
            rows = [tensor_of(memoryview(r).cast("B"), stored or self.inputs.work) for r in self._read]
            self._tensors = [(r.to(work, copy=True) if stored else r).reshape(self.shape) for r in rows]
        return self._tensors

    @property
    def loops(self) -> Any:
        """The compiled loops, where there are `bits`."""
        return self.inputs.loops

    def room(self, use: str, rows: int = 1, itemsize: int = 4) -> Any:
        """[rows, elements] integers for one use; see `Engine.scratch`."""
        return self.inputs.engine.scratch(use, rows * self.numel, itemsize).reshape(rows, self.numel)

    @property
    def base(self) -> torch.Tensor:
        return self.tensors[0]

    @property
    def others(self) -> list[torch.Tensor]:
        return self.tensors[1:] if self.inputs.based else self.tensors

    def deltas(self) -> list[torch.Tensor]:
        """The task vectors: all others, less the base."""
        return [t - self.base for t in self.others]

    def below(self, source: int, probability: Any) -> Any:
        """Which elements are chosen at random, each with its probability: numpy's booleans, flat.

        The same for an element whatever block it is read in.
        """
        return masks.below((self.inputs.seed, self.inputs.name, source), self.runs(), probability)

    def runs(self) -> list[tuple[int, int]]:
        """The (first element, how many) of the tensor's flat ranges that the block consists of, in order."""
        return [(self.start, self.numel)] if self.box is None else masks.runs(self.inputs.shape, self.box)


class Inputs:
    """The sources of one tensor of the merge.  `base` is the base's place among them, None if there is none."""

    def __init__(
        self, name: str, sources: Sequence[Lazy], base: int | None, work: str, seed: int, engine: Engine
    ) -> None:
        order = list(range(len(sources)))
        if base is not None:
            order = [base, *(i for i in order if i != base)]
        self.name, self.work, self.seed, self.based = name, work, seed, base is not None
        self.sources = [sources[i] for i in order]
        self.shape: Shape = sources[0].shape
        self.numel = math.prod(self.shape)
        self.engine = engine

    @property
    def count(self) -> int:
        """How many sources there are besides the base."""
        return len(self.sources) - self.based

    @property
    def crowd(self) -> int:
        """By how much pieces are smaller for there being many sources."""
        return max(1, math.ceil(len(self.sources) / CROWD))

    @property
    def chunk(self) -> int:
        """Elements that are scanned at once where compiled loops may take them: whole rows, if possible."""
        return self._rows(LARGE_PIECE if self.stored else PIECE)

    @property
    def piece(self) -> int:
        """The same for torch, whose every step makes another tensor of the size."""
        return self._rows(PIECE)

    def _rows(self, most: int) -> int:
        most, row = most // self.crowd, max(1, self.shape[-1]) if self.shape else 1
        return min(CHUNK, most if row > most else most // row * row)

    @property
    def single(self) -> bool:
        """Whether the tensor is small, so that reductions are torch's own."""
        return self.numel * self.crowd <= CHUNK

    def scan(self, fn: Callable[[Block], T], span: int = 0, size: int = 0) -> list[T]:
        """`fn` of every chunk of the tensor, in order.

        They have `size` elements.  span 0: they are flat, [n], and cut rows anywhere; else they keep the last `span`
        dimensions whole.
        """
        step = size or self.chunk
        if span == 0 or not self.shape:
            starts = range(0, self.numel, step)
            need = self._need(min(step, self.numel))
            return self.engine.map(lambda at: fn(self.flat(at, min(at + step, self.numel))), list(starts), need)
        boxes = list(spanned(whole(self.shape), span, step))
        need = self._need(max((math.prod(lengths(box)) for box in boxes), default=0))
        return self.engine.map(lambda box: fn(self.block(box, Again.YES)), boxes, need)

    def _need(self, numel: int) -> int:
        """Bytes that work on so many elements takes: the sources as stored and widened, and as much again."""
        return numel * (len(self.sources) * (2 + 2 * ITEMSIZE[self.work]) + 2 * ITEMSIZE[self.work])

    def all(self) -> Block:
        """The whole tensor, in its own shape."""
        return self.block(whole(self.shape), Again.YES)

    def flat(self, start: int, stop: int) -> Block:
        """Elements [start, stop) in row-major order, which will be wanted again."""
        return Block(self, self._read([(start, stop - start)], None, Again.YES), None, start, (stop - start,))

    def sample(self, starts: Sequence[int], size: int) -> Block:
        """`size` elements (fewer at the end of the tensor) from each start on, one behind the other."""
        read = self._read([(start, min(size, self.numel - start)) for start in starts], None, Again.MAYBE)
        return Block(self, read, None, 0, (read.shape[1],))

    def block(self, box: Box, again: Again = Again.MAYBE) -> Block:
        return Block(self, self._read(masks.runs(self.shape, box), box, again), box, 0, tuple(lengths(box)))

    @property
    def loops(self) -> Any:
        """The compiled loops if they can take these sources: numba is there, and fp32 is worked in; else None."""
        return self.engine.loops if self.work == "float32" else None

    @functools.cached_property
    def stored(self) -> str | None:
        """As what compiled loops take the sources: bfloat16 if all are, else float32; None without such loops."""
        if not self.loops:
            return None
        return "bfloat16" if all(s.dtype == "bfloat16" for s in self.sources) else "float32"

    @functools.cached_property
    def fits(self) -> bool:
        """Whether all of the sources may be kept in memory, as they are stored."""
        dtype = self.stored
        return dtype is not None and len(self.sources) * self.numel * ITEMSIZE[dtype] <= self.engine.cache.budget

    def _read(self, runs: Sequence[tuple[int, int]], box: Box | None, again: Again) -> Any:
        """[sources, elements]: integers of the width of what is stored, or of the working dtype."""
        dtype, cache = self.stored, self.engine.cache
        (start, numel), single = runs[0], len(runs) == 1
        if single and (parts := cache.take(self, start, start + numel, again is Again.NO)):
            return parts[0] if len(parts) == 1 and parts[0].flags.c_contiguous else self._joined(parts)
        numel = sum(count for _, count in runs)
        keep = single and again is Again.YES and self.fits
        if dtype and not keep:
            bits = self.engine.scratch("read", len(self.sources) * numel, ITEMSIZE[dtype])
        else:
            bits = fresh(len(self.sources) * numel, ITEMSIZE[dtype or self.work])
        bits = bits.reshape(len(self.sources), numel)
        for source, row in zip(self.sources, bits, strict=True):
            out = memoryview(row).cast("B")
            if source.dtype != (dtype or self.work):
                self._widen(source, runs, box, out)
            elif box is None or single:
                _read_runs(source, runs, out)
            else:
                source.read_into(box, tensor_of(out, source.dtype).reshape(lengths(box)))
        if keep:
            cache.put(self, start, bits)
        return bits

    def _joined(self, parts: Sequence[Any]) -> Any:
        import numpy as np

        numel = sum(p.shape[1] for p in parts)
        bits = self.engine.scratch("read", len(self.sources) * numel, parts[0].itemsize)
        return np.concatenate(parts, axis=1, out=bits.reshape(len(self.sources), numel))

    def _widen(self, source: Lazy, runs: Sequence[tuple[int, int]], box: Box | None, out: memoryview) -> None:
        target = tensor_of(out, self.stored or self.work)
        if box is not None:
            target.reshape(lengths(box)).copy_(source.read(box))
            return
        narrow = memoryview(fresh(target.numel(), ITEMSIZE[source.dtype])).cast("B")
        _read_runs(source, runs, narrow)
        target.copy_(tensor_of(narrow, source.dtype))


def _read_runs(source: Lazy, runs: Sequence[tuple[int, int]], out: memoryview) -> None:
    at, item = 0, ITEMSIZE[source.dtype]
    for start, count in runs:
        source.read_flat(start, start + count, out[at : at + count * item])
        at += count * item


def fresh(count: int, itemsize: int) -> Any:
    """Integers to be filled."""
    return buffer(count * itemsize).view(f"u{itemsize}")


def tensor_of(data: memoryview, dtype: str) -> torch.Tensor:
    """Bytes as a flat tensor, without a copy."""
    import torch

    return torch.frombuffer(data, dtype=torch_dtype(dtype)) if data.nbytes else torch.empty(0, dtype=torch_dtype(dtype))


def spanned(box: Box, span: int, limit: int) -> Iterator[Box]:
    """Cover a box by boxes of about `limit` elements that keep its last `span` dimensions as they are."""
    keep = max(0, len(box) - span)
    inner = max(1, math.prod(lengths(box[keep:])))
    if not keep:
        yield box
        return
    for lead in boxes(tuple(lengths(box[:keep])), inner, max(limit, inner)):
        yield (*((a + at, b + at) for (a, b), (at, _) in zip(lead, box[:keep], strict=True)), *box[keep:])
