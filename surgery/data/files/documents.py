"""Where the documents of a token file begin, and which of them a position lies in.

    bounds = IndexBounds(read_index("corpus.idx"))
    bounds.starts(np.array([0, 1]))                     # [0, 37]: the first token of documents 0 and 1
    document_at(bounds, np.array([36, 37]))             # [0, 1]
    starts_within(bounds, np.array([30]), 20)           # ([0], [7]): in the window 30 ... 49 a document begins at 7

Nothing is loaded: every answer reads the few entries of the index that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from surgery.data.files.idx import Index
from surgery.data.files.mapped import Array, Column


class Bounds(Protocol):
    """The documents of one token file, one after the other, from its first token to its last."""

    def __len__(self) -> int:
        """How many documents; some may be empty."""
        ...

    def starts(self, documents: Array) -> Array:
        """int64, the first token of each of these documents; of number `len(self)`: the number of tokens."""
        ...


@dataclass(frozen=True)
class IndexBounds:
    """Of a Megatron index."""

    index: Index

    def __len__(self) -> int:
        return len(self.index.sections[2]) - 1

    def starts(self, documents: Array) -> Array:
        firsts = self.index.documents[documents]
        out = np.full(firsts.shape, self.index.tokens, np.int64)
        inside = firsts < len(self.index.sections[0])
        out[inside] = self.index.offsets[firsts[inside]] // self.index.dtype.itemsize
        return out


@dataclass(frozen=True)
class EndBounds:
    """Of the ends of all documents, in tokens, rising: what `.ds.index` holds."""

    ends: Column

    def __len__(self) -> int:
        return len(self.ends)

    def starts(self, documents: Array) -> Array:
        out = np.zeros(documents.shape, np.int64)
        later = documents > 0
        out[later] = self.ends.array[documents[later] - 1]
        return out


def document_at(bounds: Bounds, positions: Array) -> Array:
    """The document that holds each of these tokens.  Bisects for all at once: log2(documents) small reads."""
    low = np.zeros(positions.shape, np.int64)
    high = np.full(positions.shape, len(bounds), np.int64)
    for _ in range(len(bounds).bit_length()):
        middle = (low + high) // 2
        right = bounds.starts(middle) <= positions
        low, high = np.where(right, middle, low), np.where(right, high, middle)
    return low


def starts_within(bounds: Bounds, starts: Array, length: int) -> tuple[Array, Array]:
    """Documents that begin inside windows of `length` tokens, but not at their front: (window, offset), int64 each."""
    first, last = np.split(document_at(bounds, np.concatenate([starts, starts + length - 1])), 2)
    counts = last - first
    windows = np.repeat(np.arange(len(starts)), counts)
    ranks = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = bounds.starts(first[windows] + 1 + ranks) - starts[windows]
    distinct = np.ones(len(offsets), bool)  # empty documents begin where the next one does
    distinct[1:] = (offsets[1:] != offsets[:-1]) | (windows[1:] != windows[:-1])
    return windows[distinct], offsets[distinct]
