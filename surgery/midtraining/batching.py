"""Which rows each step takes, and how they are cut into micro-batches; batches and sequences may grow on the way.

    layout = lay_out(len(batches), batches.rows_per_step, 4096, {0: 1 << 20, 10**9: 1 << 22}, {}, None)
    layout.steps, layout.tokens                       # of the whole run
    layout.steps_of(2e9)                              # after how many steps 2B tokens are seen
    rows = rows_of(batches, layout, step=7, rank=0, world=4)
    for part in micro_batches(rows, 8, "cuda"):       # tensors of 8 rows

The smallest batch is the unit: a source of rows is opened with it, and a larger batch takes several of its steps.
A shorter sequence is a row cut into pieces, so that no token is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from surgery.data.rows import IGNORE, Rows, RowSource
from surgery.errors import ConfigError
from surgery.midtraining.amounts import Amount

MAYBE = ("positions", "padding", "reference")  # what rows may lack


@dataclass(frozen=True)
class Stage:
    """Steps that are alike: from step `first` on (counted from 0), taking units from `unit` on, `units` a step.

    `length`: tokens of a row      `tokens`: seen before the stage
    """

    first: int
    unit: int
    units: int
    length: int
    tokens: int


@dataclass(frozen=True)
class Layout:
    """The stages of the data, not all of which a run may come to; its `steps`; a unit is `rows` of `length` tokens."""

    stages: tuple[Stage, ...]
    steps: int
    rows: int
    length: int

    @property
    def taken(self) -> tuple[Stage, ...]:
        """The stages that the run comes to."""
        return tuple(s for s in self.stages if s.first < self.steps)

    def stage(self, step: int) -> Stage:
        """Of a step, counted from 0."""
        return next(s for s in reversed(self.stages) if s.first <= step)

    def tokens_before(self, step: int) -> int:
        """Tokens that have been seen when a step begins."""
        stage = self.stage(step)
        return stage.tokens + (step - stage.first) * self.tokens_of(stage)

    def tokens_of(self, stage: Stage) -> int:
        """Tokens of one of its steps, on all devices."""
        return stage.units * self.rows * self.length

    @property
    def tokens(self) -> int:
        return self.tokens_before(self.steps)

    def steps_of(self, tokens: float) -> int:
        """How many steps see so many tokens, be they more than the run's; the last one may see more."""
        stage = next(s for s in reversed(self.stages) if s.tokens <= tokens)
        return stage.first + math.ceil((tokens - stage.tokens) / self.tokens_of(stage))


def unit_rows(batch_tokens: Mapping[int, int], length: int) -> int:
    """Rows of the largest batch of which all are multiples.  Raises ConfigError for one that is no number of rows."""
    odd = [n for n in batch_tokens.values() if n % length]
    if odd:
        near = max(1, round(odd[0] / length)) * length
        what = f"train.batch_tokens: {odd[0]:,} tokens are no whole number of rows of {length:,}"
        raise ConfigError(what, hint=f"{near:,} would be {near // length:,} rows")
    return math.gcd(*batch_tokens.values()) // length


def lay_out(
    units: int, rows: int, length: int, batches: Mapping[int, int], lengths: Mapping[int, int], run: Amount | None
) -> Layout:
    """The stages of a run over `units` units of `rows` rows of `length` tokens.

    batches   from which token on a step has how many; {}: one unit        lengths   the same of a row; {}: `length`
    run       how long; None: all there is
    Raises ConfigError if the lengths do not divide, or the data are too few.
    """
    if wrong := [n for n in lengths.values() if length % n]:
        raise ConfigError(f"train.sequence_length: rows of {length:,} tokens cannot be cut into pieces of {wrong[0]:,}")
    batches, lengths = batches or {0: rows * length}, lengths or {0: length}
    stages: list[Stage] = []
    step = unit = tokens = 0
    have = None  # steps until the data end; later stages begin where they would
    starts = sorted({*batches, *lengths})
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        count = _latest(batches, start) // (rows * length)
        stages.append(Stage(step, unit, count, _latest(lengths, start), tokens))
        left = (units - unit) // count
        taken = left + 1 if end is None else max(0, math.ceil((end - tokens) / (count * rows * length)))
        if have is None and left < taken:
            have = step + left
        step, unit, tokens = step + taken, unit + taken * count, tokens + taken * count * rows * length
    whole = Layout(tuple(stages), have or 0, rows, length)
    wanted = whole.steps if run is None else run.steps(whole.steps_of, whole.steps)
    if wanted > whole.steps:
        data = f"{whole.steps:,} steps, {whole.tokens:,} tokens"
        raise ConfigError(f"train.length: {run} are more than the data have ({data})", hint="plan more of them")
    if wanted < 1:
        raise ConfigError("the run has no step: the data are fewer than one batch, or train.length is less")
    return replace(whole, steps=wanted)


def _latest(values: Mapping[int, int], token: int) -> int:
    return values[max(start for start in values if start <= token)]


# -------------------------------------------------------------------------------------------------------------- rows


def rows_of(source: RowSource, layout: Layout, step: int, rank: int = 0, world: int = 1) -> Rows:
    """A rank's share of a step, counted from 0."""
    stage = layout.stage(step)
    first = stage.unit + (step - stage.first) * stage.units
    taken = [source.rows(unit, rank, world) for unit in range(first, first + stage.units)]
    rows = taken[0] if len(taken) == 1 else _joined(taken)
    return rows if stage.length == layout.length else _cut(rows, stage.length)


def _joined(parts: Sequence[Rows]) -> Rows:
    positions = None if parts[0].positions is None else np.concatenate([p.positions for p in parts])
    names = ["source", "instance", *(n for n in ("padding", "reference") if getattr(parts[0], n) is not None)]
    rest = {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
    return Rows(np.concatenate([p.tokens for p in parts]), np.concatenate([p.labels for p in parts]), positions, **rest)


def _cut(rows: Rows, length: int) -> Rows:
    """Rows in pieces; a document that goes on in the next piece begins anew there."""
    pieces = rows.tokens.shape[1] // length
    positions = rows.positions
    if positions is not None:
        positions = positions.reshape(-1, length)
        begun = np.maximum.accumulate(np.where(positions == 0, np.arange(length), 0), axis=1)
        positions = np.arange(length) - begun
    source, instance = rows.source.repeat(pieces), rows.instance.repeat(pieces)
    padding = None if rows.padding is None else rows.padding.reshape(-1, length)
    return Rows(rows.tokens.reshape(-1, length), rows.labels.reshape(-1, length), positions, source, instance, padding)


@dataclass(frozen=True)
class MicroBatch:
    """Some rows on a device: tokens, labels, positions (None: each row is one document), source [rows].

    learnt   how many labels count        padding, reference   as in Rows
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None
    source: torch.Tensor
    learnt: int
    padding: torch.Tensor | None = None
    reference: torch.Tensor | None = None


def micro_batches(rows: Rows, size: int, device: str) -> Iterator[MicroBatch]:
    """`size` rows at a time, on the device."""
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        cut = {name: None if (whole := getattr(rows, name)) is None else _tensor(whole[part], device) for name in MAYBE}
        yield MicroBatch(
            _tensor(rows.tokens[part], device), _tensor(rows.labels[part], device),
            source=_tensor(rows.source[part], device), learnt=int((rows.labels[part] != IGNORE).sum()), **cut,
        )  # fmt: skip


def _tensor(array: Any, device: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
