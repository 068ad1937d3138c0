"""Where the seconds of a step go.

clock = Clock()
...
clock.lap("data")
clock.times()              # {"seconds": 0.31, "parts": {"data": 0.001, "compute": 0.29, "optimizer": 0.02}}
"""

from __future__ import annotations

import time
from typing import Any


class Clock:
    """Starts when it is made; a lap goes from the end of the last one."""

    def __init__(self) -> None:
        self.begun = self.last = time.perf_counter()
        self.parts: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[name] = self.parts.get(name, 0.0) + now - self.last
        self.last = now

    def times(self) -> dict[str, Any]:
        """What lies behind the last lap is not counted."""
        return {"seconds": self.last - self.begun, "parts": dict(self.parts)}
