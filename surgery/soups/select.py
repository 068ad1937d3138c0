"""The n-th smallest of many values without sorting them: a histogram of their bits, then one of the rest.

    kept = order(inputs, lambda block: [t.abs() for t in block.others], [Query(0, rank=90, last=True)])
    kept[0].value, kept[0].index          # keep what is larger, and of what is equal the elements up to this index

Non-negative floats are ordered as the integers of their bits.  Two passes over the sources find any number of ranks
exactly, in memory that does not grow with the tensor.  Equal values are ordered by their place in the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from surgery.soups.engine import Block, Inputs

Values = Callable[["Block"], "Sequence[torch.Tensor]"]


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
    import torch

    if not queries:
        return []
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
