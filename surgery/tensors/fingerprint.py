"""Content fingerprints of tensors that are read box by box, in any order, by any partition.

    ledger = Ledger()
    parts = {name: ledger.tap(name, lazy) for name, lazy in parts.items()}   # reading a tapped part counts it
    with ledger.collect() as seen:
        parts["embed"].read(((0, 100), (0, 64)))
    ledger.add(seen)
    ledger.content_digest()        # once every element of every part was counted: the model, whatever its format

The last dimension of a part is a row; a tensor of no or one dimension is one row.  The bytes of a row are signed
little-endian 32-bit words x_rk, a short tail padded with zeros, and

    fingerprint = sum_r W_r * sum_k w_k * x_rk   mod 2^64,        W_r, w_k odd 64-bit numbers (splitmix64 of r, of k)

It is linear, so boxes add up, even boxes that split a word.  A flipped bit always changes it, for the weights are
odd; moved, swapped, negated or lost values are caught but for a chance of 2^-32 or less.  It detects damage and
wrong mappings.  It is no protection against forgery: whoever wants a collision can compute one.

On the way the ledger counts what is no number (NaN, infinite), and the zeros on both sides of a cast.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from surgery.errors import LayoutError, some
from surgery.tensors.hashing import places, splitmix64
from surgery.tensors.lazy import Box, Lazy, Shape, bytes_of, lengths, walk

if TYPE_CHECKING:
    import torch

MASK = (1 << 64) - 1
COLUMNS = 1 << 16  # words of one row per step: half a MiB of weights
ROW_SEED, COLUMN_SEED = 0x6A09E667F3BCC908, 0xBB67AE8584CAA73B

SOURCE = "source/"  # begins the name of a part as it was before it was changed (cast)
STATE = "optimizer/"  # begins the name of what an optimizer keeps of a part, which is not the model

RowSums = Callable[[Any, Any], Any]
Count = tuple[int, int, int, int]  # fingerprint, elements, of them not finite, of them zero (where a cast is counted)
NOTHING: Count = (0, 0, 0, 0)
Counts = dict[str, Count]  # part -> what was read of it so far
FLOATS = ("float64", "float32", "float16", "bfloat16")


def row_sums(words: Any, weights: Any) -> Any:
    """The sum of every row's words times the weights, modulo 2^64."""
    import numpy as np

    return np.einsum("rk,k->r", words, weights)


