"""SIGINT and SIGTERM, noted while long work goes on, so that it stops where it can be resumed.

with signals() as came:
    for step in steps:
        step()
        if came:
            raise Interrupted(came[0], dst)
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from surgery.errors import SurgeryError


class Interrupted(SurgeryError):
    """SIGINT or SIGTERM came; what is written so far is kept.  `signum` is the signal."""

    def __init__(self, signum: int, dst: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}", file=dst, hint="run the same command again to go on from here"
        )
        self.signum = signum


class Requeue(Interrupted):
    """A signal ended what goes on when it is repeated; `status` is the exit status.

    75 is EX_TEMPFAIL of sysexits.h: run the same command again.  A scheduler can requeue on it and on nothing else.
    """

    status = 75


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM is put into.  A second signal does what it did before."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    before = {s: handler for s, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for s, handler in before.items():
            signal.signal(s, handler)

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        restore()

    for s in before:
        signal.signal(s, note)
    try:
        yield came
    finally:
        restore()
