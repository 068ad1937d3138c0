"""Merged tensors: lazy, computed block by block from the same blocks of their sources, in as many threads as wanted.

    merged = Merged(METHODS["ties"], Inputs("model.norm.weight", [a, b, base], 2, "float32", 0), {"lambda": 1.0, ...},
                    "bfloat16", Engine(threads=2))
    merged.read(((0, 64), (0, 2048)))        # 64 rows of the merge; only these rows of the sources are read ...

... but for what the method must know of the whole tensor first, such as norms or thresholds: it asks for them by
`Inputs.scan`, which streams the sources once in chunks.  Chunks depend on the tensor alone and are combined in their
order, so that the result is the same bits whatever the block size, the memory and the number of threads.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from surgery.errors import SurgeryError
from surgery.lazy import Box, Lazy, Shape, boxes, lengths, torch_dtype, whole
from surgery.soups import masks
from surgery.stream import alone

if TYPE_CHECKING:
    import torch

    from surgery.soups.methods import Method

T = TypeVar("T")
CHUNK = 1 << 20  # elements up to which reductions over a tensor are torch's own
PIECE = 1 << 18  # elements that a scan looks at together: what stays in the cache of a core
BLOCK = 1 << 18  # elements of a block of a result
KEPT = 64 << 20  # bytes of what methods know of whole tensors that are kept


class Block:
    """The same box of every source, as tensors of the working dtype; the base, if any, is the first."""

    __slots__ = ("box", "inputs", "start", "tensors")

    def __init__(self, inputs: Inputs, tensors: list[torch.Tensor], box: Box | None, start: int) -> None:
        self.inputs, self.tensors, self.box, self.start = inputs, tensors, box, start

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
        return [(self.start, self.tensors[0].numel())] if self.box is None else masks.runs(self.inputs.shape, self.box)


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
        row = max(1, self.shape[-1]) if self.shape else 1
        self.chunk = min(CHUNK, PIECE if row > PIECE else PIECE // row * row)  # whole rows are read at once

    @property
    def count(self) -> int:
        """How many sources there are besides the base."""
        return len(self.sources) - self.based

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
        import torch

        pieces = list(ranges(self.shape, start, stop))
        read = [[s.read(box).reshape(-1) for box in pieces] for s in self.sources]
        joined = [p[0] if len(p) == 1 else torch.cat(p) for p in read]
        return Block(self, [t.to(torch_dtype(self.work)) for t in joined], None, start)

    def block(self, box: Box) -> Block:
        dtype = torch_dtype(self.work)
        return Block(self, [s.read(box).to(dtype) for s in self.sources], box, 0)


Apply = Callable[[Block], "torch.Tensor"]


@dataclass(frozen=True)
class Ready:
    """What a method does with a block once it knows enough of the whole tensor.

    `span`: how many of the last dimensions a block must hold whole; `nbytes`: what the knowledge occupies.
    """

    apply: Apply
    span: int = 0
    nbytes: int = 1024


class Engine:
    """Threads to compute in, and what is known of the tensors that are being merged."""

    def __init__(self, threads: int = 1, memory: int = 1 << 30) -> None:
        self.threads, self.memory = max(1, threads), memory
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

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


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
        import torch

        out = torch.empty(lengths(box), dtype=self.dtype)
        if not out.numel():
            return out
        ready = self.engine.known(self, self._ready)
        per_element = 16 * (len(self.inputs.sources) + 2) * self.engine.threads
        limit = max(1 << 12, min(BLOCK, self.engine.memory // 4 // per_element))

        for part in spanned(box, ready.span, limit):
            wide = widen(part, self.shape, ready.span)
            made = ready.apply(self.inputs.block(wide))
            inner = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, wide, strict=True))
            target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, box, strict=True))
            out[target] = made[inner]
        return out


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


def ranges(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Boxes that make up elements [start, stop) of a shape, in row-major order."""
    if not shape:
        if start < stop:
            yield ()
        return
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        for box in ranges(shape[1:], head, tail):
            yield ((first, first + 1), *box)
        return
    if head:
        for box in ranges(shape[1:], head, inner):
            yield ((first, first + 1), *box)
        first += 1
    if first < last:
        yield ((first, last), *whole(shape[1:]))
    if tail:
        for box in ranges(shape[1:], 0, tail):
            yield ((last, last + 1), *box)
