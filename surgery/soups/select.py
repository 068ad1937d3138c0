"""The n-th smallest of many values without sorting them: a sample says about where it lies, one pass looks closer.

    kept = order(inputs, lambda block: [t.abs() for t in block.others], [Query(0, rank=90, last=True)])
    kept[0].value, kept[0].index          # keep what is larger, and of what is equal the elements up to this index

Non-negative floats are ordered as the integers of their bits.  One pass counts what lies below the sample's bracket
and keeps the few values within it; where that fails (many equal values, or an unusual order), two passes of histograms
find the rank in memory that does not grow with the tensor.  Both are exact: equal values are ordered by their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from surgery.soups.engine import Block, Inputs

Values = Callable[["Block"], "Sequence[torch.Tensor]"]
SLICES, SLICE = 64, 1 << 10  # of a sample: how many, and of how many elements
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
    """The value of a rank, as bits and number, and the element that has it."""

    bits: int
    value: float
    index: int


def bits_of(t: torch.Tensor) -> torch.Tensor:
    """Non-negative floats as integers of the same order; halves are widened first."""
    import torch

    if t.dtype == torch.float64:
        return t.contiguous().view(torch.int64)
    return t.float().contiguous().view(torch.int32)


def order(inputs: Inputs, values: Values, queries: Sequence[Query]) -> list[Found]:
    """Answer all queries.  `values` gives non-negative tensors, one for every `of`, for flat blocks."""
    found = _bracketed(inputs, values, queries) if queries else []
    left = [i for i, f in enumerate(found) if f is None]
    rest = iter(_counted(inputs, values, [queries[i] for i in left]) if left else [])
    return [next(rest) if f is None else f for f in found]


def _bracketed(inputs: Inputs, values: Values, queries: Sequence[Query]) -> list[Found | None]:
    """The answers that lie within a bracket around the same rank of a sample; None for others."""
    import torch

    ranges = _brackets(inputs, values, queries)
    room = inputs.chunk // CROWDED

    def look(block: Block) -> list[tuple[int, torch.Tensor, torch.Tensor] | None]:
        own = [bits_of(v).reshape(-1) for v in values(block)]
        seen: list[tuple[int, torch.Tensor, torch.Tensor] | None] = []
        for q, (low, high) in zip(queries, ranges, strict=True):
            bits = own[q.of]
            above = bits >= low
            where = (above & (bits <= high)).nonzero().reshape(-1)
            kept = len(bits) - int(torch.count_nonzero(above)), bits[where], where + block.start
            seen.append(kept if len(where) <= room else None)
        return seen

    columns = list(zip(*inputs.scan(look), strict=True))
    return [_within(q, list(column)) for q, column in zip(queries, columns, strict=True)] or [None] * len(queries)


def _within(q: Query, pieces: Sequence[tuple[int, torch.Tensor, torch.Tensor] | None]) -> Found | None:
    """The answer among the values that were kept, if it is there."""
    import torch

    kept = [p for p in pieces if p is not None]
    if len(kept) < len(pieces) or not kept:
        return None
    bits, places = torch.cat([p[1] for p in kept]), torch.cat([p[2] for p in kept])
    rank = q.rank - sum(p[0] for p in kept)
    if not 0 <= rank < len(bits):
        return None
    value = bits.kthvalue(rank + 1).values
    equal = places[bits == value]
    rank -= int(torch.count_nonzero(bits < value))
    index = len(equal) - rank - 1 if q.last else rank
    number = value.reshape(1).view(torch.float64 if bits.dtype == torch.int64 else torch.float32)
    return Found(int(value), float(number[0]), int(equal[index]))


def _brackets(inputs: Inputs, values: Values, queries: Sequence[Query]) -> list[tuple[int, int]]:
    """Bits between which each rank lies with near certainty, from slices of the tensor at equal distances."""
    import torch

    count = max(1, min(SLICES, inputs.numel // SLICE))
    starts = [inputs.numel * i // count for i in range(count)]
    taken = inputs.engine.map(lambda at: values(inputs.flat(at, min(at + SLICE, inputs.numel))), starts)
    ranges = []
    for q in queries:
        sample = torch.cat([bits_of(t[q.of]).reshape(-1) for t in taken]).sort().values
        top = torch.iinfo(sample.dtype).max
        share, n = (q.rank + 0.5) / inputs.numel, len(sample)
        reach = 6 * (share * (1 - share) / n) ** 0.5 + 2 / n
        low, high = math.floor((share - reach) * n), math.ceil((share + reach) * n)
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
    below_equal = [(0, 0)] * len(queries)
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
            below_equal[i] = (rank[i], int(counts[bin_]))
            prefix[i] = (prefix[i] << (above - shift)) | bin_
        above = shift
    return [
        _locate(inputs, values, q, prefix[i], *below_equal[i], [c[i] for c in chunks]) for i, q in enumerate(queries)
    ]


def _histograms(
    inputs: Inputs, values: Values, queries: Sequence[Query], prefix: Sequence[int], above: int, shift: int, size: int
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per chunk and query: which of the next bits occur behind the query's prefix, and how often."""
    import torch

    first = all(p == 0 for p in prefix) and above in (31, 63)

    def count(block: Block) -> list[tuple[torch.Tensor, torch.Tensor]]:
        bits = [bits_of(v).reshape(-1) for v in values(block)]
        made: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for q, p in zip(queries, prefix, strict=True):
            if (q.of, p) not in made:
                own = bits[q.of] if first else bits[q.of][(bits[q.of] >> above) == p]
                counts = torch.bincount(((own >> shift) & (size - 1)).long(), minlength=size)
                where = counts.nonzero().reshape(-1)
                made[q.of, p] = where, counts[where]
        return [made[q.of, p] for q, p in zip(queries, prefix, strict=True)]

    return inputs.scan(count)


def _locate(
    inputs: Inputs, values: Values, q: Query, bits: int, rank: int, equal: int,
    chunks: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Found:  # fmt: skip
    """The element: the `rank`-th of those that have these bits."""
    import torch

    low = bits & 0x7FFF
    left = equal - rank - 1 if q.last else rank
    for number, (where, counts) in enumerate(chunks):
        have = int(counts[where == low].sum())
        if left < have:
            start = number * inputs.chunk
            block = inputs.flat(start, min(start + inputs.chunk, inputs.numel))
            hits = (bits_of(values(block)[q.of]).reshape(-1) == bits).nonzero().reshape(-1)
            kind = torch.int64 if inputs.work == "float64" else torch.int32
            value = torch.tensor([bits], dtype=kind).view(torch.float64 if kind == torch.int64 else torch.float32)
            return Found(bits, float(value[0]), start + int(hits[left]))
        left -= have
    raise AssertionError("a rank lies outside the tensor")
