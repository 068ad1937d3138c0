"""What became of the jobs of a recipe: the scheduler's word for those it knows, and the steps' own records.

    for line in status(folder, steps):
        print(line.step, line.job, line.state, line.says)

Records are the truth; the scheduler only tells whether a step that is not done may still be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.jobs.launch import read_launched
from surgery.jobs.lock import is_held
from surgery.jobs.record import read_record
from surgery.jobs.schedulers import SCHEDULERS
from surgery.jobs.step import Step

GONE = {"", "finished", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


@dataclass(frozen=True)
class Line:
    """A step.

    state   done, failed, stopped, running, waiting, lost (its job is gone and left no word), cancelled (it never began)
    job     the id of its last job       queue    what the scheduler says of it, "" if it knows it no more
    says    the last line that it printed
    """

    step: str
    state: str
    job: str
    queue: str
    seconds: float
    says: str
    log: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def status(folder: Path, steps: Sequence[Step]) -> Iterator[Line]:
    """A line for each step that was launched, in their order.  Raises FileError, SchedulerError."""
    launched = read_launched(folder)
    jobs = {step: job for job in launched.jobs.values() for step in job.steps}
    states = SCHEDULERS[launched.scheduler].states([i for job in launched.jobs.values() for i in job.ids])
    for step in steps:
        if (job := jobs.get(step.id)) is None:
            continue
        queue = ", ".join(dict.fromkeys(states[i] for i in job.ids if i in states))
        record, log = read_record(step), step.file(".log")
        waits = bool({*queue.split(", ")} - GONE)
        state = record.state if record else "waiting" if waits else "cancelled"
        if state == "running" and not is_held(step.file(".lock")) and not waits:
            state = "lost"
        elif state in ("failed", "stopped") and waits:
            state = f"{state}, waiting"
        seconds = record.seconds if record else 0.0
        yield Line(
            step.id, state, job.ids[-1] if job.ids else "", queue, seconds, record.says if record else "", str(log)
        )
