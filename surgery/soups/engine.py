"""Merged tensors: lazy, computed block by block from the same blocks of their sources, in as many threads as wanted.

    merged = Merged(METHODS["ties"], Inputs("model.norm.weight", [a, b, base], 2, "float32", 0), {"lambda": 1.0, ...},
                    "bfloat16", Engine(threads=2))
    merged.read(((0, 64), (0, 2048)))        # 64 rows of the merge; only these rows of the sources are read ...

... but for what the method must know of the whole tensor first, such as norms or thresholds: it asks for them by
`Inputs.scan`, which streams the sources once in chunks.  Chunks depend on the tensor alone and are combined in their
order, so that the result is the same bits whatever the block size, the memory and the number of threads.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from surgery.errors import SurgeryError
from surgery.lazy import ITEMSIZE, Box, Lazy, Shape, boxes, empty, lengths, torch_dtype, whole
from surgery.soups import masks
from surgery.stream import alone

if TYPE_CHECKING:
    import torch

    from surgery.soups.methods import Method

T = TypeVar("T")
CHUNK = 1 << 20  # elements up to which reductions over a tensor are torch's own
PIECE = 1 << 18  # elements that a scan looks at together: what stays in the cache of a core
BLOCK = 1 << 18  # elements of a block of a result
LARGE_PIECE, LARGE_BLOCK = 1 << 19, 1 << 20  # the same for compiled loops, which take them in strips
FUSED = ("bfloat16", "float32")  # what compiled loops write
KEPT = 64 << 20  # bytes of what methods know of whole tensors that are kept


class Block:
    """The same elements of every source, the base, if any, being the first: those of a box, or of a flat range.

    bits  [sources, elements] as they are stored (`Inputs.stored`), flat, for compiled loops; valid until this thread
          reads the next block; None where there are no such loops
    """

    __slots__ = ("_read", "_tensors", "box", "inputs", "numel", "shape", "start")

    def __init__(self, inputs: Inputs, read: Any, box: Box | None, start: int, shape: Shape) -> None:
        self.inputs, self.box, self.start, self.shape = inputs, box, start, shape
        self.numel, self._read = read.shape[1], read
        self._tensors: list[torch.Tensor] | None = None

    @property
    def bits(self) -> Any:
        return self._read if self.inputs.stored else None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """In the working dtype, each a tensor of its own."""
        if self._tensors is None:
            stored, work = self.inputs.stored, torch_dtype(self.inputs.work)
            rows = [tensor_of(memoryview(r).cast("B"), stored or self.inputs.work) for r in self._read]
            self._tensors = [(r.to(work, copy=True) if stored else r).reshape(self.shape) for r in rows]
        return self._tensors

    @property
    def kernels(self) -> Any:
        """The compiled loops, where there are `bits`."""
        return self.inputs.engine.kernels

    def room(self, use: str, rows: int = 1, itemsize: int = 4) -> Any:
        """[rows, elements] integers for one use; see `Engine.scratch`."""
        return self.inputs.engine.scratch(use, rows * self.numel, itemsize).reshape(rows, self.numel)

    @property
    def base(self) -> torch.Tensor:
        return self.tensors[0]

    @property
    def others(self) -> list[torch.Tensor]:
        return self.tensors[1:] if self.inputs.based else self.tensors

    def below(self, source: int, probability: Any) -> Any:
        """Which elements are chosen at random, each with its probability: numpy's booleans, flat.

        The same for an element whatever block it is read in.
        """
        return masks.below((self.inputs.seed, self.inputs.name, source), self.runs(), probability)

    def runs(self) -> list[tuple[int, int]]:
        """The (first element, how many) of the tensor's flat ranges that the block consists of, in order."""
        return [(self.start, self.numel)] if self.box is None else masks.runs(self.inputs.shape, self.box)


