"""Blocks made by a few threads, taken in their order: reading goes on while what was read is written.

with ahead(makers) as blocks:         # functions without arguments
    for block in blocks:
        ...
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from surgery.tensors.memory import settled

T = TypeVar("T")
READERS = 4  # threads that make blocks, on a machine of that many cores
SPARE = 2  # blocks that are made besides one per thread, so that none waits for the writing


@contextmanager
def ahead(makers: Iterable[Callable[[], T]], threads: int | None = None) -> Iterator[Iterator[T]]:
    """What `makers` make, in their order, made in `threads` threads, not more than SPARE further ahead than one each.

    What making one raises is raised when it is its turn.
    """
    count = threads or min(READERS, cores())
    rest, made = iter(makers), deque[Future[T]]()

    def take(pool: ThreadPoolExecutor) -> Iterator[T]:
        made.extend(pool.submit(make) for make in itertools.islice(rest, count + SPARE))
        while made:
            item = made.popleft().result()
            made.extend(pool.submit(make) for make in itertools.islice(rest, 1))
            yield item

    with _one_thread(), settled(), ThreadPoolExecutor(count, "surgery-read", initializer=alone) as pool:
        try:
            yield take(pool)
        finally:
            for future in made:
                future.cancel()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def alone() -> None:
    """For a thread of a pool: torch is to compute in it alone.  Reductions are then in one order, too."""
    import torch

    torch.set_num_threads(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch without threads of its own: reading, writing and hashing run side by side already, and on a busy machine
    its threads wait for each other (moving 270 MB of small blocks took 8 times as long)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
