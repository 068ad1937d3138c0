"""What a training loop takes: rows of tokens with labels and positions, and who can give them.

    rows.tokens, rows.labels            # int64 [rows, sequence], labels -100 where nothing is learnt
    rows.positions                      # int64 [rows, sequence], from 0 in every document; None: they see each other

labels[t] is tokens[t + 1]; the last position of a row has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from surgery.data.files.mapped import Array
from surgery.data.files.tokens import Passage

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a step.

    tokens     int64 [rows, sequence]
    labels     int64 [rows, sequence], -100 where nothing is learnt
    positions  int64 [rows, sequence], from 0 on in every document that is isolated; None: documents are not isolated
    source     int64 [rows], a number in `sources` of who gave them
    instance   int64 [rows], its number in that source
    padding    bool [rows, sequence], where tokens only fill up and no router need care; None: nowhere
    reference  float64 [rows], the frozen reference's log-probability of the labels, of preferences
    """

    tokens: Array
    labels: Array
    positions: Array | None
    source: Array
    instance: Array
    padding: Array | None = None
    reference: Array | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def learnt(self) -> int:
        """How many labels are not -100."""
        return int((self.labels != IGNORE).sum())


class RowSource(Protocol):
    """Where rows come from: a plan, or the run of another trainer.  `len` is the number of whole steps.

    `rows` gives rank `rank` of `world` its share of a step: rows rank, rank + world, ... of all its rows.  Together the
    ranks have the same rows, whatever their number.
    """

    @property
    def sequence_length(self) -> int: ...

    @property
    def rows_per_step(self) -> int: ...

    @property
    def sources(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows: ...

    def passages(self, source: int, instance: int) -> list[Passage]:
        """Where the tokens of an instance lie; for people."""
        ...


def shifted(tokens: Array, mask: Array | None = None) -> Array:
    """Labels of tokens [rows, sequence]; `mask` is False where a token is no label."""
    labels = np.empty_like(tokens)
    labels[:, :-1], labels[:, -1] = tokens[:, 1:], IGNORE
    if mask is not None:
        labels[:, :-1][~mask[:, 1:]] = IGNORE
    return labels


def restarting(shape: tuple[int, int], rows: Array, offsets: Array) -> Array:
    """int64 positions [rows, sequence] that count from 0 again at each (row, offset), which are in any order."""
    count, length = shape
    steps = np.ones(count * length, np.int64)
    if count * length:
        begin = np.unique(np.concatenate([np.arange(0, count * length, length), rows * length + offsets]))
        steps[begin] = 1 - np.diff(begin, prepend=0)
        steps[0] = 0
    return np.cumsum(steps, out=steps).reshape(shape)


def restarting_after(tokens: Array, end: int) -> Array:
    """int64 positions [rows, sequence] that count from 0 again after each token of id `end`."""
    rows, ends = np.nonzero(tokens[:, :-1] == end)
    return restarting(tokens.shape, rows, ends + 1)


def isolated(labels: Array, rows: Array, offsets: Array) -> Array:
    """Take away, in place, the labels that are the first token of an isolated document: at each (row, offset - 1)."""
    labels[rows, offsets - 1] = IGNORE
    return labels


def share(count: int, rank: int, world: int) -> slice:
    """Which of the rows of a step are a rank's."""
    assert 0 <= rank < world, (rank, world)
    return slice(rank, count, world)
