"""One step, from its lock to its record.

    record = carry_out(step, records, context)      # its record, "done"; raises StepFailed if it is not

Killed at any point it leaves one of three things: no record of this key, and the step is run; a record that says
"running" beside an output of a command that writes whole or not at all, which is then complete; or one beside something
else, with which the command goes on if it can (midtrain), and which is made anew if not.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from surgery.containers.yaml_writer import to_yaml
from surgery.errors import SurgeryError
from surgery.jobs.digests import Digests
from surgery.jobs.expand import OUT
from surgery.jobs.keys import Records, judge, outputs_of
from surgery.jobs.lock import held
from surgery.jobs.names import Thing
from surgery.jobs.outputs import is_complete, make_way, partials, publish, remove
from surgery.jobs.process import Children, arguments, as_typed, environment, last_line
from surgery.jobs.record import Record, begun, write_record
from surgery.jobs.step import Step, absolute, near, near_path
from surgery.writing.atomic import atomic_file
from surgery.writing.interrupt import Requeue

TAIL = 5  # lines of a log that a failure shows


class StepFailed(SurgeryError):
    """A step did not end well; `record` says how, `status` is the exit status: Requeue's if it was only stopped."""

    def __init__(self, what: str, record: Record, hint: str) -> None:
        super().__init__(what, hint=hint)
        self.record = record
        self.status = Requeue.status if record.state == "stopped" else 1


@dataclass(frozen=True)
class Context:
    """What all steps of a run share.

    tell    hears what a step waits for, and what becomes of old outputs      begin   hears whose command begins
    again   ids of steps that are run though they are done
    """

    digests: Digests
    children: Children
    tell: Callable[[str, str], None] = lambda step, text: None
    begin: Callable[[str], None] = lambda step: None
    again: frozenset[str] = frozenset()


def carry_out(step: Step, records: Records, context: Context) -> tuple[Record, bool]:
    """Do a step unless it is done: its record, and whether anything was done."""

    def waiting(who: str) -> None:
        context.tell(step.id, f"waiting for {who}")
        if context.children.stopped:
            raise StepFailed(f"step {step.id} was not begun", Record("stopped", {}), "run it again to go on")

    verdict = judge(step, records, context.digests)
    if verdict.done and verdict.record and step.id not in context.again:
        return verdict.record, False
    with held(step.file(".lock"), waiting) as lock:
        verdict = judge(step, records, context.digests)  # another run may have done it meanwhile
        assert verdict.parts is not None, verdict.why
        if verdict.done and verdict.record and step.id not in context.again:
            return verdict.record, False
        if verdict.record and is_complete(step, verdict.record, verdict.parts):
            return finished(step, verdict.record, context.digests), True
        make_way(step, verdict, context.digests, lambda text: context.tell(step.id, text))
        record = begun(verdict.parts, as_typed(step, near))
        write_record(step, record)
        return finished(step, _run(step, record, lock, context), context.digests), True


def finished(step: Step, record: Record, digests: Digests) -> Record:
    """The record of a step whose outputs are there, written.  Raises FileError if one is not."""
    outputs, size = outputs_of(step, record.parts, digests)
    record = replace(record, state="done", outputs=outputs, bytes=size, says=last_line(step.file(".log")))
    write_record(step, record)
    return record


def _run(step: Step, record: Record, lock: int, context: Context) -> Record:
    """Run the command; its record so far.  Raises StepFailed."""
    began, log, partial = time.monotonic(), step.file(".log"), partials(step)
    log.write_text(f"$ {record.command}\n")
    context.begin(step.id)
    if (config := step.config(absolute)) is not None:
        with atomic_file(step.file(".yaml")) as file:
            file.write(to_yaml(config))
    for path in partial.values():
        remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)

    def shown(thing: Thing) -> str:
        return next((near_path(p) for n, p in partial.items() if step.outputs[n] == thing), near(thing))

    with open(partial[OUT], "wb") if step.spec.stdout else nullcontext() as stdout:
        code = context.children.run(arguments(step, shown), log, stdout, lock, environment(step))
    record = replace(record, exit=code, seconds=round(time.monotonic() - began, 3), says=last_line(log))
    missing = [t for n, t in step.outputs.items() if not os.path.lexists(partial.get(n, t.path))]
    if code or missing:
        raise _failed(step, record, missing, bool(context.children.stopped))
    for name, path in partial.items():
        publish(path, step.outputs[name].path)
    return record


def _failed(step: Step, record: Record, missing: Sequence[Thing], stopped: bool) -> StepFailed:
    """What is raised, after it is recorded."""
    record = replace(record, state="stopped" if stopped or record.exit == Requeue.status else "failed")
    write_record(step, record)
    code = record.exit or 0
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    what = f"step {step.id} {ended}" if code else f"step {step.id} ended well, but {missing[0].path} is not there"
    log = step.file(".log")
    lines = log.read_text(errors="replace").splitlines()[1:][-TAIL:]
    text = "\n".join(f"    {line}" for line in lines)
    mend = "" if record.state == "stopped" else "mend it, and "
    hint = f"what is done stays done: {mend}run the same command again"
    return StepFailed(f"{what}\n  {near_path(log)} ends with\n{text}", record, hint)
