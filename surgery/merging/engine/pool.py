"""What all tensors of a merge share: threads, memory, what was read of the sources, the compiled loops.

engine = Engine(threads=2, memory=256 << 20, loops=compiled_loops())
engine.map(len, ["a", "bc"])             # [1, 2], in as many threads as there are
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from surgery.merging.engine.cache import SourceCache
from surgery.writing.ahead import alone

T = TypeVar("T")
KEPT = 64 << 20  # bytes of what methods know of whole tensors that are kept
SMALL = 1 << 16  # bytes of such knowledge that is always kept
NAME = "surgery-merge"  # of the threads


class Sized(Protocol):
    """Something that says how many bytes it occupies."""

    @property
    def nbytes(self) -> int: ...


Knowledge = TypeVar("Knowledge", bound=Sized)


class Engine:
    """Threads to compute in, and what is known of the tensors that are being merged.

    loops  the compiled loops, see `compiled_loops`; None: everything is computed by torch
    cache  what was read of tensors that are about to be merged, up to a quarter of `memory`
    """

    def __init__(self, threads: int = 1, memory: int = 1 << 30, loops: Any = None) -> None:
        self.threads, self.memory, self.loops = max(1, threads), memory, loops
        self.cache = SourceCache(memory // 4)
        self._local = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._known: OrderedDict[int, tuple[Any, object]] = OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        """As it was made: another process has threads, memory and loops of its own."""
        return _engine, (self.threads, self.memory, self.loops is not None)

    def map(self, fn: Callable[[Any], T], items: Sequence[Any], need: int = 0) -> list[T]:
        """`fn` of every item, in their order; in this thread if it is one of the pool's.

        `need` is how many bytes one call takes: only so many run at once as fit into a third of the memory.
        """
        at_once = min(self.threads, max(1, self.memory // 3 // need)) if need else self.threads
        if at_once == 1 or len(items) < 2 or threading.current_thread().name.startswith(NAME):
            return [fn(item) for item in items]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, NAME, initializer=alone)
        gate = threading.Semaphore(at_once)

        def guarded(item: Any) -> T:
            with gate:
                return fn(item)

        return list(self._pool.map(guarded, items))

    def known(self, key: object, make: Callable[[], Knowledge]) -> Knowledge:
        """`make()`, remembered: all small results, and the last large ones."""
        with self._lock:
            if id(key) in self._known:
                self._known.move_to_end(id(key))
                found: Knowledge = self._known[id(key)][0]
                return found
            made = make()
            self._known[id(key)] = made, key
            large = [k for k, (known, _) in self._known.items() if known.nbytes > SMALL]
            total = sum(self._known[k][0].nbytes for k in large)
            for k in large[:-1]:
                if total > min(KEPT, self.memory // 8):
                    total -= self._known.pop(k)[0].nbytes
            return made

    def scratch(self, use: str, count: int, itemsize: int) -> Any:
        """Integers of a thread for one use: overwritten when it asks for that use again.

        Large buffers that are freed and asked for again, with small ones between them, make the process grow.
        """
        import numpy as np

        held: dict[str, Any] = self._local.__dict__
        if use not in held or held[use].nbytes < count * itemsize:
            held[use] = np.empty(count * itemsize, np.uint8)
        return held[use][: count * itemsize].view(f"u{itemsize}")

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _engine(threads: int, memory: int, compiled: bool) -> Engine:
    return Engine(threads, memory, compiled_loops() if compiled else None)


@functools.cache
def compiled_loops() -> Any:
    """The module of compiled loops, `surgery.merging.engine.kernels`: the only place that asks for it.

    None if numba is not installed, is too old or too new for numpy or Python, or is told to compile nothing.
    """
    try:
        import numba
        import numpy as np

        from surgery.merging.engine import kernels
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:
        return None
    kernels.splitmix64(np.uint64(0), np.uint64(0))  # starts the compiler: half a second, 60 MB
    return kernels
