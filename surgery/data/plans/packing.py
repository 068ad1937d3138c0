"""How a stream of documents becomes instances of one length: cut through, packed without splitting, or one by one.

    Cut(tokens=100_000, length=4096)                       # instance i is the tokens [4096 i, 4096 (i + 1)): no table
    pack(starts, ends, 4096, "best_fit")                   # Packed: documents that fit are whole
    pack(starts, ends, 4096, "document")                   # Packed: one document each, cut off at 4096

Best fit, longest first: each document goes into the fullest instance that has room (arXiv 2404.10830); documents longer
than an instance are first cut into whole instances and a rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from surgery.data.files.mapped import Array, Column, Held


class Instances(Protocol):
    """The instances of a source.  An instance is made of pieces: runs of tokens of the stream."""

    def __len__(self) -> int: ...

    def pieces(self, instance: int) -> Array:
        """int64 [pieces, 2]: first token and one past the last, in the order in which they fill the instance."""
        ...


@dataclass(frozen=True)
class Cut:
    """Instances that follow one another in the stream; what is left at its end is not used."""

    tokens: int
    length: int

    def __len__(self) -> int:
        return self.tokens // self.length

    def pieces(self, instance: int) -> Array:
        return np.array([[instance * self.length, (instance + 1) * self.length]])


@dataclass(frozen=True)
class Packed:
    """Instances from a table: those of `i` are pieces `firsts[i]` to `firsts[i + 1]`, `length` tokens from `start` on.

    firsts [instances + 1], starts [pieces], lengths [pieces]: int64
    """

    firsts: Column
    starts: Column
    lengths: Column

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def pieces(self, instance: int) -> Array:
        first, last = self.firsts.array[instance : instance + 2]
        start, length = self.starts.array[first:last], self.lengths.array[first:last]
        return np.stack([start, start + length], axis=1)


def pack(starts: Array, ends: Array, length: int, packing: str) -> Packed:
    """The instances of these documents [documents], int64; empty ones are left out."""
    full = ends > starts
    starts, sizes = starts[full], (ends - starts)[full]
    if packing == "document":
        table = (np.arange(len(starts) + 1), starts, np.minimum(sizes, length))
    else:
        starts, sizes = _split(starts, sizes, length)
        bins, order = best_fit(sizes, length)
        order = order[np.argsort(bins[order], kind="stable")]
        counts = np.bincount(bins, minlength=0)
        table = (np.concatenate([[0], np.cumsum(counts)]), starts[order], sizes[order])
    return Packed(*(Held(column.astype(np.int64)) for column in table))


def _split(starts: Array, sizes: Array, length: int) -> tuple[Array, Array]:
    """Documents longer than an instance in pieces: whole instances, then the rest."""
    parts = -(-sizes // length)
    at = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    begin = np.repeat(starts, parts) + at * length
    return begin, np.minimum(np.repeat(starts + sizes, parts) - begin, length)


def best_fit(sizes: Array, room: int) -> tuple[Array, Array]:
    """The bin of each piece, and the order in which they were placed: longest first, each into the fullest with room.

    All pieces of one size are placed together: the fullest bin with room takes as many as it can, then the next.  So
    the work grows with the number of different sizes and rooms, not with the pieces.
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    bounds = np.flatnonzero(np.diff(sizes[order], prepend=-1, append=-1))
    free = _Free(room)
    for first, last in pairwise(bounds):
        free.place(int(sizes[order[first]]), order[first:last], bins)
    return bins, order


class _Free:
    """The bins by their room; a bit is set for each room that some bin has."""

    def __init__(self, room: int) -> None:
        self.room, self.count, self.bits = room, 0, 0
        self.by_room: dict[int, list[Array]] = {}

    def place(self, size: int, pieces: Array, bins: Array) -> None:
        """Put pieces of one size into bins."""
        while len(pieces):
            above = self.bits >> size
            room = size + (above & -above).bit_length() - 1 if above else self.room
            each = room // size
            chosen = self._take(room, -(-len(pieces) // each)) if above else self._open(-(-len(pieces) // each))
            placed = pieces[: len(chosen) * each]
            bins[placed] = np.repeat(chosen, each)[: len(placed)]
            full, rest = divmod(len(placed), each)
            self._put(room - each * size, chosen[:full])
            self._put(room - rest * size, chosen[full:])
            pieces = pieces[len(placed) :]

    def _open(self, n: int) -> Array:
        self.count += n
        return np.arange(self.count - n, self.count)

    def _take(self, room: int, n: int) -> Array:
        have = np.concatenate(self.by_room.pop(room))
        self.bits &= ~(1 << room)
        self._put(room, have[n:])
        return have[:n]

    def _put(self, room: int, bins: Array) -> None:
        if len(bins) and room:
            self.by_room.setdefault(room, []).append(bins)
            self.bits |= 1 << room
