"""The n-th smallest of many values without sorting them: a sample says about where it lies, one pass looks closer.

    kept = order(inputs, lambda block: [t.abs() for t in block.others], [Query(0, rank=90, last=True)])
    kept[0].value, kept[0].index          # keep what is larger, and of what is equal the elements up to this index

Non-negative floats are ordered as the integers of their bits.  One pass counts what lies below the sample's bracket
and keeps the few values within it, or the few different ones; where that fails (an unusual order), two passes of
histograms find the rank in memory that does not grow with the tensor.  Both are exact: equal values are ordered by
their place.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.merging.engine.arithmetic import mask

if TYPE_CHECKING:
    import torch

    from surgery.merging.engine.inputs import Block, Inputs

Values = Callable[["Block"], "Sequence[torch.Tensor]"]
SLICES, SLICE = 64, 1 << 10  # of a sample: how many (for large tensors up to 16 times so many), of how many elements
CROWDED = 16  # one in so many values of a chunk may lie within a bracket


@dataclass(frozen=True)
class Query:
    """Which value: `rank` from the smallest (0) of value number `of`.

    last: ranks count down from the largest among equals, the first in the tensor being the largest: what a stable
    descending sort gives.  Otherwise as in a stable ascending sort.
    """

    of: int
    rank: int
    last: bool = False


@dataclass(frozen=True)
class Found:
    """The value of a rank, as bits of a `wide` (fp64) or an fp32 number, and the element that has it."""

    bits: int
    wide: bool
    index: int

    @property
    def value(self) -> float:
        return number(self.bits, self.wide)


def number(bits: int, wide: bool) -> float:
    """The float of these bits, fp64 or fp32."""
    kinds = ("<q", "<d") if wide else ("<i", "<f")
    return float(struct.unpack(kinds[1], struct.pack(kinds[0], bits))[0])


def behind(block: Block, values: torch.Tensor, found: Found, first_wins: bool) -> torch.Tensor:
    """1 for the element itself and what is larger, else 0, in the dtype of `values`, which are not negative.

    Of equal ones those count as larger that lie before it in the tensor, or (not `first_wins`) behind it.
    """
    least_bits = least(block, found, first_wins)
    if least_bits is not None and values.dtype.itemsize >= 4:
        return mask(values, "ge", number(least_bits, found.wide))
    bits = bits_of(values)
    equal = (bits == found.bits).contiguous()
    flat, at = equal.view(-1), 0
    for start, count in block.runs():
        cut = min(max(found.index + first_wins - start, 0), count)
        flat[slice(at + cut, at + count) if first_wins else slice(at, at + cut)] = False
        at += count
    return ((bits > found.bits) | equal).to(values.dtype)


def least(block: Block, found: Found, first_wins: bool) -> int | None:
    """The bits of the least value that counts as larger in a block; None if that depends on the place in it."""
    runs = block.runs()
    if runs[-1][0] + runs[-1][1] <= found.index:
        return found.bits + (not first_wins)
    return found.bits + first_wins if runs[0][0] > found.index else None


def bits_of(t: torch.Tensor) -> torch.Tensor:
    """Non-negative floats as integers of the same order; halves are widened first."""
    import torch

    if t.dtype == torch.float64:
        return t.contiguous().view(torch.int64)
    return t.float().contiguous().view(torch.int32)


def integers(values: Any) -> Any:
    """`bits_of`, flat, as numpy's; of what is that already, itself."""
    import torch

    return bits_of(values).reshape(-1).numpy() if isinstance(values, torch.Tensor) else values


def order(inputs: Inputs, values: Values, queries: Sequence[Query]) -> list[Found]:
    """Answer all queries.  `values` gives non-negative tensors, one for every `of`, for flat blocks."""
    found = _bracketed(inputs, values, queries) if queries else []
    left = [i for i, f in enumerate(found) if f is None]
    rest = iter(_counted(inputs, values, [queries[i] for i in left]) if left else [])
    return [next(rest) if f is None else f for f in found]


