"""Peak memory (VmHWM), free memory, and a pool that reuses large buffers.

keep_blocks(1 << 30)
data = buffer(2 << 20)
peak = Peak()
...
peak.bytes()        # how far the process grew above what it occupied when `peak` was made
"""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STATUS, CLEAR, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc, malloc.h
BLOCK, FREE = 8 << 20, 256 << 20  # bytes


def keep_blocks(memory: int) -> None:
    """Have glibc keep freed memory for the next block, as far as a budget has room for that, instead of giving it back.

    With a large one, blocks up to 8 MiB come from memory that is there, and up to 256 MiB of it stay.  By default every
    block is mapped anew, or trimmed away when it is freed, and the page faults of its first use take several times as
    long as what is done with it.  All threads share what is freed: by default each has memory of its own, which keeps
    what the thread needed at the most.  Process-wide.  Where there is no glibc, nothing changes.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, min(BLOCK, memory // 64))
        libc.mallopt(M_TRIM_THRESHOLD, min(FREE, memory // 8))
        libc.mallopt(M_ARENA_MAX, 1)
    global _kept
    _kept = min(KEPT, memory // 8)


def free_memory() -> int | None:
    """Bytes that the machine can give; None where the system does not tell."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


@contextmanager
def settled() -> Iterator[None]:
    """Have the garbage collector leave alone what there is already.

    torch and transformers are some hundred thousand objects; while it looks through them, all threads wait.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


POOLED, ROUNDED, KEPT = 256 << 10, 256 << 10, 128 << 20  # bytes: of the least buffer that is pooled, of a step, of all
_pool: defaultdict[int, list[Any]] = defaultdict(list)
_pooled, _kept = 0, KEPT
_lock = threading.RLock()  # a buffer may be given back while this thread asks for one, by garbage collection


def buffer(size: int) -> Any:
    """`size` bytes to be filled, as a numpy array.  When nobody refers to them any more, they serve again.

    malloc would cut small, lasting pieces from what was freed, so that the next block does not fit there: with blocks
    of one size in several threads, a process grew by up to a fifth of all that passed through it.
    """
    import numpy as np

    global _pooled
    if size < POOLED:
        return np.empty(size, np.uint8)
    rounded = -(-size // ROUNDED) * ROUNDED
    with _lock:
        memory: Any = _pool[rounded].pop() if _pool[rounded] else None
        _pooled -= rounded if memory is not None else 0
    memory = np.empty(rounded, np.uint8) if memory is None else memory
    out = np.frombuffer(memoryview(memory), np.uint8, size)  # of memory[:size] a view would refer to memory alone
    weakref.finalize(out, _give_back, memory).atexit = False
    return out


def _give_back(memory: Any) -> None:
    global _pooled
    with _lock:
        if _pooled + len(memory) <= _kept:
            _pool[len(memory)].append(memory)
            _pooled += len(memory)


class Peak:
    """Measures from now on.  Where the kernel cannot start afresh, growth below an older peak goes unseen."""

    def __init__(self) -> None:
        with suppress(OSError):
            CLEAR.write_text("5")  # Linux: the high-water mark becomes what is resident now
        self.start = _status("VmRSS") or _most_resident()

    def bytes(self) -> int:
        return max(0, high_water() - self.start)


def high_water() -> int:
    """The most bytes that this process has held.  On Linux `ru_maxrss` would begin at what the parent held."""
    return _status("VmHWM") or _most_resident()


def _status(key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
