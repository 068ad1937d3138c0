"""Memory: how much a piece of work needed, measured by the kernel, and how to use the same again.

keep_blocks()
peak = Peak()
...
peak.bytes()        # how far the process grew above what it occupied when `peak` was made
"""

from __future__ import annotations

import ctypes
import functools
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
BLOCK, FREE = 8 << 20, 256 << 20  # bytes


@functools.cache
def keep_blocks() -> None:
    """Have glibc keep freed memory for the next block, instead of giving it back and asking for it again.

    Blocks up to 8 MiB then come from memory that is there, and up to 256 MiB of it stay.  By default every block is
    mapped anew, or trimmed away when it is freed, and the page faults of its first use take several times as long as
    what is done with it.  It holds for the process.  Where there is no glibc, nothing changes.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, FREE)


class Peak:
    """Measures from now on.  Where the kernel cannot start afresh, growth below an older peak goes unseen."""

    def __init__(self) -> None:
        with suppress(OSError):
            CLEAR.write_text("5")  # Linux: the high-water mark becomes what is resident now
        self.start = _status("VmRSS") or _high_water()

    def bytes(self) -> int:
        return max(0, (_status("VmHWM") or _high_water()) - self.start)


def _status(key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
