"""What `surgery run` shows: a live table on a terminal, a line for each step elsewhere, or all that the commands print.

with table() as view:
    run(steps, wanted, view=view)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from surgery.cli.terminal import say
from surgery.jobs.process import last_line
from surgery.jobs.run import Board, Status, View
from surgery.jobs.step import near_path
from surgery.units import human

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.jobs.forecast import Line
    from surgery.jobs.queue import Line as Job

COLOURS = {"running": "cyan", "done": "green", "unchanged": "dim", "failed": "red", "stopped": "yellow"}


@contextmanager
def silent() -> Iterator[View]:
    yield lambda board: None


@contextmanager
def table() -> Iterator[View]:
    """A table of all steps that changes as they go on, and stays when they have ended."""
    from rich.live import Live

    from surgery.cli.console import console

    with Live(console=console(), auto_refresh=False) as live:
        yield lambda board: live.update(_table(board), refresh=True)


def _table(board: Board) -> Table:
    from rich.table import Table
    from rich.text import Text

    out = Table(box=None, padding=(0, 2, 0, 0), caption="\n".join(board.notes) or None, caption_justify="left")
    for name in ("step", "", "time", ""):
        out.add_column(name, no_wrap=True, justify="right" if name == "time" else "left", overflow="ellipsis")
    for step, status in board.steps.items():
        style = COLOURS.get(status.state, "")
        out.add_row(step, Text(status.state, style=style), took(status), Text(said(status), style="dim"))
    return out


def said(status: Status) -> str:
    """What a step printed last, or waits for."""
    return status.says or (last_line(status.step.file(".log")) if status.state == "running" else "")


def took(status: Status) -> str:
    seconds = time.monotonic() - status.began if status.state == "running" else status.seconds
    return spell(seconds) if status.state not in ("waiting", "unchanged") else ""


def spell(seconds: float) -> str:
    """12 s, 3:05, 2:07:33."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


@contextmanager
def lines() -> Iterator[View]:
    """A line when a step begins and one when it has ended."""
    shown: dict[str, str] = {}
    notes: list[str] = []

    def view(board: Board) -> None:
        for note in board.notes[len(notes) :]:
            say(f"note: {note}")
            notes.append(note)
        for step, status in board.steps.items():
            if shown.get(step, "waiting") != status.state:
                shown[step] = status.state
                say(_line(step, status))

    yield view


def _line(step: str, status: Status) -> str:
    if status.state in ("running", "unchanged"):
        return f"{step}: {status.state}"
    return f"{step}: {status.state} in {spell(status.seconds)}" + (f": {status.says}" if status.says else "")


@contextmanager
def followed() -> Iterator[View]:
    """The title and the command of each step, and all that it prints, while it does."""
    shown: dict[str, int] = {}  # step -> bytes of its log

    def view(board: Board) -> None:
        for step, status in board.steps.items():
            if status.state == "waiting":
                continue
            if step not in shown:
                shown[step] = 0
                ending = " (unchanged)" if status.state == "unchanged" else ""
                say(f"\n{len(shown)}. {status.step.title or step}{ending}", bold=True)
            _more(status, shown)

    yield view


def _more(status: Status, shown: dict[str, int]) -> None:
    """Print what is new in a step's log."""
    log = status.step.file(".log")
    if not log.exists():
        return
    with open(log, "rb") as file:
        file.seek(shown[status.step.id])
        new = file.read()
    if status.state == "running":
        new = new[: new.rfind(b"\n") + 1]
    shown[status.step.id] += len(new)
    say(new.decode(errors="replace"), nl=False)


def jobs(found: Sequence[Job]) -> None:
    """`surgery launch status`."""
    from rich.table import Table
    from rich.text import Text

    from surgery.cli.console import console

    out = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("step", "", "job", "queue", "time", ""):
        out.add_column(name, no_wrap=True, overflow="ellipsis")
    for line in found:
        state = Text(line.state, style=COLOURS.get(line.state.split(",")[0], ""))
        out.add_row(
            line.step, state, line.job, line.queue, spell(line.seconds) if line.seconds else "", Text(line.says)
        )
    console().print(out)


def forecast(found: Sequence[Line]) -> None:
    """`surgery run --dry-run`."""
    from rich.table import Table
    from rich.text import Text

    from surgery.cli.console import console

    out = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("step", "", "why", "writes", "takes"):
        out.add_column(name, no_wrap=name != "why", justify="right" if name in ("writes", "takes") else "left")
    for line in found:
        verb = Text("run" if line.runs else "skip", style="cyan" if line.runs else "dim")
        writes = human(line.bytes) if line.bytes else ""
        out.add_row(line.step.id, verb, line.why, writes, spell(line.seconds) if line.seconds else "")
    console().print(out)
    run = sum(line.runs for line in found)
    say(f"{run} of {len(found)} steps would be run, in {near_path(found[0].step.files.parent)}")
    for line in found:
        if line.runs:
            say(f"  {line.command}")
