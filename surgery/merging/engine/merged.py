"""Merged tensors: lazy, computed block by block from the same blocks of their sources, in as many threads as wanted.

    inputs = Inputs("model.norm.weight", [a, b, base], 2, "float32", 0, Engine(threads=2))
    merged = Merged(METHODS["ties"], inputs, {"lambda": 1.0, ...}, "bfloat16")
    merged.read(((0, 64), (0, 2048)))        # 64 rows of the merge; only these rows of the sources are read ...

... but for what the method must know of the whole tensor first, such as norms or thresholds: it asks for them by
`Inputs.scan`, which streams the sources in chunks, and holds these for the merge if there is room.  The result is the
same bits whatever the block size, the memory and the number of threads.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from surgery.errors import SurgeryError
from surgery.merging.engine.cache import Held
from surgery.merging.engine.inputs import Again, Block, Inputs, spanned
from surgery.tensors.lazy import Box, Lazy, Shape, empty, lengths, torch_dtype, whole
from surgery.writing.stream import alone

if TYPE_CHECKING:
    import torch

    from surgery.merging.methods.registry import Method

T = TypeVar("T")
BLOCK = 1 << 18  # elements of a block of a result
LARGE_BLOCK = 1 << 20  # the same for compiled loops, which take it in strips
FUSED = ("bfloat16", "float32")  # what compiled loops write
KEPT = 64 << 20  # bytes of what methods know of whole tensors that are kept


Apply = Callable[[Block], "torch.Tensor"]
Fused = Callable[[Block, Any], None]


@dataclass(frozen=True)
class Ready:
    """What a method does with a block once it knows enough of the whole tensor.

    `span`: how many of the last dimensions a block must hold whole; `nbytes`: what the knowledge occupies.
    `fused`: the same as `apply` on `Block.bits`, into the bits of the result.
    """

    apply: Apply
    span: int = 0
    nbytes: int = 1024
    fused: Fused | None = None


class Engine:
    """Threads to compute in, and what is known of the tensors that are being merged.

    kernels  the compiled loops (`surgery.merging.engine.kernels`), None where numba is not installed
    held     what was read of tensors that are about to be merged
    """

    def __init__(self, threads: int = 1, memory: int = 1 << 30, kernels: Any = None) -> None:
        self.threads, self.memory, self.kernels = max(1, threads), memory, kernels
        self.held = Held(memory // 3)
        self._local = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._known: OrderedDict[int, tuple[Ready, object]] = OrderedDict()
        self._lock = threading.RLock()

    def map(self, fn: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        if self.threads == 1 or len(items) < 2 or threading.current_thread().name.startswith("surgery-merge"):
            return [fn(item) for item in items]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "surgery-merge", initializer=alone)
        return list(self._pool.map(fn, items))

    def known(self, key: object, make: Callable[[], Ready]) -> Ready:
        """`make()`, remembered: all small results, and the last large ones."""
        with self._lock:
            if id(key) in self._known:
                self._known.move_to_end(id(key))
                return self._known[id(key)][0]
            ready = make()
            self._known[id(key)] = ready, key
            large = [k for k, (r, _) in self._known.items() if r.nbytes > 1 << 16]
            total = sum(self._known[k][0].nbytes for k in large)
            for k in large[:-1]:
                if total > min(KEPT, self.memory // 4):
                    total -= self._known.pop(k)[0].nbytes
            return ready

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
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


@functools.cache
def compiled_loops() -> Any:
    """The module of compiled loops.

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


class Merged(Lazy):
    """One tensor of a merge."""

    __slots__ = ("dtype", "engine", "inputs", "method", "options", "shape")

    def __init__(self, method: Method, inputs: Inputs, options: Mapping[str, Any], dtype: str) -> None:
        self.method, self.inputs, self.options, self.engine = method, inputs, options, inputs.engine
        self.dtype, self.shape = dtype, inputs.shape

    def sources(self) -> tuple[Lazy, ...]:
        return tuple(self.inputs.sources)

    def _ready(self) -> Ready:
        try:
            return self.method.run(self.inputs, self.options)
        except SurgeryError as error:
            error.what = f"{self.inputs.name}: {error.what}"
            raise

    def read(self, box: Box) -> torch.Tensor:
        out = empty(lengths(box), self.dtype)
        if not out.numel():
            return out
        ready = self.engine.known(self, self._ready)
        fused = ready.fused and self.inputs.stored and self.dtype in FUSED
        per_element = (4 if fused else 16) * (len(self.inputs.sources) + 2) * self.engine.threads
        limit = max(1 << 12, min(LARGE_BLOCK if fused else BLOCK, self.engine.memory // 4 // per_element))
        if fused:
            self._fuse(ready, box, limit, out.reshape(-1).view(torch_dtype(f"uint{8 * out.itemsize}")).numpy())
            return out
        for part in spanned(box, ready.span, limit):
            wide = widen(part, self.shape, ready.span)
            made = ready.apply(self.inputs.block(wide, Again.NO))
            inner = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, wide, strict=True))
            target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, box, strict=True))
            out[target] = made[inner]
        return out

    def _fuse(self, ready: Ready, box: Box, limit: int, out: Any) -> None:
        """Compute a box in compiled loops; parts of it that hold no dimension whole follow each other in memory."""
        assert ready.fused
        at = 0
        for part in spanned(box, 0, limit):
            block = self.inputs.block(part, Again.NO)
            ready.fused(block, out[at : at + block.numel])
            at += block.numel


def widen(box: Box, shape: Shape, span: int) -> Box:
    """The box with its last `span` dimensions whole."""
    keep = max(0, len(shape) - span)
    return (*box[:keep], *whole(shape)[keep:])
