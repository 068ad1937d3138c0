"""Lazy tensors: they know their shape and dtype, and can produce any box of themselves, reading nothing else.

    weight = Extent(File("model.safetensors"), 4096, (1024, 512), "bfloat16")       # extent.py: a tensor in a file
    half = Concat((weight, Fill((8, 512), "bfloat16")), 0)
    half.read(((1000, 1032), (0, 512)))     # 24 rows from the file, 8 rows of zeros

A box is one (start, stop) per dimension.  Slicing commutes with everything here, so sharding, bounded memory,
partial inspection, merging and upcycling are all the same operation.  torch is imported when data are read, not
before: planning and inspecting need only names, shapes and sizes.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from surgery.errors import FileError, LayoutError, reported
from surgery.tensors.memory import buffer

if TYPE_CHECKING:
    import torch

Box = tuple[tuple[int, int], ...]
Shape = tuple[int, ...]

# torch's name of every dtype that a checkpoint may hold -> bytes per element
ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "complex32": 4, "complex64": 8, "complex128": 16,
}  # fmt: skip


class Lazy:
    """A tensor that is not in memory: `shape`, `dtype` (torch's name of the dtype) and `read(box)`."""

    __slots__ = ()
    shape: Shape
    dtype: str

    def read(self, box: Box) -> torch.Tensor:
        """Exactly this box, as a tensor of the box's shape.  Raises SurgeryError if a file does not hold it."""
        raise NotImplementedError

    def read_into(self, box: Box, out: torch.Tensor) -> None:
        """Fill `out`, a tensor of the box's shape and this dtype, with exactly this box."""
        out.copy_(self.read(box))

    def read_flat(self, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with the bytes of elements [start, stop) in row-major order."""
        import torch

        if start == stop:
            return
        flat, at = torch.frombuffer(out, dtype=self.torch_dtype), 0
        for box in ranges(self.shape, start, stop):
            lens = lengths(box)
            self.read_into(box, flat[at : at + math.prod(lens)].reshape(lens))
            at += math.prod(lens)

    @reported()
    def full(self) -> torch.Tensor:
        """The whole tensor."""
        return self.read(whole(self.shape))

    @reported()
    def __getitem__(self, index: object) -> torch.Tensor:
        """`tensor[2:4, :, 7]`: read just that.  Slices of step 1 and integers only."""
        box, squeeze = _box(index, self.shape)
        return self.read(box).reshape([b - a for i, (a, b) in enumerate(box) if i not in squeeze])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype (imports torch)."""
        return torch_dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def sources(self) -> tuple[Lazy, ...]:
        """The lazy tensors this one is made of."""
        return ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dtype}{list(self.shape)})"


def whole(shape: Shape) -> Box:
    """The box that covers a shape."""
    return tuple((0, n) for n in shape)


def lengths(box: Box) -> list[int]:
    return [b - a for a, b in box]


def inside(box: Box, outer: Box) -> Box:
    """A box of what lies in the box `outer`, as a box of the whole."""
    return tuple((a + at, b + at) for (a, b), (at, _) in zip(box, outer, strict=True))


def torch_dtype(dtype: str) -> torch.dtype:
    import torch

    found: torch.dtype | None = getattr(torch, dtype, None) if dtype in ITEMSIZE else None
    if found is None:
        raise FileError(f"this torch has no dtype {dtype}")
    return found


def empty(shape: Sequence[int], dtype: str) -> torch.Tensor:
    """A tensor to be filled, in memory that served before, if it is large (see `memory.buffer`)."""
    import torch

    size = math.prod(shape) * ITEMSIZE[dtype]
    if not size:
        return torch.empty(tuple(shape), dtype=torch_dtype(dtype))
    return torch.from_numpy(buffer(size)).view(torch_dtype(dtype)).reshape(tuple(shape))


