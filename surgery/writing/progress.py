"""The progress bar of long work: bytes, rate and remaining time, on a terminal only.

with progress_bar("convert", total, quiet=False) as advance:
    advance(4096)

with progress_bars(quiet=False) as begin:
    write, prove = begin("write", total), begin("prove", None)      # a bar shows itself when it advances first
    write(4096)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def progress_bar(what: str, total: int, quiet: bool) -> Iterator[Advance]:
    """A bar with bytes, rate and remaining time on a terminal; nothing elsewhere."""
    with progress_bars(quiet) as begin:
        yield begin(what, total)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Callable[[str, int | None], Advance]]:
    """Bars for pieces of work that follow one another; one is seen at a time.  A total of None is not known."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, total: lambda n: None
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

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        shown: list[TaskID] = []

        def begin(what: str, total: int | None) -> Advance:
            task = bars.add_task(what, start=False, total=total, visible=False)

            def advance(n: int) -> None:
                if shown[-1:] != [task]:
                    for other in bars.task_ids:
                        bars.update(other, visible=other == task)
                    bars.start_task(task)
                    shown.append(task)
                bars.advance(task, n)

            return advance

        yield begin
