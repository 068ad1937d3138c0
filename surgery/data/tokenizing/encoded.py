"""Encoded documents, one after the other in a few arrays, which are cut, joined and put in another order as a whole.

documents = Encoded(ids, lengths=[3, 2], files=[0, 0], lines=[1, 2])
documents.take([1, 0]).ids                  # the second document, then the first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from surgery.data.files.mapped import Array


@dataclass(frozen=True, eq=False)
class Encoded:
    """ids [tokens], in the dtype that is written; lengths int64 [documents], in tokens.

    files   int32 [documents], which source each comes from       lines  int64 [documents], where in it, from 1
    names   of the documents, or None where no one asks           mask   uint8 [tokens], 1: to be learnt; or None
    """

    ids: Array
    lengths: Array
    files: Array
    lines: Array
    names: tuple[str, ...] | None = None
    mask: Array | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def ends(self) -> Array:
        """int64 [documents], one past the last token of each."""
        return np.cumsum(self.lengths, dtype=np.int64)

    def cut(self, first: int, stop: int) -> Encoded:
        """Documents first, ..., stop - 1, as views."""
        a, b = (int(self.ends[i - 1]) if i else 0 for i in (first, stop))
        return Encoded(
            self.ids[a:b],
            self.lengths[first:stop],
            self.files[first:stop],
            self.lines[first:stop],
            None if self.names is None else self.names[first:stop],
            None if self.mask is None else self.mask[a:b],
        )

    def take(self, order: Sequence[int] | Array) -> Encoded:
        """These documents in this order."""
        if not len(order):
            return self.cut(0, 0)
        starts, ends = (self.ends - self.lengths).tolist(), self.ends.tolist()
        pieces = [slice(starts[i], ends[i]) for i in order]
        return Encoded(
            np.concatenate([self.ids[piece] for piece in pieces]),
            self.lengths[order],
            self.files[order],
            self.lines[order],
            None if self.names is None else tuple(self.names[i] for i in order),
            None if self.mask is None else np.concatenate([self.mask[piece] for piece in pieces]),
        )


def join(parts: Sequence[Encoded]) -> Encoded:
    """All documents of at least one part."""
    if len(parts) == 1:
        return parts[0]
    names = None if parts[0].names is None else tuple(name for p in parts for name in p.names or ())
    masks = [p.mask for p in parts if p.mask is not None]
    return Encoded(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.lengths for p in parts]),
        np.concatenate([p.files for p in parts]),
        np.concatenate([p.lines for p in parts]),
        names,
        np.concatenate(masks) if masks else None,
    )
