"""The exact batches of another trainer's run, from an `.npz`, behind the interface of `rows.RowSource`.

    batches = RecordedBatches("batches.npz")
    batches.micro                          # (2, 3): its steps had two micro-batches of three rows
    batches.rows(step=0).tokens            # int64 [6, 32]: the micro-batches one after the other

input_ids     [step, micro, row, token], or [step, row, token]
labels        aligned with input_ids as Hugging Face's are: -100 or the id itself
label_mask    1 where the token may be a label        attention_mask   0 where it is padding
position_ids  from 0 on in every document             index            numbers of the instances
completion_mask  of preferences: 1 for the tokens of completions; the first half of the rows of a micro-batch are chosen
              ones, the second half those that were rejected, in the same order
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from surgery.data.files.mapped import Array
from surgery.data.files.npy import open_npz
from surgery.data.files.tokens import Passage
from surgery.data.rows import IGNORE, Rows, share, shifted
from surgery.errors import FileError, UsageError

IDS, POSITIONS, INDEX = "input_ids", "position_ids", "index"
SEEN, PAIRS = "attention_mask", "completion_mask"
LABELS, MASKS = "labels", ("label_mask", SEEN, PAIRS)


class RecordedBatches:
    """Batches as they were, in order; nothing is drawn or shuffled.

    Labels are kept across documents unless the record masks them, for that is what the run did.
    """

    sources: tuple[str, ...] = ("recorded",)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises FileError if the file is no `.npz` of such arrays."""
        self.path = Path(path)
        with open_npz(path) as arrays:
            if IDS not in arrays:
                raise FileError(f"has no {IDS}", file=path)
            ids = arrays[IDS]
            if ids.ndim not in (3, 4) or not ids.size:
                raise FileError(f"{IDS} has shape {ids.shape}, not [step, micro, row, token]", file=path)
            self.micro: tuple[int, int] = (1, ids.shape[1]) if ids.ndim == 3 else (ids.shape[1], ids.shape[2])
            shape = (len(ids), self.micro[0] * self.micro[1], ids.shape[-1])
            self._ids = ids.astype(np.int64).reshape(shape)
            self._mask = _mask(arrays, self._ids, self.path)
            self._positions = _like(arrays, POSITIONS, shape, self.path)
            self._index = _like(arrays, INDEX, shape[:2], self.path)
            seen = _like(arrays, SEEN, shape, self.path)
            self._padding = None if seen is None or seen.all() else seen == 0
            self.group = 2 if PAIRS in arrays else 1  # rows that belong together
            if self.micro[1] % self.group:
                raise FileError(f"a micro-batch has {self.micro[1]} rows, which are no pairs", file=path)

    @property
    def sequence_length(self) -> int:
        return int(self._ids.shape[2])

    @property
    def rows_per_step(self) -> int:
        return int(self._ids.shape[1])

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """A rank's share of a step."""
        if not 0 <= step < len(self):
            raise UsageError(f"there is no step {step}", hint=f"steps count from 0 to {len(self) - 1}")
        mine = self._order()[share(self.rows_per_step // self.group, rank, world)].reshape(-1)
        labels = shifted(self._ids[step], self._mask[step])[mine]
        positions = None if self._positions is None else self._positions[step][mine]
        numbers = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        instance = (numbers if self._index is None else self._index[step])[mine]
        padding = None if self._padding is None else self._padding[step][mine]
        return Rows(self._ids[step][mine], labels, positions, np.zeros(len(instance), np.int64), instance, padding)

    def _order(self) -> Array:
        """int64 [groups, rows of a group]: each chosen row beside its rejected one."""
        micro, rows = self.micro
        numbers = np.arange(micro * rows).reshape(micro, self.group, rows // self.group)
        return numbers.transpose(0, 2, 1).reshape(-1, self.group)

    def passages(self, source: int, instance: int) -> list[Passage]:
        """The record itself."""
        return [Passage(self.path, None, 0, self.sequence_length)]


def _mask(arrays: Mapping[str, Array], ids: Array, path: Path) -> Array:
    """Which tokens may be labels."""
    mask = np.ones(ids.shape, bool)
    for name in MASKS:
        if (found := _like(arrays, name, ids.shape, path)) is not None:
            mask &= found != 0
    if (labels := _like(arrays, LABELS, ids.shape, path)) is not None:
        if ((labels != IGNORE) & (labels != ids)).any():
            raise FileError(f"{LABELS} are other ids than {IDS}", file=path)
        mask &= labels != IGNORE
    return mask


def _like(arrays: Mapping[str, Array], name: str, shape: tuple[int, ...], path: Path) -> Array | None:
    """An array of as many numbers, in this shape; None if it is not there."""
    if name not in arrays:
        return None
    found = arrays[name]
    if found.size != np.prod(shape):
        raise FileError(f"{name} has shape {found.shape}, which does not fit {IDS}", file=path)
    return found.astype(np.int64).reshape(shape)
