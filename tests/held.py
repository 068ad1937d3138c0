"""How much memory a piece of work holds, beyond what its process held before: for scripts that tests run.

most_held(lambda: surgery.soup(recipe, "out", max_memory=budget))       # bytes
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


def held() -> int:
    """Bytes that are in memory and of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def most_held(work: Callable[[], object], start: int | None = None) -> int:
    """The most that is seen while it goes on, in bytes, looking every few milliseconds: beyond `start`, or what is held
    before."""
    start, peak, done = held() if start is None else start, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.004):
            peak = max(peak, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - start