class Inputs:
    """The sources of one tensor of the merge.  `base` is the base's place among them, None if there is none."""

    def __init__(self, name: str, sources: Sequence[Lazy], base: int | None, work: str, seed: int) -> None:
        order = list(range(len(sources)))
        if base is not None:
            order = [base, *(i for i in order if i != base)]
        self.name, self.work, self.seed, self.based = name, work, seed, base is not None
        self.sources = [sources[i] for i in order]
        self.shape: Shape = sources[0].shape
        self.numel = math.prod(self.shape)
        self.engine: Engine = ONE

    @property
    def count(self) -> int:
        """How many sources there are besides the base."""
        return len(self.sources) - self.based

    @property
    def chunk(self) -> int:
        """Elements that are scanned at once: whole rows, if possible."""
        piece, row = LARGE_PIECE if self.stored else PIECE, max(1, self.shape[-1]) if self.shape else 1
        return min(CHUNK, piece if row > piece else piece // row * row)

    @property
    def single(self) -> bool:
        """Whether the tensor is small, so that reductions are torch's own."""
        return self.numel <= CHUNK

    def scan(self, fn: Callable[[Block], T], span: int = 0, size: int = 0) -> list[T]:
        """`fn` of every chunk of the tensor, in order.

        span 0: chunks are flat, [n], of `size` elements, and cut rows anywhere; else they keep the last `span`
        dimensions whole.
        """
        if span == 0 or not self.shape:
            step = size or self.chunk
            starts = range(0, self.numel, step)
            return self.engine.map(lambda at: fn(self.flat(at, min(at + step, self.numel))), list(starts))
        return self.engine.map(lambda box: fn(self.block(box)), list(spanned(whole(self.shape), span, self.chunk)))

    def all(self) -> Block:
        """The whole tensor, in its own shape."""
        return self.block(whole(self.shape))

    def flat(self, start: int, stop: int) -> Block:
        """Elements [start, stop) in row-major order."""
        return Block(self, self._read([(start, stop - start)], None), None, start, (stop - start,))

    def sample(self, starts: Sequence[int], size: int) -> Block:
        """`size` elements (fewer at the end of the tensor) from each start on, one behind the other."""
        read = self._read([(start, min(size, self.numel - start)) for start in starts], None)
        return Block(self, read, None, 0, (read.shape[1],))

    def block(self, box: Box) -> Block:
        return Block(self, self._read(masks.runs(self.shape, box), box), box, 0, tuple(lengths(box)))

    @property
    def stored(self) -> str | None:
        """As what compiled loops take the sources: bfloat16 if all are, else float32; None if they cannot."""
        if self.work != "float32" or not self.engine.kernels:
            return None
        return "bfloat16" if all(s.kind == "bfloat16" for s in self.sources) else "float32"

    def _read(self, runs: Sequence[tuple[int, int]], box: Box | None) -> Any:
        """[sources, elements]: integers of the width of what is stored, or of the working dtype."""
        kind = self.stored
        numel = sum(count for _, count in runs)
        if kind:
            bits = self.engine.scratch("read", len(self.sources) * numel, ITEMSIZE[kind])
        else:
            bits = fresh(len(self.sources) * numel, ITEMSIZE[self.work])
        bits = bits.reshape(len(self.sources), numel)
        for source, row in zip(self.sources, bits, strict=True):
            out = memoryview(row).cast("B")
            if source.kind != (kind or self.work):
                self._widen(source, runs, box, out)
            elif box is None or len(runs) == 1:
                _read_runs(source, runs, out)
            else:
                source.read_into(box, tensor_of(out, source.kind).reshape(lengths(box)))
        return bits

    def _widen(self, source: Lazy, runs: Sequence[tuple[int, int]], box: Box | None, out: memoryview) -> None:
        target = tensor_of(out, self.stored or self.work)
        if box is not None:
            target.reshape(lengths(box)).copy_(source.read(box))
            return
        narrow = memoryview(fresh(target.numel(), ITEMSIZE[source.kind])).cast("B")
        _read_runs(source, runs, narrow)
        target.copy_(tensor_of(narrow, source.kind))


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

    kernels  the compiled loops (`surgery.soups.kernels`), None where numba is not installed
    """

    def __init__(self, threads: int = 1, memory: int = 1 << 30, kernels: Any = None) -> None:
        self.threads, self.memory, self.kernels = max(1, threads), memory, kernels
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
            if id(key) not in self._known:
                self._known[id(key)] = make(), key
            self._known.move_to_end(id(key))
            ready = self._known[id(key)][0]
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
    """The module of compiled loops; None if numba is not installed, or is too old or too new for numpy or Python."""
    try:
        import numpy as np

        from surgery.soups import kernels
    except ImportError:
        return None
    kernels.splitmix64(np.uint64(0), np.uint64(0))  # starts the compiler: half a second, 60 MB
    return kernels


ONE = Engine()


class Merged(Lazy):
    """One tensor of a merge."""

    __slots__ = ("engine", "inputs", "kind", "method", "options", "shape")

    def __init__(
        self, method: Method, inputs: Inputs, options: Mapping[str, Any], kind: str, engine: Engine = ONE
    ) -> None:
        self.method, self.inputs, self.options, self.engine = method, inputs, options, engine
        self.kind, self.shape, inputs.engine = kind, inputs.shape, engine

    def sources(self) -> tuple[Lazy, ...]:
        return tuple(self.inputs.sources)

    def _ready(self) -> Ready:
        try:
            return self.method.run(self.inputs, self.options)
        except SurgeryError as error:
            error.what = f"{self.inputs.name}: {error.what}"
            raise

    def read(self, box: Box) -> torch.Tensor:
        out = empty(lengths(box), self.kind)
        if not out.numel():
            return out
        ready = self.engine.known(self, self._ready)
        fused = ready.fused and self.inputs.stored and self.kind in FUSED
        per_element = (4 if fused else 16) * (len(self.inputs.sources) + 2) * self.engine.threads
        limit = max(1 << 12, min(LARGE_BLOCK if fused else BLOCK, self.engine.memory // 4 // per_element))
        if fused:
            self._fuse(ready, box, limit, out.reshape(-1).view(torch_dtype(f"uint{8 * out.itemsize}")).numpy())
            return out
        for part in spanned(box, ready.span, limit):
            wide = widen(part, self.shape, ready.span)
            made = ready.apply(self.inputs.block(wide))
            inner = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, wide, strict=True))
            target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, box, strict=True))
            out[target] = made[inner]
        return out

    def _fuse(self, ready: Ready, box: Box, limit: int, out: Any) -> None:
        """Compute a box in compiled loops; parts of it that hold no dimension whole follow each other in memory."""
        assert ready.fused
        at = 0
        for part in spanned(box, 0, limit):
            block = self.inputs.block(part)
            ready.fused(block, out[at : at + block.numel])
            at += block.numel


def _read_runs(source: Lazy, runs: Sequence[tuple[int, int]], out: memoryview) -> None:
    at, item = 0, ITEMSIZE[source.kind]
    for start, count in runs:
        source.read_flat(start, start + count, out[at : at + count * item])
        at += count * item


def fresh(count: int, itemsize: int) -> Any:
    """Integers to be filled."""
    import numpy as np

    return np.empty(count, f"u{itemsize}")


def tensor_of(data: memoryview, kind: str) -> torch.Tensor:
    """Bytes as a flat tensor, without a copy."""
    import torch

    return torch.frombuffer(data, dtype=torch_dtype(kind)) if data.nbytes else torch.empty(0, dtype=torch_dtype(kind))


def widen(box: Box, shape: Shape, span: int) -> Box:
    """The box with its last `span` dimensions whole."""
    keep = max(0, len(shape) - span)
    return (*box[:keep], *whole(shape)[keep:])


def spanned(box: Box, span: int, limit: int) -> Iterator[Box]:
    """Cover a box by boxes of about `limit` elements that keep its last `span` dimensions as they are."""
    keep = max(0, len(box) - span)
    inner = max(1, math.prod(lengths(box[keep:])))
    if not keep:
        yield box
        return
    for lead in boxes(tuple(lengths(box[:keep])), inner, max(limit, inner)):
        yield (*((a + at, b + at) for (a, b), (at, _) in zip(lead, box[:keep], strict=True)), *box[keep:])