@dataclass(frozen=True)
class Piece:
    """What a chunk has of a bracket: how many values lie under it, and the bits of those within it.

    counts: where many are equal, only the different ones are kept, and how often each is there.
    """

    under: int
    bits: Any
    counts: Any = None

    def smaller(self, bits: int) -> int:
        """How many of the chunk are smaller."""
        return self.under + self._count(self.bits < bits)

    def equal(self, bits: int) -> int:
        return self._count(self.bits == bits)

    def _count(self, chosen: Any) -> int:
        import numpy as np

        return int(np.count_nonzero(chosen) if self.counts is None else self.counts[chosen].sum())


def _bracketed(inputs: Inputs, values: Values, queries: Sequence[Query]) -> list[Found | None]:
    """The answers that lie within a bracket around the same rank of a sample; None for others."""
    import numpy as np

    ranges = _brackets(inputs, values, queries)
    room = inputs.chunk // CROWDED

    def look(block: Block) -> list[Piece | None]:
        own = [integers(v) for v in values(block)]
        return [piece(own[q.of], *limits) for q, limits in zip(queries, ranges, strict=True)]

    def compiled(bits: Any, low: int, high: int) -> Piece | None:
        inside = inputs.engine.scratch("inside", len(bits), bits.itemsize)
        under, count = inputs.engine.kernels.within(bits, np.uint32(low), np.uint32(high), inside)
        if count <= room:
            return Piece(under, inside[:count].copy())
        different, counts = np.unique(inside[:count], return_counts=True)
        return Piece(under, different, counts) if len(different) <= room else None

    def piece(bits: Any, low: int, high: int) -> Piece | None:
        if inputs.stored:
            return compiled(bits, low, high)
        inside, above = bits >= low, bits > high
        under = len(bits) - int(np.count_nonzero(inside))
        few = len(bits) - under - int(np.count_nonzero(above)) <= room
        inside ^= above
        if few:
            return Piece(under, bits[np.flatnonzero(inside)])
        different, counts = np.unique(bits[inside], return_counts=True)
        return Piece(under, different, counts) if len(different) <= room else None

    pieces = zip(*inputs.scan(look), strict=True)
    return [_within(inputs, values, q, own) for q, own in zip(queries, pieces, strict=True)]


def _within(inputs: Inputs, values: Values, q: Query, pieces: Sequence[Piece | None]) -> Found | None:
    """The answer among the values that were kept, if it is there."""
    kept = [p for p in pieces if p is not None]
    bits = _ranked(inputs, kept, q.rank - sum(p.under for p in kept)) if len(kept) == len(pieces) else None
    if bits is None:
        return None
    return _locate(inputs, values, q, bits, q.rank - sum(p.smaller(bits) for p in kept), [p.equal(bits) for p in kept])


def _ranked(inputs: Inputs, pieces: Sequence[Piece], rank: int) -> int | None:
    """The bits of a rank among the values of all pieces."""
    import numpy as np

    bits = np.concatenate([p.bits for p in pieces])
    if all(p.counts is None for p in pieces):
        if not 0 <= rank < len(bits):
            return None
        return int(inputs.engine.kernels.ranked(bits, rank) if inputs.stored else np.partition(bits, rank)[rank])
    counts = np.concatenate([np.ones(len(p.bits), np.int64) if p.counts is None else p.counts for p in pieces])
    order = np.argsort(bits)
    last = np.cumsum(counts[order])  # the rank behind the last of each
    return int(bits[order[np.searchsorted(last, rank, side="right")]]) if 0 <= rank < last[-1] else None


