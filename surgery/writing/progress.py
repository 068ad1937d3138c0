"""The progress of long work: a bar with bytes, rate and remaining time; without a terminal, a line now and then.

with progress_bar("convert", total, quiet=False) as advance:
    advance(4096)

with progress_bars(quiet=False) as begin:
    write, prove = begin("write", total), begin("prove", None)      # a bar shows itself when it advances first
    write(4096)

with counting_bar("tokenize", total, ("documents", "tokens"), quiet=False) as advance:
    advance(4096, 3, 997)           # bytes, documents, tokens
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from surgery import units

LOG = logging.getLogger("surgery.progress")
PROGRESS = "progress"  # marks records of the logger that a terminal shows as bars
EVERY = 30.0  # seconds between two lines where there is no terminal
Counting = Callable[..., None]


class Advance(Protocol):
    """`n` more bytes are done; `text` replaces what the bar says."""

    def __call__(self, n: int, text: str | None = None, /) -> None: ...


@contextmanager
def progress_bar(what: str, total: int, quiet: bool) -> Iterator[Advance]:
    """A bar with bytes, rate and remaining time on a terminal; elsewhere a line every `EVERY` seconds."""
    with progress_bars(quiet) as begin:
        yield begin(what, total)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Callable[[str, int | None], Advance]]:
    """Bars for pieces of work that follow one another; one is seen at a time.  A total of None is not known.

    The logger `surgery.progress` is told as well, every `EVERY` seconds: a log file, and stderr if it is no terminal.
    """
    if quiet or not LOG.isEnabledFor(logging.INFO):
        yield lambda what, total: lambda n, text=None: None
        return
    if not sys.stderr.isatty():
        yield _Lines
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    numbers = (kind(table_column=Column(no_wrap=True)) for kind in (DownloadColumn, TransferSpeedColumn))
    columns = (TextColumn("{task.description}"), BarColumn(), *numbers, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        shown: list[TaskID] = []

        def begin(what: str, total: int | None) -> Advance:
            task, lines = bars.add_task(what, start=False, total=total, visible=False), _Lines(what, total)

            def advance(n: int, text: str | None = None, /) -> None:
                if shown[-1:] != [task]:
                    for other in bars.task_ids:
                        bars.update(other, visible=other == task)
                    bars.start_task(task)
                    shown.append(task)
                bars.update(task, advance=n, description=what if text is None else text)
                lines(n, text)

            return advance

        yield begin


@contextmanager
def counting_bar(what: str, total: int, counted: Sequence[str], quiet: bool) -> Iterator[Counting]:
    """A bar of bytes that also counts other things: `advance(bytes, n, ...)`, an n for each of `counted`.

    Without a terminal it is a line on stderr every `EVERY` seconds.  What the first call says was done before.
    """
    counts = [0] * len(counted)
    with progress_bars(quiet) as begin:
        bar = begin(what, total)

        def advance(size: int, *more: int) -> None:
            counts[:] = [a + b for a, b in zip(counts, more, strict=True)]
            named = ", ".join(f"{units.count(n)} {name}" for n, name in zip(counts, counted, strict=True))
            bar(size, f"{what} {named}")

        yield advance


class _Lines:
    """Lines in the place of a bar, to the logger.  What the first call says was done before."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.before: int | None = None
        self.begun = self.said = time.monotonic()

    def __call__(self, n: int, text: str | None = None, /) -> None:
        self.done += n
        self.before = self.done if self.before is None else self.before
        now = time.monotonic()
        if now - self.said < EVERY:
            return
        self.said, rate = now, (self.done - self.before) / (now - self.begun)
        share, left = units.human(self.done), ""
        if self.total:
            share = f"{self.done / self.total:.1%}"
            left = f", {max(0, self.total - self.done) / rate / 60:.0f} min left" if rate else ""
        _tell(f"{text or self.what}, {share}, {units.human(rate)}/s{left}")


def _tell(text: str) -> None:
    LOG.info("%s", text, extra={PROGRESS: True})


@contextmanager
def item_bars(quiet: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Bars that count other things than bytes, one below the other: `begin("answers", 960)(16)`.

    Without a terminal they are lines on stderr every `EVERY` seconds.
    """
    quiet = quiet or not LOG.isEnabledFor(logging.INFO)
    if quiet or not sys.stderr.isatty():
        yield lambda what, total: (lambda n: None) if quiet else _counted(what, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def begin(what: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(what, total=total)
            return lambda n: bars.advance(task, n)

        yield begin


def _counted(what: str, total: int) -> Callable[[int], None]:
    done, said = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        if time.monotonic() - said >= EVERY:
            said = time.monotonic()
            _tell(f"{what}: {done:,} of {total:,}")

    return advance
