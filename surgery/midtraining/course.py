"""What a run's settings mean for its data and its number of processes: steps, micro-batches, learning rates.

    course = Course.of(run.train, batches, world=8, peak=3e-4)
    course.layout.steps, course.schedule(1), course.micro_rows(step=0), course.accumulation(step=0)

Raises ConfigError for a batch that does not divide, and for a schedule that does not fit the run.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.data.rows import RowSource
from surgery.errors import ConfigError
from surgery.midtraining.amounts import Amount
from surgery.midtraining.batching import Layout, lay_out, unit_rows
from surgery.midtraining.schedule import INVERSE_SQRT, Schedule
from surgery.midtraining.settings_train import Schedule as Wanted
from surgery.midtraining.settings_train import Train

MICRO_TOKENS = 1 << 14  # of a micro-batch, where the settings leave it open


@dataclass(frozen=True)
class Course:
    """The steps of a run; a device computes `micro` rows of full length at once."""

    layout: Layout
    schedule: Schedule
    micro: int
    world: int

    @classmethod
    def of(cls, train: Train, batches: RowSource, world: int, peak: float) -> Course:
        length = batches.sequence_length
        layout = lay_out(len(batches), batches.rows_per_step, length, train.batch_tokens or {},
                         train.sequence_length or {}, train.length)  # fmt: skip
        schedule = schedule_of(train.schedule, layout, peak)
        return cls(layout, schedule, _micro(train, layout, world, getattr(batches, "group", 1)), world)

    def micro_rows(self, step: int) -> int:
        """Rows of a micro-batch of a step, counted from 0: more where they are shorter."""
        return self.micro * (self.layout.length // self.layout.stage(step).length)

    def accumulation(self, step: int) -> int:
        """Micro-batches that a device computes in a step."""
        return self.layout.stage(step).units * self.layout.rows // (self.world * self.micro)


def rows_per_unit(train: Train, length: int) -> int | None:
    """With how many rows a step a source of rows is to be opened; None: as it says itself."""
    return unit_rows(train.batch_tokens, length) if train.batch_tokens else None


def _micro(train: Train, layout: Layout, world: int, group: int) -> int:
    """Rows of a micro-batch; `group` of them belong together."""
    for stage in layout.taken:
        rows = stage.units * layout.rows
        if layout.rows % (world * group):
            raise ConfigError(f"a batch of {rows} rows cannot be divided among {world} processes",
                              hint="choose another train.batch_tokens, or other processes")  # fmt: skip
        if train.micro_batch and ((rows // world) % train.micro_batch or train.micro_batch % group):
            fitting = [n for n in range(group, rows // world + 1, group) if (rows // world) % n == 0]
            pairs = ", and pairs stay together" if group == 2 else ""
            what = f"a device's {rows // world} rows of a batch are no whole number of micro-batches of "
            raise ConfigError(
                f"{what}{train.micro_batch}{pairs}", hint=f"train.micro_batch: {', '.join(map(str, fitting))}"
            )
    if train.micro_batch:
        return train.micro_batch
    mine = layout.rows // world
    fitting = [n for n in range(group, mine + 1, group) if mine % n == 0]
    return max(n for n in fitting if n == group or n * layout.length <= MICRO_TOKENS)


def schedule_of(wanted: Wanted, layout: Layout, peak: float) -> Schedule:
    """The learning rates of a run."""

    def whole(amount: Amount) -> int:
        return amount.steps(layout.steps_of, layout.steps)

    warmup, total = whole(wanted.warmup), layout.steps if wanted.length is None else whole(wanted.length)
    decays = {"wsd": whole(wanted.decay), "constant": 0, INVERSE_SQRT: 0}
    shapes = {"wsd": wanted.decay_shape, INVERSE_SQRT: INVERSE_SQRT, "cosine": "cosine"}
    decay = decays.get(wanted.name, max(0, total - warmup))
    if warmup + decay > total:
        hint = "both lie within the run; if it is but the begin of one, train.schedule.length says where that ends"
        raise ConfigError(f"train.schedule: warm-up of {warmup} and decay of {decay} steps in {total}", hint=hint)
    return Schedule(
        peak=peak,
        steps=total,
        warmup=warmup,
        start=wanted.warmup_from.of(peak),
        decay=decay,
        shape=shapes.get(wanted.name, "linear"),
        final=wanted.final_lr.of(peak),
        count_warmup_from=wanted.count_warmup_from,
        count_decay_from=wanted.count_decay_from,
        offset=wanted.offset,
    )
