"""What a run would do: which steps, why, and how much they write, as far as that can be said before.

    for line in forecast(steps, wanted):
        print(line.step.id, line.runs, line.why, line.bytes, line.seconds)

Bytes are those of the command's own plan, where all that it reads is there, else those of the step's last run, as are
the seconds.  Nothing is written.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import FileError
from surgery.jobs.digests import Digests
from surgery.jobs.keys import Verdict, judge
from surgery.jobs.outputs import command_of
from surgery.jobs.process import arguments, as_typed, environment
from surgery.jobs.record import Record, read_record
from surgery.jobs.run import MEMORY, with_needs
from surgery.jobs.step import Step, near
from surgery.storage.address import spelled

PLANS = {"convert", "soup", "upcycle", "experts"}  # commands whose --dry-run --json says `bytes`


@dataclass(frozen=True)
class Line:
    """A step: whether it would be run, why, its command; bytes that it would write, seconds that it took before."""

    step: Step
    runs: bool
    why: str
    command: str
    bytes: int | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step.id, "runs": self.runs, "why": self.why, "command": self.command, "bytes": self.bytes,
                "seconds": self.seconds, "needs": list(self.step.needs),
                "reads": {t.label: spelled(t.path) for t in self.step.inputs},
                "outputs": {n: str(t.path) for n, t in self.step.outputs.items()}}  # fmt: skip


def forecast(steps: Sequence[Step], wanted: Sequence[Step], again: bool = False) -> Iterator[Line]:
    """A line for each wanted step, in order."""
    digests, records = Digests(steps[0].files / MEMORY), dict[str, Record]()
    ids = {step.id for step in wanted}
    for step in with_needs(steps, wanted):
        try:
            verdict = judge(step, records, digests)
        except FileError as error:
            verdict = Verdict(False, f"{error.file} {error.what}", read_record(step))
        runs = not verdict.done or (again and step.id in ids)
        if verdict.record and not runs:
            records[step.id] = verdict.record
        if step.id in ids:
            yield _line(step, verdict, runs)


def _line(step: Step, verdict: Verdict, runs: bool) -> Line:
    record, why = verdict.record, verdict.why or ("asked for again" if runs else "unchanged")
    known = record if record and record.state == "done" else None
    nbytes = known.bytes if known else None
    if runs and verdict.parts is not None and command_of(step) in PLANS and step.spec.config is None:
        nbytes = planned_bytes(step) or nbytes
    return Line(step, runs, why, as_typed(step, near), nbytes, known.seconds if known else None)


def planned_bytes(step: Step) -> int | None:
    """What the plan of the command itself says; None if it makes none."""
    words = [*arguments(step, near), "--dry-run", "--force", "--json"]
    done = subprocess.run(words, capture_output=True, env=environment(step), stdin=subprocess.DEVNULL, check=False)
    try:
        return int(json.loads(done.stdout)["bytes"]) if done.returncode == 0 else None
    except (ValueError, KeyError, TypeError):
        return None
