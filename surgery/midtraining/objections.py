"""What stands against a run before any weight is read: rates of 0, ids or rows beyond the model, counters at their end.

check(job.course, batches, source)     # raises ConfigError with all of it; returns what is only to be told
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from surgery.data.rows import RowSource
from surgery.errors import ConfigError
from surgery.formats.base import Checkpoint
from surgery.midtraining.batching import rows_of
from surgery.midtraining.course import Course

STEPS = 16  # whose ids are compared with the vocabulary
FOREIGN = "they were made with another tokenizer"


def check(course: Course, batches: RowSource, source: Checkpoint) -> list[str]:
    """Notes on what is unusual.  Raises ConfigError if the run would be in vain, naming every reason."""
    longest, spec = max(stage.length for stage in course.layout.taken), source.spec
    found = [*_rates(course), *_vocabulary(course, batches, source)]
    if 0 < spec.learned_positions < longest:
        found.append(f"rows have {longest:,} tokens, and the model has {spec.learned_positions:,} learned positions: "
                     "plan shorter rows, or cut them by train.sequence_length")  # fmt: skip
    if found:
        raise ConfigError("\n  ".join(found))
    if spec.context and spec.context < longest:
        return [f"rows have {longest:,} tokens, more than the {spec.context:,} that the model was made for; what is "
                f"exported says {spec.context:,} as before"]  # fmt: skip
    return []


def wasted(course: Course) -> list[int]:
    """The first or the last step, where they change nothing because of how steps are counted: no surprise."""
    schedule = course.schedule
    first = schedule.count_warmup_from == 0 and schedule.warmup > 0 and not schedule.offset
    last = schedule.count_decay_from == 1 and schedule.decay > 0
    expected = ({1} if first else set()) | ({schedule.steps} if last else set())
    return sorted(expected & set(schedule.idle(course.layout.steps)))


def _rates(course: Course) -> Iterator[str]:
    schedule, steps = course.schedule, course.layout.steps
    if schedule.ended:
        yield (f"the schedule has {schedule.steps:,} steps and its counter (train.schedule.offset) stands at "
               f"{schedule.offset:,}: it is over, and every rate would be {schedule(1):g}")  # fmt: skip
        return
    idle = sorted(set(schedule.idle(steps)) - set(wasted(course)))
    if idle:
        yield (f"the learning rate is 0 in {spans(idle)} of {steps:,}, which would change nothing: "
               "train.schedule reaches 0 too early")  # fmt: skip


def _vocabulary(course: Course, batches: RowSource, source: Checkpoint) -> Iterator[str]:
    plan, size = getattr(batches, "plan", None), source.spec.vocab
    wanted = plan.file.vocab_size if plan else None
    if wanted and wanted > size:
        yield f"the data have a vocabulary of {wanted:,}, the model one of {size:,}: {FOREIGN}"
    elif (largest := largest_id(course, batches)) >= size:
        yield f"the data hold the id {largest:,}, and the model has {size:,} ids: {FOREIGN}"


def largest_id(course: Course, batches: RowSource, rank: int = 0, world: int = 1) -> int:
    """Of the tokens of some steps, evenly over the run."""
    layout = course.layout
    steps = sorted({round(i * (layout.steps - 1) / (STEPS - 1)) for i in range(STEPS)})
    return max(int(rows_of(batches, layout, step, rank, world).tokens.max()) for step in steps)


def spans(steps: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "steps 1 to 3, 7"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    said = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in runs[:4]]
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(said)}" + (" and others" if len(runs) > 4 else "")
