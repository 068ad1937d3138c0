"""The batches of a Megatron-LM run: samples of its datasets, blended or not, as tokens, labels and positions.

    batches = MegatronBatches([Dataset(index, order, length=4096)], None, rows_per_step=1024)
    batches.rows(step=0).labels

A sample has one token more than the sequence, so every position has a label, unless the run switched that off.  Tokens
equal to the pad id (if the tokenizer has one) are no labels and become 0, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surgery.data.files.idx import Index
from surgery.data.files.mapped import Array, mapped
from surgery.data.files.tokens import Passage
from surgery.data.rows import IGNORE, Rows, restarting_after, share, shifted
from surgery.data.trainers.megatron_order import SampleOrder
from surgery.errors import ConfigError, UsageError, some

CHUNK = 1 << 20  # samples of a blend that are checked at once


@dataclass(frozen=True, eq=False)
class Dataset:
    """A GPTDataset: an index and the order of its samples of `length` tokens and `extra`, 1 or 0, more."""

    index: Index
    order: SampleOrder
    length: int
    extra: int = 1

    def __len__(self) -> int:
        return len(self.order.shuffle)

    def pieces(self, number: int) -> list[Passage]:
        """What sample `number` of the shuffled order is made of: sequences and tokens of the payload."""
        (first, begin), (last, end) = self.order.span(int(self.order.shuffle[number]))
        found = []
        for at in range(first, last + 1):
            sequence = int(self.order.documents[at])
            start = int(self.index.offsets[sequence]) // self.index.dtype.itemsize
            stop = start + (end + self.extra if at == last else int(self.index.lengths[sequence]))
            found.append(Passage(self.index.payload, sequence, start + (begin if at == first else 0), stop))
        return [p for p in found if p.stop > p.start]

    def sample(self, number: int, pad: int) -> Array:
        """int64 [length + extra]; the last sample of a validation set may end in padding."""
        ids = mapped(self.index.payload, self.index.dtype).array
        out = np.full(self.length + self.extra, pad, np.int64)
        at = 0
        for piece in self.pieces(number):
            out[at : at + piece.stop - piece.start] = ids[piece.start : piece.stop]
            at += piece.stop - piece.start
        return out


@dataclass(frozen=True)
class Special:
    """Ids that labels and positions depend on.

    pad       becomes 0 and is no label                     unlearnt  what follows it is no label
    ends      documents end with it, and are isolated; None: they see each other
    """

    pad: int | None = None
    unlearnt: int | None = None
    ends: int | None = None


class MegatronBatches:
    """Samples in the order of the run.  `blended`: dataset and number of every sample; None: one dataset."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        blended: tuple[Array, Array] | None,
        rows_per_step: int,
        special: Special = Special(),
    ) -> None:
        """Raises ConfigError if a blend takes more samples of a dataset than it has."""
        self.datasets, self.rows_per_step, self.special = tuple(datasets), rows_per_step, special
        self.sequence_length = datasets[0].length
        self.sources = distinct_names([d.index.path for d in datasets])
        if blended is not None:
            _check_blend(blended, self.datasets)
        self._order = blended or (np.zeros(len(datasets[0]), np.int16), np.arange(len(datasets[0])))

    def __len__(self) -> int:
        return len(self._order[0]) // self.rows_per_step

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """A rank's share of a step."""
        if not 0 <= step < len(self):
            raise UsageError(f"there is no step {step}", hint=f"steps count from 0 to {len(self) - 1}")
        at = slice(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        mine = share(self.rows_per_step, rank, world)
        source, instance = (np.asarray(column[at], np.int64)[mine] for column in self._order)
        pad = -1 if self.special.pad is None else self.special.pad
        ids = np.empty((len(source), self.sequence_length + self.datasets[0].extra), np.int64)
        for row, (s, i) in enumerate(zip(source, instance, strict=True)):
            ids[row] = self.datasets[s].sample(int(i), pad)
        tokens = ids[:, : self.sequence_length].copy()
        labels = ids[:, 1:].copy() if self.datasets[0].extra else shifted(tokens)
        labels[labels == pad] = IGNORE
        if self.special.unlearnt is not None:
            labels[tokens == self.special.unlearnt] = IGNORE
        positions = None if self.special.ends is None else restarting_after(tokens, self.special.ends)
        tokens[tokens == pad] = 0
        return Rows(tokens, labels, positions, source, instance)

    def passages(self, source: int, instance: int) -> list[Passage]:
        """Where the tokens of a sample lie, the extra one included."""
        return self.datasets[source].pieces(instance)


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """As much of each path, from its end, as tells it from the others: web/tokens, math/tokens."""
    parts, names = [path.with_suffix("").parts for path in paths], tuple[str, ...]()
    for count in range(1, max(map(len, parts)) + 1):
        names = tuple("/".join(of_one[-count:]) for of_one in parts)
        if len(set(names)) == len(set(parts)):
            break
    return names


def _check_blend(blended: tuple[Array, Array], datasets: Sequence[Dataset]) -> None:
    """Raise ConfigError unless every sample of a blend is there."""
    which, number = blended
    sizes = np.array([len(d) for d in datasets])
    if which.shape != number.shape or which.ndim != 1:
        raise ConfigError(f"a blend of {which.shape} datasets and {number.shape} samples is none")
    for first in range(0, len(which), CHUNK):
        chunk, at = which[first : first + CHUNK], number[first : first + CHUNK]
        bad = (chunk < 0) | (chunk >= len(sizes)) | (at < 0)
        bad |= at >= sizes[np.where(bad, 0, chunk)]
        if bad.any():
            i = int(np.argmax(bad))
            what = f"sample {first + i} of the blend is number {at[i]} of dataset {chunk[i]}, which is not there"
            raise ConfigError(what, hint=f"the datasets have {some(map(str, sizes))} samples; Megatron stops here, too")
