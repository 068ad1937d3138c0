"""Order statistics: the n-th smallest of many values, and which element has it, exactly and in bounded memory.

    kept = order(inputs, lambda block: [t.abs() for t in block.others], [Query(0, rank=90, last=True)])
    kept[0].value, kept[0].index          # keep what is larger, and of what is equal the elements up to this index

Non-negative floats are ordered as the integers of their bits.  A sample gives a bracket in which a rank lies with near
certainty.  A pass over the tensor counts the values below the bracket and keeps the few within it; where they are many,
it counts them in bins, which give a bracket for the next pass.  Equal values are ordered by their place.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.merging.engine.arithmetic import indicator
from surgery.merging.engine.inputs import Block, Inputs

if TYPE_CHECKING:
    import torch

Values = Callable[[Block], "Sequence[torch.Tensor]"]
Bracket = tuple[int, int]  # the least and the largest bits, both within
SLICES, SLICE = 64, 1 << 10  # of a sample: how many (for large tensors up to 16 times so many), of how many elements
CROWDED = 16  # one in so many values of a chunk may lie within a bracket
BINS = 12  # else they are counted in 2 ** BINS bins


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


def at_least(block: Block, values: torch.Tensor, found: Found, first_wins: bool) -> torch.Tensor:
    """1 for the element that was found and all that rank above it, else 0, in the dtype of `values`, none negative.

    Ties: the earlier element ranks higher (`first_wins`), else the later one.
    """
    limit = limit_bits(block, found, first_wins)
    if limit is not None and values.dtype.itemsize >= 4:
        return indicator(values, "ge", number(limit, found.wide))
    bits = bits_of(values)
    equal = (bits == found.bits).contiguous()
    flat, at = equal.view(-1), 0
    for start, count in block.runs():
        cut = min(max(found.index + first_wins - start, 0), count)
        flat[slice(at + cut, at + count) if first_wins else slice(at, at + cut)] = False
        at += count
    return ((bits > found.bits) | equal).to(values.dtype)


def limit_bits(block: Block, found: Found, first_wins: bool) -> int | None:
    """The bits from which on the values of a block rank above the element; None if that depends on their place."""
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


@dataclass(frozen=True)
class Piece:
    """What a chunk has of a bracket, by value or in bins.

    under           how many values of the chunk lie below the bracket
    least, largest  the least and the largest bits of every bin; the same array: bits of values
    counts          how many values there are of each; None: one
    """

    under: int
    least: Any
    largest: Any
    counts: Any = None

    @property
    def exact(self) -> bool:
        return self.least is self.largest

    @property
    def inside(self) -> int:
        return len(self.least) if self.counts is None else int(self.counts.sum())

    def smaller(self, bits: int) -> int:
        """How many values of the chunk are smaller, of one that is exact."""
        return self.under + self._count(self.least < bits)

    def equal(self, bits: int) -> int:
        return self._count(self.least == bits)

    def _count(self, chosen: Any) -> int:
        import numpy as np

        return int(np.count_nonzero(chosen) if self.counts is None else self.counts[chosen].sum())


def order(inputs: Inputs, values: Values, queries: Sequence[Query]) -> list[Found]:
    """Answer all queries.  `values` gives non-negative tensors, one for every `of`, for flat blocks."""
    brackets = _brackets(inputs, values, queries) if queries else []
    answers: dict[int, Found] = {}
    while left := [i for i in range(len(queries)) if i not in answers]:
        asked = [(queries[i].of, brackets[i]) for i in left]
        pieces = inputs.scan(partial(_pieces, values, asked))
        for i, own in zip(left, zip(*pieces, strict=True), strict=True):
            brackets[i], sure = _closer(inputs, queries[i].rank, brackets[i], own)
            if sure:
                answers[i] = _locate(inputs, values, queries[i], brackets[i][0], own)
    return [answers[i] for i in range(len(queries))]


def _closer(inputs: Inputs, rank: int, bracket: Bracket, pieces: Sequence[Piece]) -> tuple[Bracket, bool]:
    """Where the rank certainly lies, and whether that is the bits of its value."""
    import numpy as np

    rank -= sum(p.under for p in pieces)
    if rank < 0:
        return (0, bracket[0] - 1), False
    if rank >= sum(p.inside for p in pieces):
        return (bracket[1] + 1, int(np.iinfo(pieces[0].least.dtype).max)), False
    counts = [p.counts for p in pieces]
    least = _ranked(inputs, [p.least for p in pieces], counts, rank)
    if all(p.exact for p in pieces):
        return (least, least), True
    return (least, _ranked(inputs, [p.largest for p in pieces], counts, rank)), False


def _pieces(values: Values, asked: Sequence[tuple[int, Bracket]], block: Block) -> list[Piece]:
    """What the block has of every bracket."""
    own = [integers(v) for v in values(block)]
    return [_piece(block.inputs, own[of], *bracket) for of, bracket in asked]


def _piece(inputs: Inputs, bits: Any, low: int, high: int) -> Piece:
    import numpy as np

    room = inputs.chunk // CROWDED
    if inputs.loops:
        space = inputs.engine.scratch("inside", len(bits), bits.itemsize)
        under, count = inputs.loops.within(bits, np.uint32(low), np.uint32(high), space)
        kept = space[:count]
        return Piece(under, *_bins(kept, low, high) if count > room else (kept.copy(),) * 2)
    inside, above = bits >= low, bits > high
    under = len(bits) - int(np.count_nonzero(inside))
    count = len(bits) - under - int(np.count_nonzero(above))
    inside ^= above
    return Piece(under, *_bins(bits[inside], low, high) if count > room else (bits[np.flatnonzero(inside)],) * 2)


def _bins(bits: Any, low: int, high: int) -> tuple[Any, Any, Any]:
    """The least, the largest and the number of values of the bins that a bracket is cut into."""
    import numpy as np

    shift = max(0, (high - low).bit_length() - BINS)
    counts = np.bincount((bits - bits.dtype.type(low)) >> bits.dtype.type(shift))
    filled = np.flatnonzero(counts)
    least = (low + (filled << shift)).astype(bits.dtype)
    return least, least + bits.dtype.type((1 << shift) - 1) if shift else least, counts[filled]


def _ranked(inputs: Inputs, bits: Sequence[Any], counts: Sequence[Any], rank: int) -> int:
    """The bits of a rank among those of all pieces, each there as often as its count says."""
    import numpy as np

    every = np.concatenate(bits)
    if all(c is None for c in counts):
        return int(inputs.loops.ranked(every, rank) if inputs.loops else np.partition(every, rank)[rank])
    often = np.concatenate([np.ones(len(b), np.int64) if c is None else c for b, c in zip(bits, counts, strict=True)])
    order = np.argsort(every)
    behind = np.cumsum(often[order])  # the rank behind the last of each
    return int(every[order[np.searchsorted(behind, rank, side="right")]])


def _brackets(inputs: Inputs, values: Values, queries: Sequence[Query]) -> list[Bracket]:
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


def _locate(inputs: Inputs, values: Values, q: Query, bits: int, pieces: Sequence[Piece]) -> Found:
    """The element of the query's rank, whose value has these bits."""
    import numpy as np

    equals, rank = [p.equal(bits) for p in pieces], q.rank - sum(p.smaller(bits) for p in pieces)
    left = sum(equals) - rank - 1 if q.last else rank
    for chunk, have in enumerate(equals):
        if left < have:
            start = chunk * inputs.chunk
            block = inputs.flat(start, min(start + inputs.chunk, inputs.numel))
            hits = np.flatnonzero(integers(values(block)[q.of]) == bits)
            return Found(bits, inputs.work == "float64", start + int(hits[left]))
        left -= have
    raise AssertionError("a rank lies outside the tensor")
