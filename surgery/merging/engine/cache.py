"""Cache of what was read of a tensor's sources for its statistics, kept until it is merged: every byte is read once.

cache = SourceCache(budget=64 << 20)
cache.put(inputs, 0, bits)                   # [sources, n]: the first n elements
cache.take(inputs, 0, n, last=True)          # [bits]; nobody will ask for them again
"""

from __future__ import annotations

import threading
from typing import Any


class SourceCache:
    """Chunks of tensors, up to `budget` bytes.  When there is no room for one, the oldest are let go.

    Threads may use it at once.  What it gives may be read only.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._chunks: dict[tuple[object, int], Any] = {}  # (whose, first element) -> [sources, elements], oldest first
        self._lock = threading.Lock()

    def put(self, whose: object, start: int, bits: Any) -> None:
        with self._lock:
            self._drop((whose, start))
            self._chunks[whose, start] = bits
            self.nbytes += bits.nbytes
            while self.nbytes > self.budget:
                self._drop(next(iter(self._chunks)))

    def take(self, whose: object, start: int, stop: int, last: bool) -> list[Any]:
        """Elements [start, stop) of all sources, in one part or in several; none if not all of them are here.

        last: what ends at `stop` or before is let go.
        """
        with self._lock:
            own = sorted((first, bits.shape[1]) for (of, first), bits in self._chunks.items() if of is whose)
            parts, at, gone = [], start, []
            for first, count in own:
                if first <= at < min(first + count, stop):
                    parts.append(self._chunks[whose, first][:, at - first : stop - first])
                    at = min(first + count, stop)
                    if at == first + count:
                        gone.append((whose, first))
            if at < stop:
                return []
            for key in gone if last else ():
                self._drop(key)
            return parts

    def _drop(self, key: tuple[object, int]) -> None:
        if key in self._chunks:
            self.nbytes -= self._chunks.pop(key).nbytes