def _box(index: object, shape: Shape) -> tuple[Box, set[int]]:
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    items += [slice(None)] * (len(shape) - len(items))
    if len(items) > len(shape):
        raise IndexError(f"{len(items)} indices for a tensor of shape {list(shape)}")
    box, squeeze = [], set()
    for dim, (item, n) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice):
            a, b, step = item.indices(n)
            if step != 1:
                raise IndexError("lazy tensors take slices of step 1; read the range, then stride the result")
            box.append((a, max(a, b)))
        elif isinstance(item, int):
            if not -n <= item < n:
                raise IndexError(f"index {item} is outside dimension {dim} of size {n}")
            box.append((item % n, item % n + 1))
            squeeze.add(dim)
        else:
            raise IndexError(f"lazy tensors take integers and slices, not {type(item).__name__}")
    return tuple(box), squeeze


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(_bytes(tensor).numpy())  # type: ignore[arg-type]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    # not reshape(-1): a tensor of one element is contiguous whatever its stride, and keeps that
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class Fill(Lazy):
    """A tensor of one repeated value that lies nowhere: padding rows, constants."""

    __slots__ = ("dtype", "shape", "value")

    def __init__(self, shape: Sequence[int], dtype: str, value: float = 0) -> None:
        self.shape, self.dtype, self.value = tuple(shape), dtype, value

    def read(self, box: Box) -> torch.Tensor:
        import torch

        return torch.full(lengths(box), self.value, dtype=self.torch_dtype)


class Slice(Lazy):
    """`src` narrowed to [start, stop) along one dimension."""

    __slots__ = ("dim", "dtype", "shape", "src", "start", "stop")

    def __init__(self, src: Lazy, dim: int, start: int, stop: int) -> None:
        outer = src.shape
        assert 0 <= start <= stop <= outer[dim], (src, dim, start, stop)
        self.dtype, self.shape = src.dtype, (*outer[:dim], stop - start, *outer[dim + 1 :])
        at = 0
        if isinstance(src, Slice) and src.dim == dim:
            at, src = src.start, src.src
        self.src: Lazy = src
        self.dim: int = dim
        self.start: int = at + start
        self.stop: int = at + stop

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src,)

    def _outer(self, box: Box) -> Box:
        a, b = box[self.dim]
        return box[: self.dim] + ((a + self.start, b + self.start),) + box[self.dim + 1 :]

    def read(self, box: Box) -> torch.Tensor:
        return self.src.read(self._outer(box))

    def read_into(self, box: Box, out: torch.Tensor) -> None:
        self.src.read_into(self._outer(box), out)


class Concat(Lazy):
    """Tensors joined along one dimension."""

    __slots__ = ("dim", "shape", "srcs", "starts")

    def __init__(self, srcs: Sequence[Lazy], dim: int) -> None:
        first = srcs[0]
        for src in srcs:
            same = src.shape[:dim] + src.shape[dim + 1 :] == first.shape[:dim] + first.shape[dim + 1 :]
            if len(src.shape) != len(first.shape) or not same or src.dtype != first.dtype:
                raise LayoutError(f"cannot join {first!r} and {src!r} along dimension {dim}")
        self.srcs, self.dim = tuple(srcs), dim
        self.starts = tuple(itertools.accumulate((s.shape[dim] for s in srcs), initial=0))
        self.shape = first.shape[:dim] + (self.starts[-1],) + first.shape[dim + 1 :]

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.srcs[0].dtype

    def sources(self) -> tuple[Lazy, ...]:
        return self.srcs

    def read(self, box: Box) -> torch.Tensor:
        pieces = self._pieces(box)
        if len(pieces) == 1:
            return pieces[0][0].read(pieces[0][1])
        out = empty(lengths(box), self.dtype)
        self.read_into(box, out)
        return out

    def read_into(self, box: Box, out: torch.Tensor) -> None:
        at = 0
        for src, inner in self._pieces(box):
            a, b = inner[self.dim]
            src.read_into(inner, out.narrow(self.dim, at, b - a))
            at += b - a

    def _pieces(self, box: Box) -> list[tuple[Lazy, Box]]:
        """What the box has of each tensor, in order."""
        lo, hi = box[self.dim]
        pieces: list[tuple[Lazy, Box]] = []
        for i in range(bisect.bisect_right(self.starts, lo) - 1, len(self.srcs)):
            at, src = self.starts[i], self.srcs[i]
            if at >= hi:
                break
            a, b = max(lo - at, 0), min(hi - at, src.shape[self.dim])
            if a < b:
                pieces.append((src, box[: self.dim] + ((a, b),) + box[self.dim + 1 :]))
        return pieces


