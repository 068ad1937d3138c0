"""The batches of a plan: which rows each step sees, the same for any number of ranks, found at once for any step.

    plan = open_plan("plan")
    batches = Batches(plan, rows_per_step=1024)              # by default what the mixture says
    len(batches), batches.sequence_length, batches.sources   # 11920, 4096, ("web", "math")
    rows = batches.rows(step=500, rank=3, world=8)           # 128 rows; steps count from 0, and resuming is a number
    batches.heldout("math")                                  # every row that is kept out of training, always the same

A training loop needs no more than `len`, `sequence_length`, `rows_per_step`, `sources`, `rows` and `heldout`; the runs
of other trainers (`recorded.py`, `olmo_batches.py`, `megatron_batches.py`) offer all of these but the last.
"""

from __future__ import annotations

import numpy as np

from surgery.data.files.mapped import Array
from surgery.data.files.tokens import Passage
from surgery.data.plans.order import heldout_of, split
from surgery.data.plans.packing import Packed
from surgery.data.plans.plan import Plan
from surgery.data.rows import Rows, isolated, restarting, share, shifted
from surgery.errors import UsageError

Read = tuple[Array | None, Array, Array]  # label mask; row and offset of every document that begins inside a row


class Batches:
    """A plan, `rows_per_step` rows at a time.  What is left over after the last whole step is not used (`unused`)."""

    def __init__(self, plan: Plan, rows_per_step: int | None = None) -> None:
        """Raises UsageError if nothing says the rows of a step, or the plan has fewer."""
        self.plan, mixture = plan, plan.mixture
        count = rows_per_step or mixture.rows_per_step
        if count is None:
            raise UsageError("the plan does not say how many rows a step has", hint="give rows_per_step")
        if count > len(plan.order):
            raise UsageError(f"a step of {count:,} rows needs more than the {len(plan.order):,} of the plan")
        self.rows_per_step: int = count
        self.sequence_length: int = mixture.sequence_length
        self.sources: tuple[str, ...] = tuple(s.name for s in plan.file.sources)

    def __len__(self) -> int:
        return len(self.plan.order) // self.rows_per_step

    @property
    def unused(self) -> int:
        """Instances at the end of the order that make no whole step."""
        return len(self.plan.order) % self.rows_per_step

    def span(self, step: int) -> tuple[int, int]:
        """The entries of the order, [first, last + 1), that a step takes; the one place that knows."""
        if not 0 <= step < len(self):
            raise UsageError(f"there is no step {step}", hint=f"steps count from 0 to {len(self) - 1}")
        return step * self.rows_per_step, (step + 1) * self.rows_per_step

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """A rank's share of a step.  Raises FileError if an id is beyond the vocabulary or a mask is none."""
        first, last = self.span(step)
        mine = self.plan.order[first:last][share(last - first, rank, world)]
        return self._read(*split(mine))

    def heldout(self, name: str, start: int = 0, stop: int | None = None) -> Rows:
        """The held-out instances of a source, [start, stop) of them; in a fixed order, never in that of the run."""
        number = self._number(name)
        source = self.plan.file.sources[number]
        chosen = heldout_of(source.have, source.heldout)[start:stop]
        return self._read(np.full(len(chosen), number), chosen)

    def passages(self, source: int, instance: int) -> list[Passage]:
        """Where the tokens of an instance lie."""
        tokens = self.plan.sources[source]
        pieces = self.plan.instances[source].pieces(instance)
        return [passage for start, stop in pieces for passage in tokens.passages(int(start), int(stop - start))]

    def _number(self, name: str) -> int:
        if name not in self.sources:
            raise UsageError(f"there is no source {name!r}", hint=f"sources: {', '.join(self.sources)}")
        return self.sources.index(name)

    def _read(self, source: Array, instance: Array) -> Rows:
        shape = (len(source), self.sequence_length)
        tokens, cuts = np.empty(shape, np.int64), [(source[:0], source[:0])]
        mask: Array | None = None
        padding: Array | None = None
        for number in np.unique(source):
            at = np.flatnonzero(source == number)
            if isinstance(self.plan.instances[number], Packed):
                padding = np.zeros(shape, bool) if padding is None else padding
                padding[at] = self._padding(int(number), instance[at])
            read = self._packed if isinstance(self.plan.instances[number], Packed) else self._cut
            kept, rows, offsets = read(int(number), instance[at], tokens, at)
            cuts.append((at[rows], offsets))
            if kept is not None:
                mask = np.ones(shape, bool) if mask is None else mask
                mask[at] = kept
        labels = shifted(tokens, mask)
        if not self.plan.mixture.isolate:
            return Rows(tokens, labels, None, source, instance, padding)
        rows, offsets = (np.concatenate([cut[i] for cut in cuts]) for i in (0, 1))
        return Rows(tokens, isolated(labels, rows, offsets), restarting(shape, rows, offsets), source, instance,
                    padding)  # fmt: skip

    def _padding(self, number: int, instance: Array) -> Array:
        """Where packed instances are filled up, bool [instances, sequence]."""
        pieces = (self.plan.instances[number].pieces(int(i)) for i in instance)
        filled = np.array([(p[:, 1] - p[:, 0]).sum() for p in pieces])
        return np.arange(self.sequence_length) >= filled[:, None]

    def _cut(self, number: int, instance: Array, out: Array, at: Array) -> Read:
        """Instances that lie in the stream as they are."""
        source, length = self.plan.sources[number], self.sequence_length
        starts = instance * length
        source.windows(starts, length, out, at)
        cuts = source.starts_within(starts, length) if self.plan.mixture.isolate else (starts[:0], starts[:0])
        return source.label_mask(starts, length), *cuts

    def _packed(self, number: int, instance: Array, out: Array, at: Array) -> Read:
        """Instances put together from pieces, and filled up with padding, which is no label."""
        source, length = self.plan.sources[number], self.sequence_length
        mask = np.zeros((len(instance), length), bool)
        out[at] = self.plan.mixture.pad_id
        cuts: list[tuple[int, int]] = []
        for row, i in enumerate(instance):
            filled = 0
            for start, stop in self.plan.instances[number].pieces(int(i)):
                where, inside = slice(filled, filled + int(stop - start)), (np.array([start]), int(stop - start))
                out[at[row], where] = source.windows(*inside)[0]
                kept = source.label_mask(*inside)
                mask[row, where] = True if kept is None else kept[0]
                filled = where.stop
                cuts += [(row, filled)] * (filled < length)
        rows, offsets = np.array(cuts, np.int64).reshape(-1, 2).T
        return mask, rows, offsets
