"""A few things of many at a time, until one of them fails.

    together(lambda item, stop: send(item, stop), items, 4)     # the results, in the order of the items

What goes on when one fails ends at its next look at `stop`, and nothing more is begun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from surgery.errors import SurgeryError

T = TypeVar("T")
R = TypeVar("R")
Told = Callable[[int], None]  # of numbers of bytes


class Stopped(SurgeryError):
    """Another one failed, whose error is the one to tell, or the user stopped it."""


def together(work: Callable[[T, threading.Event], R], items: Sequence[T], most: int) -> list[R]:
    """What `work(item, stop)` returns of each, `most` at a time.  Raises what the first one raised that failed."""
    stop = threading.Event()

    def one(item: T) -> R:
        if stop.is_set():
            raise Stopped("stopped")
        try:
            return work(item, stop)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(most) as pool:
        waiting = [pool.submit(one, item) for item in items]
        try:
            wait(waiting)
        except BaseException:
            stop.set()
            raise
    errors = [error for future in waiting if (error := future.exception())]
    for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
        raise error
    return [future.result() for future in waiting]


def from_threads(told: Told) -> Told:
    """The same function, which several threads may call."""
    lock = threading.Lock()

    def advance(n: int) -> None:
        with lock:
            told(n)

    return advance
