"""The memory that a piece of work needed, measured by the kernel, not estimated.

peak = Peak()
...
peak.bytes()        # how far the process grew above what it occupied when `peak` was made
"""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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