def box_sum(data: torch.Tensor, box: Box, shape: Shape, row_sums: RowSums = row_sums) -> int:
    """What `box` of a tensor of `shape`, whose elements are `data`, adds to the tensor's fingerprint."""
    import numpy as np

    if not data.numel():
        return 0
    start, stop = box[-1] if box else (0, 1)
    item = data.element_size()
    rows = places(box[:-1], shape[:-1])
    raw = np.frombuffer(bytes_of(data.contiguous()), np.uint8).reshape(len(rows), (stop - start) * item)
    row_weights = _weights(rows, ROW_SEED)
    total, at = 0, start * item  # `at`: byte of the row at which `raw` begins
    for k0 in range(at // 4, -(-stop * item // 4), COLUMNS):
        k1 = min(k0 + COLUMNS, -(-stop * item // 4))
        sums = row_sums(_words(raw, 4 * k0 - at, 4 * k1 - at), _column_weights(k0, k1))
        total += int(sums @ row_weights)
    return total & MASK


def not_finite(data: torch.Tensor) -> int:
    """How many values are NaN or infinite.  A finite sum says at once that there are none."""
    import torch

    if torch.isfinite(data.sum()):
        return 0
    return data.numel() - int(torch.isfinite(data).sum())


def _words(raw: Any, start: int, stop: int) -> Any:
    """Bytes [start, stop) of every row as 32-bit words; what lies outside of the rows is zero."""
    import numpy as np

    inside = raw[:, max(start, 0) : stop]
    if inside.shape[1] != stop - start:
        padded = np.zeros((len(raw), stop - start), np.uint8)
        left = max(-start, 0)
        padded[:, left : left + inside.shape[1]] = inside
        inside = padded
    elif not inside.flags.c_contiguous:
        inside = np.ascontiguousarray(inside)
    return inside.view("<i4")


@functools.lru_cache(maxsize=8)
def _column_weights(start: int, stop: int) -> Any:
    import numpy as np

    return _weights(np.arange(start, stop, dtype=np.uint64), COLUMN_SEED)


def _weights(index: Any, seed: int) -> Any:
    """A hash of every index, made odd, as int64."""
    import numpy as np

    return (splitmix64(index, seed) | np.uint64(1)).view(np.int64)


class Tap(Lazy):
    """A part whose reads are counted in a ledger."""

    __slots__ = ("dtype", "ledger", "name", "shape", "src")

    def __init__(self, ledger: Ledger, name: str, src: Lazy) -> None:
        self.ledger, self.name, self.src = ledger, name, src
        self.dtype, self.shape = src.dtype, src.shape

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src,)

    def read(self, box: Box) -> torch.Tensor:
        data = self.src.read(box)
        self.ledger.count(self.name, data, box)
        return data

    def read_into(self, box: Box, out: torch.Tensor) -> None:
        self.src.read_into(box, out)
        self.ledger.count(self.name, out, box)


class Uncounted(Lazy):
    """A replica inside of a larger tensor: its original is counted where that is written."""

    __slots__ = ("dtype", "ledgers", "shape", "src")

    def __init__(self, src: Lazy) -> None:
        self.src, self.dtype, self.shape = src, src.dtype, src.shape
        self.ledgers = {node.ledger for node in walk(src) if isinstance(node, Tap)}

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src,)

    def read(self, box: Box) -> torch.Tensor:
        with ExitStack() as stack:
            for ledger in self.ledgers:
                stack.enter_context(ledger.collect())
            return self.src.read(box)


class Ledger:
    """Which parts there are, and the fingerprint of what has been read of each.

    Taps count only inside `collect()`, and only in the thread that collects; what was collected becomes part of the
    ledger by `add`.  So a writer can read ahead and still know what belongs to the bytes that are on disk.
    """

    def __init__(self, numbers: bool = False) -> None:
        self.row_sums = row_sums  # a compiled loop may take its place
        self.numbers = numbers  # whether values are looked at, and not only their bits
        self.parts: dict[str, tuple[str, Shape]] = {}
        self.counts: Counts = {}
        self._local = threading.local()

    def tap(self, name: str, lazy: Lazy) -> Lazy:
        """`lazy`, counted under `name` whenever it is read."""
        assert self.parts.get(name, (lazy.dtype, lazy.shape)) == (lazy.dtype, lazy.shape), name
        self.parts[name] = (lazy.dtype, lazy.shape)
        return Tap(self, name, lazy)

    @contextmanager
    def collect(self) -> Iterator[Counts]:
        """Gather what this thread reads through taps."""
        before = getattr(self._local, "seen", None)
        seen: Counts = {}
        self._local.seen = seen
        try:
            yield seen
        finally:
            self._local.seen = before

    def count(self, name: str, data: torch.Tensor, box: Box) -> None:
        """Note that `box` of a part was read; nothing happens outside of `collect()`."""
        seen = getattr(self._local, "seen", None)
        if seen is not None:
            old, elements, odd, zeros = seen.get(name, NOTHING)
            dtype, shape = self.parts[name]
            fingerprint = (old + box_sum(data, box, shape, self.row_sums)) & MASK
            if dtype in FLOATS and self.numbers:
                odd += not_finite(data)
                zeros += data.numel() - int(data.count_nonzero()) if self._cast(name) else 0
            seen[name] = (fingerprint, elements + math.prod(lengths(box)), odd, zeros)

    def _cast(self, name: str) -> bool:
        """Whether a part is one side of a cast."""
        return name.startswith(SOURCE) or SOURCE + name in self.parts

    def add(self, seen: Mapping[str, Sequence[int]]) -> None:
        """Add counts to the ledger's."""
        for name, (fingerprint, *more) in seen.items():
            old, *before = self.counts.get(name, NOTHING)
            elements, odd, zeros = (a + b for a, b in zip(before, more, strict=True))
            self.counts[name] = ((old + fingerprint) & MASK, elements, odd, zeros)

    def gaps(self) -> list[str]:
        """Parts of which not every element was counted once."""
        return [
            f"{name} ({self.counts.get(name, NOTHING)[1]} of {math.prod(shape)} elements)"
            for name, (_, shape) in self.parts.items()
            if self.counts.get(name, NOTHING)[1] != math.prod(shape)
        ]

    def fingerprint(self, name: str) -> str:
        """Kind, shape and fingerprint of one part: equal for parts of equal bytes."""
        dtype, shape = self.parts[name]
        return f"{dtype}{json.dumps(list(shape))}:{self.counts.get(name, NOTHING)[0]:016x}"

    def content_digest(self, prefix: str = "") -> str:
        """A sha256 over the names, dtypes, shapes and fingerprints of the parts, independent of their order.

        Of the parts whose name begins with `prefix`, which is not counted as part of the name; without one, of those
        that are no part's source and no optimizer's (see `SOURCE`, `STATE`).

        Raises LayoutError if an element was not counted, or counted twice.
        """
        if gaps := self.gaps():
            raise LayoutError(f"not every element of every part was written exactly once: {some(gaps)}")
        chosen = [
            n for n in sorted(self.parts) if (n.startswith(prefix) if prefix else not n.startswith((SOURCE, STATE)))
        ]
        lines = (json.dumps([name.removeprefix(prefix), self.fingerprint(name)]) for name in chosen)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