class Map(Lazy):
    """`fn` of the same box of every source, elementwise.  `whole=True`: fn needs the entire tensors.

    fn takes tensors of the sources' dtypes and returns one of `dtype` and of the same shape.
    """

    __slots__ = ("dtype", "fn", "shape", "srcs", "whole")

    def __init__(
        self,
        fn: Callable[..., torch.Tensor],
        srcs: Sequence[Lazy],
        dtype: str | None = None,
        shape: Sequence[int] | None = None,
        whole: bool = False,
    ) -> None:
        self.fn, self.srcs, self.whole = fn, tuple(srcs), whole
        self.dtype = dtype or srcs[0].dtype
        self.shape = srcs[0].shape if shape is None else tuple(shape)
        if not whole and any(s.shape != self.shape for s in srcs):
            raise LayoutError(f"shapes differ: {', '.join(map(repr, srcs))}")

    def sources(self) -> tuple[Lazy, ...]:
        return self.srcs

    def read(self, box: Box) -> torch.Tensor:
        if not self.whole:
            return self.fn(*(s.read(box) for s in self.srcs))
        return self.fn(*(s.full() for s in self.srcs))[tuple(slice(a, b) for a, b in box)]


class Same(Lazy):
    """One tensor that several files hold a copy of.  Reading it proves that the copies are equal, bit for bit."""

    __slots__ = ("hint", "name", "srcs")

    def __init__(self, srcs: Sequence[Lazy], name: str, hint: str = "") -> None:
        self.srcs, self.name = tuple(srcs), name
        self.hint = hint or "the shards are from different saves, or one of them is damaged"
        if any((s.shape, s.dtype) != (srcs[0].shape, srcs[0].dtype) for s in srcs):
            raise LayoutError(f"the copies of {name} differ: {', '.join(map(repr, srcs))}")

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.srcs[0].dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.srcs[0].shape

    def sources(self) -> tuple[Lazy, ...]:
        return self.srcs

    def read(self, box: Box) -> torch.Tensor:
        first = self.srcs[0].read(box)
        for i, other in enumerate(self.srcs[1:], 1):
            if not same_bits(first, other.read(box)):
                raise LayoutError(
                    f"{self.name} should be the same on every rank, but copy {i} differs from copy 0",
                    hint=self.hint,
                )
        return first


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of bytes: NaNs are equal to themselves, -0.0 is not 0.0."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a.contiguous()), _bytes(b.contiguous()))


def cast(src: Lazy, dtype: str) -> Lazy:
    """`src` in another dtype; `src` itself if it has that dtype.  One rounding, to nearest even."""
    return src if src.dtype == dtype else Map(lambda t: t.to(torch_dtype(dtype)), (src,), dtype)


def boxes(shape: Shape, itemsize: int, limit: int) -> Iterator[Box]:
    """Cover a shape front to back, in row-major order, by boxes of at most `limit` bytes (at least one element)."""
    k, inner = len(shape), itemsize  # dimensions k.. fit into one box whole
    while k and inner * shape[k - 1] <= limit:
        k, inner = k - 1, inner * shape[k - 1]
    if k == 0:
        if math.prod(shape):
            yield whole(shape)
        return
    step = max(1, limit // inner)
    rest = tuple((0, n) for n in shape[k:])
    for index in itertools.product(*(range(n) for n in shape[: k - 1])):
        lead = tuple((i, i + 1) for i in index)
        for a in range(0, shape[k - 1], step):
            yield (*lead, (a, min(a + step, shape[k - 1])), *rest)


def walk(root: Lazy) -> Iterator[Lazy]:
    """Every node below a lazy tensor, itself included."""
    todo = [root]
    while todo:
        node = todo.pop()
        yield node
        todo.extend(node.sources())


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