def _brackets(inputs: Inputs, values: Values, queries: Sequence[Query]) -> list[tuple[int, int]]:
    """Bits between which each rank lies with near certainty, from slices of the tensor at equal distances."""
    import numpy as np

    count = max(1, min(max(SLICES, inputs.numel >> 18), 16 * SLICES, inputs.numel // SLICE))
    taken = values(inputs.sample([inputs.numel * i // count // SLICE * SLICE for i in range(count)], SLICE))
    ranges = []
    for q in queries:
        sample = np.sort(integers(taken[q.of]))
        share, n = (q.rank + 0.5) / inputs.numel, len(sample)
        reach = 6 * (share * (1 - share) / n) ** 0.5 + 2 / n
        low, high = math.floor((share - reach) * n), math.ceil((share + reach) * n)
        top = int(np.iinfo(sample.dtype).max)
        ranges.append((int(sample[low]) if low > 0 else 0, int(sample[high]) if high < n else top))
    return ranges


def _counted(inputs: Inputs, values: Values, queries: Sequence[Query]) -> list[Found]:
    """By histograms of the bits: of the upper half, then of the lower half behind the one that holds the rank."""
    import torch

    wide = inputs.work == "float64"
    levels = (47, 31, 15, 0) if wide else (15, 0)
    total = 63 if wide else 31
    prefix = [0] * len(queries)
    rank = [q.rank for q in queries]
    chunks: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    above = total
    for shift in levels:
        size = 1 << (above - shift)
        chunks = _histograms(inputs, values, queries, prefix, above, shift, size)
        for i in range(len(queries)):
            counts = torch.zeros(size, dtype=torch.int64)
            for chunk in chunks:
                where, n = chunk[i]
                counts[where] += n
            sums = counts.cumsum(0)
            bin_ = int(torch.searchsorted(sums, torch.tensor([rank[i]]), right=True)[0])
            before = int(sums[bin_ - 1]) if bin_ else 0
            rank[i] -= before
            prefix[i] = (prefix[i] << (above - shift)) | bin_
        above = shift
    equals = [
        [int(n[where == (p & 0x7FFF)].sum()) for where, n in (c[i] for c in chunks)] for i, p in enumerate(prefix)
    ]
    return [_locate(inputs, values, *each) for each in zip(queries, prefix, rank, equals, strict=True)]


def _histograms(
    inputs: Inputs, values: Values, queries: Sequence[Query], prefix: Sequence[int], above: int, shift: int, size: int
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per chunk and query: which of the next bits occur behind the query's prefix, and how often."""
    import numpy as np
    import torch

    first = all(p == 0 for p in prefix) and above in (31, 63)

    def count(block: Block) -> list[tuple[torch.Tensor, torch.Tensor]]:
        bits = [
            torch.from_numpy(integers(v).view(np.int64 if inputs.work == "float64" else np.int32))
            for v in values(block)
        ]
        made: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for q, p in zip(queries, prefix, strict=True):
            if (q.of, p) not in made:
                own = bits[q.of] if first else bits[q.of][(bits[q.of] >> above) == p]
                counts = torch.bincount(((own >> shift) & (size - 1)).long(), minlength=size)
                where = counts.nonzero().reshape(-1)
                made[q.of, p] = where, counts[where]
        return [made[q.of, p] for q, p in zip(queries, prefix, strict=True)]

    return inputs.scan(count)


def _locate(inputs: Inputs, values: Values, q: Query, bits: int, rank: int, equals: Sequence[int]) -> Found:
    """The element: the `rank`-th of those that have these bits, of which every chunk has as many as `equals` says."""
    import numpy as np

    left = sum(equals) - rank - 1 if q.last else rank
    for chunk, have in enumerate(equals):
        if left < have:
            start = chunk * inputs.chunk
            block = inputs.flat(start, min(start + inputs.chunk, inputs.numel))
            hits = np.flatnonzero(integers(values(block)[q.of]) == bits)
            return Found(bits, inputs.work == "float64", start + int(hits[left]))
        left -= have
    raise AssertionError("a rank lies outside the tensor")
