"""Run the steps of a recipe: what is done is left alone, what is not is done in order, several at a time if asked.

    steps = graph_of(read_recipe("recipe.yaml"))
    board = run(steps, chosen(steps, only=["train"]), jobs=2, view=lambda board: print(board["train-42"].state))
    board.failure                               # None, or the StepFailed that stopped it

A step that fails lets those that are running end, and none begin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError, UsageError, suggest
from surgery.jobs.carry_out import Context, StepFailed, carry_out, finished
from surgery.jobs.digests import Digests
from surgery.jobs.keys import judge
from surgery.jobs.lock import held
from surgery.jobs.process import Children
from surgery.jobs.record import Record, begun
from surgery.jobs.step import Step
from surgery.writing.interrupt import Requeue, signals

TICK = 0.2  # seconds between two looks at signals and at the view
MEMORY = "digests.json"
DONE = ("done", "unchanged")


@dataclass
class Status:
    """How far a step is: waiting, running, done, unchanged, failed, stopped; `says` what it printed or waits for."""

    step: Step
    state: str = "waiting"
    says: str = ""
    began: float = 0.0
    seconds: float = 0.0
    bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        outputs = {name: str(thing.path) for name, thing in self.step.outputs.items()}
        return {"step": self.step.id, "state": self.state, "says": self.says, "seconds": self.seconds,
                "bytes": self.bytes, "outputs": outputs, "log": str(self.step.file(".log"))}  # fmt: skip


@dataclass
class Board:
    """The status of every step that a run is about, by its id; `failure` is the first one."""

    folder: Path
    steps: dict[str, Status]
    failure: SurgeryError | None = None
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, step: str) -> Status:
        return self.steps[step]

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "steps": [s.to_json() for s in self.steps.values()], "notes": self.notes}


View = Callable[[Board], None]


def chosen(steps: Sequence[Step], only: Collection[str] = (), start: Collection[str] = ()) -> list[Step]:
    """Steps by name or id: those of `only`, those of `start` with all that come after them; all if none is named.

    Raises UsageError for a name that there is not.
    """
    names = {name for step in steps for name in (step.name, step.id)}
    for name in (*only, *start):
        if name not in names:
            raise UsageError(f"there is no step {name}", hint=suggest(name, sorted(names), "steps"))
    if not only and not start:
        return list(steps)
    after: set[str] = set()
    for step in steps:  # in their order, so what they need was seen before
        if {step.name, step.id} & {*start} or after & {*step.needs}:
            after.add(step.id)
    return [step for step in steps if step.id in after or {step.name, step.id} & {*only}]


def with_needs(steps: Sequence[Step], wanted: Sequence[Step]) -> list[Step]:
    """The wanted steps and all that come before them, in order."""
    needed = {step.id for step in wanted}
    for step in reversed(steps):
        if step.id in needed:
            needed |= {*step.needs}
    return [step for step in steps if step.id in needed]


def run(
    steps: Sequence[Step],
    wanted: Sequence[Step],
    *,
    jobs: int = 1,
    again: bool = False,
    view: View = lambda board: None,
) -> Board:
    """Do the wanted steps of a recipe that are not done.

    jobs    how many at a time        again   do them though they are done        view   is shown the board now and then

    Raises UsageError if a step that is not wanted would have to be done before; Requeue if SIGINT or SIGTERM left
    something undone.
    What fails is in the board.
    """
    folder = steps[0].files.parent
    about, ids = with_needs(steps, wanted), {step.id for step in wanted}
    board = Board(folder, {step.id: Status(step) for step in about if step.id in ids})
    digests, children = Digests(steps[0].files / MEMORY, board.notes.append), Children()
    records = _done_before([step for step in about if step.id not in ids], digests)

    def tell(step: str, text: str) -> None:
        if board[step].says != text:
            board[step].says = text
            board.notes.append(f"{step}: {text}")

    def begin(step: str) -> None:
        board[step].state, board[step].began = "running", time.monotonic()

    context = Context(digests, children, tell, begin, frozenset(ids if again else ()))
    waiting = list(board.steps.values())
    running: dict[Future[tuple[Record, bool]], Status] = {}
    with signals() as came, ThreadPoolExecutor(jobs, "surgery-step") as pool, _outlived_by_none(children):
        while True:
            for status in [s for s in waiting if all(need in records for need in s.step.needs)]:
                if len(running) < jobs and not board.failure and not came:
                    waiting.remove(status)
                    running[pool.submit(carry_out, status.step, dict(records), context)] = status
            if not running:
                break
            ended, _ = wait(running, TICK, FIRST_COMPLETED)
            if came and not children.stopped:
                children.stop()
            for future in ended:
                _end(running.pop(future), future, records, board)
            digests.save()
            view(board)
    if came and any(status.state not in DONE for status in board.steps.values()):
        raise Requeue(came[0], folder)
    return board


@contextmanager
def _outlived_by_none(children: Children) -> Iterator[None]:
    """Whatever else ends this process: let no command outlive it."""
    try:
        yield
    except BaseException:
        children.stop()
        raise


def accept(steps: Sequence[Step], wanted: Sequence[Step]) -> Board:
    """Take the outputs that are there for those of the wanted steps, whoever made them, and record it.

    Raises UsageError if a step before them is not done, FileError if an output is missing.
    """
    about, ids = with_needs(steps, wanted), {step.id for step in wanted}
    digests = Digests(steps[0].files / MEMORY)
    records = _done_before([step for step in about if step.id not in ids], digests)
    board = Board(steps[0].files.parent, {})
    for step in (step for step in about if step.id in ids):
        with held(step.file(".lock"), _in_use):
            verdict = judge(step, records, digests)
            assert verdict.parts is not None, verdict.why
            record = verdict.record if verdict.done and verdict.record else None
            record = record or finished(step, begun(verdict.parts, "accepted as it was"), digests)
        records[step.id] = record
        board.steps[step.id] = Status(
            step, "unchanged" if verdict.done else "accepted", record.says, bytes=record.bytes
        )
    digests.save()
    return board


def _in_use(who: str) -> None:
    raise UsageError(f"the step is being run by {who}", hint="wait for it to end")


def _done_before(steps: Sequence[Step], digests: Digests) -> dict[str, Record]:
    """The records of steps that the wanted ones need.  Raises UsageError if one is not done."""
    records: dict[str, Record] = {}
    for step in steps:
        verdict = judge(step, records, digests)
        if not verdict.done or verdict.record is None:
            raise UsageError(f"step {step.id} comes before and is not done: {verdict.why}", hint="run it first, or all")
        records[step.id] = verdict.record
    return records


def _end(status: Status, future: Future[tuple[Record, bool]], records: dict[str, Record], board: Board) -> None:
    """Put down how a step ended.  Raises what is a mistake of ours."""
    try:
        record, new = future.result()
    except StepFailed as error:
        record, status.state = error.record, error.record.state
        board.failure = board.failure or error
    except SurgeryError as error:
        status.state, status.says = "failed", error.what
        board.failure = board.failure or error
        return
    else:
        status.state = "done" if new else "unchanged"
        records[status.step.id] = record
    status.says, status.seconds, status.bytes = record.says, record.seconds, record.bytes
