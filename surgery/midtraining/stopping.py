"""Signals that a scheduler or a person sends: the run ends behind the step at hand, when its checkpoint is on the disk.

with stops(world) as came:
    ...                                   # came: the signals so far; SIGTERM, SIGUSR1 and SIGINT are noted
    raise Requeue(signal.SIGTERM, folder)     # exit status 75: its checkpoint is on the disk
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.midtraining.parallel import World  # and torch, which those that start processes do without

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def stops(world: World) -> Iterator[list[int]]:
    """A list that the signals are put into, however many come.

    Where there is one process, a second SIGINT ends it at once; torchrun sends its processes a second one anyway.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and came and world.size == 1:
            raise KeyboardInterrupt
        came.append(signum)

    before = {s: signal.signal(s, note) for s in SIGNALS}
    try:
        yield came
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
