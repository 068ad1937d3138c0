"""Lazy tensors: they know their shape and dtype, and can produce any box of themselves, reading nothing else.

    weight = Extent(File("model.safetensors"), offset=4096, shape=(1024, 512), kind="bfloat16")
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from surgery.errors import FileError, LayoutError
from surgery.files import File

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
MAX_OVERLAP = 64 << 20  # bytes that an overlapping view (stride 0, windows) may grow to


class Lazy:
    """A tensor that is not in memory: `shape`, `kind` (torch's name of the dtype) and `read(box)`."""

    __slots__ = ()
    shape: Shape
    kind: str

    def read(self, box: Box) -> torch.Tensor:
        """Exactly this box, as a tensor of the box's shape.  Raises SurgeryError if a file does not hold it."""
        raise NotImplementedError

    def full(self) -> torch.Tensor:
        """The whole tensor."""
        return self.read(whole(self.shape))

    def __getitem__(self, index: object) -> torch.Tensor:
        """`tensor[2:4, :, 7]`: read just that.  Slices of step 1 and integers only."""
        box, squeeze = _box(index, self.shape)
        return self.read(box).reshape([b - a for i, (a, b) in enumerate(box) if i not in squeeze])

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype (imports torch)."""
        return torch_dtype(self.kind)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.kind]

    def sources(self) -> tuple[Lazy, ...]:
        """The lazy tensors this one is made of."""
        return ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}{list(self.shape)})"


def whole(shape: Shape) -> Box:
    """The box that covers a shape."""
    return tuple((0, n) for n in shape)


def lengths(box: Box) -> list[int]:
    return [b - a for a, b in box]


def torch_dtype(kind: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, kind, None) if kind in ITEMSIZE else None
    if dtype is None:
        raise FileError(f"this torch has no dtype {kind}")
    return dtype


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


def dense_strides(shape: Sequence[int]) -> Shape:
    """Row-major strides, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Extent(Lazy):
    """A tensor that lies in a file: the only leaf that does I/O.  All containers reduce to tables of these.

    `offset` is the byte of element 0; `strides` are in elements (None: row-major); `swap` says that the stored
    elements are big-endian.  That every element lies inside `file` is checked here, once.
    """

    __slots__ = ("file", "kind", "offset", "shape", "strides", "swap")

    def __init__(
        self,
        file: File,
        offset: int,
        shape: Sequence[int],
        kind: str,
        strides: Sequence[int] | None = None,
        swap: bool = False,
    ) -> None:
        self.file, self.offset, self.shape, self.kind, self.swap = file, offset, tuple(shape), kind, swap
        self.strides = None if strides is None or _is_dense(self.shape, strides) else tuple(strides)
        if math.prod(self.shape):
            file.check(offset, self._span(whole(self.shape)), "tensor data")

    def _span(self, box: Box) -> int:
        """Bytes from the first to the last element of a box that is not empty."""
        strides = self.strides or dense_strides(self.shape)
        return (1 + sum((b - a - 1) * s for (a, b), s in zip(box, strides, strict=True))) * ITEMSIZE[self.kind]

    def read(self, box: Box) -> torch.Tensor:
        if not math.prod(lengths(box)):
            import torch

            return torch.empty(lengths(box), dtype=self.dtype)
        if self.strides is None:
            out = _read_dense(self.file, self.offset, self.shape, self.kind, box)
        else:
            out = self._read_strided(box)
        return _byteswapped(out) if self.swap else out

    def _read_strided(self, box: Box) -> torch.Tensor:
        assert self.strides is not None
        # A transposed view is a dense tensor with its dimensions in another order: read it in memory's order.
        order = sorted(range(len(self.shape)), key=lambda i: (-self.strides[i], self.shape[i] == 1))  # type: ignore[index]
        stored = tuple(self.shape[i] for i in order)
        if _is_dense(stored, [self.strides[i] for i in order]):
            got = _read_dense(self.file, self.offset, stored, self.kind, tuple(box[i] for i in order))
            return got.permute([order.index(i) for i in range(len(order))])
        return self._read_view(box)

    def _read_view(self, box: Box) -> torch.Tensor:
        """Any other view: one dimension at a time until what is left lies close together."""
        import torch

        assert self.strides is not None
        item, lens = ITEMSIZE[self.kind], lengths(box)
        span, size = self._span(box), math.prod(lens) * item
        wide = [i for i, n in enumerate(lens) if n > 1]
        if span > max(2 * size, 1 << 16) and wide:
            dim = max(wide, key=lambda i: (lens[i] - 1) * self.strides[i])  # type: ignore[index]
            a, b = box[dim]
            steps = [self._read_view(box[:dim] + ((i, i + 1),) + box[dim + 1 :]) for i in range(a, b)]
            return torch.cat(steps, dim)
        if size > span and size > MAX_OVERLAP:
            raise FileError(
                f"a view of {list(self.shape)} with strides {list(self.strides)} grows {span} stored bytes to {size}",
                file=self.file.path,
                hint="views that overlap themselves are read up to 64 MiB; re-save the tensor with .contiguous()",
            )
        raw = torch.empty(span // item, dtype=self.dtype)
        start = self.offset + sum(a * s for (a, _), s in zip(box, self.strides, strict=True)) * item
        self.file.read_into(start, bytes_of(raw), "tensor data")
        return raw.as_strided(lens, self.strides).contiguous()


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    at = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1:
            if stride != at:
                return False
            at *= n
    return True


def _read_dense(file: File, offset: int, shape: Shape, kind: str, box: Box) -> torch.Tensor:
    """A box of a row-major tensor, by as few reads as its rows allow."""
    import torch

    lens, item = lengths(box), ITEMSIZE[kind]
    out = torch.empty(lens, dtype=torch_dtype(kind))
    k, run = len(lens), item  # dimensions k.. form one run of bytes in the file
    while k and lens[k - 1] == shape[k - 1]:
        k, run = k - 1, run * shape[k - 1]
    if k:
        k -= 1
        run *= lens[k]
    strides = [s * item for s in dense_strides(shape)]
    start = offset + (box[k][0] * strides[k] if k < len(lens) else 0)
    if k == 0:
        file.read_into(start, bytes_of(out), "tensor data")
    else:
        file.read_runs(_offsets(start, box[:k], strides), run, bytes_of(out), "tensor data")
    return out


def _offsets(start: int, box: Box, strides: Sequence[int]) -> Iterable[int]:
    """The bytes at which the runs of a box begin, in row-major order."""
    if not box:
        return (start,)
    (a, b), stride = box[0], strides[0]
    steps = range(start + a * stride, start + b * stride, stride)
    return steps if len(box) == 1 else itertools.chain.from_iterable(_offsets(s, box[1:], strides[1:]) for s in steps)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _byteswapped(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    width = tensor.element_size() // (2 if tensor.is_complex() else 1)
    flat = tensor.reshape(-1).view(torch.uint8).reshape(-1, width).flip(-1)
    return flat.reshape(-1).view(tensor.dtype).reshape(tensor.shape)


class Fill(Lazy):
    """A tensor of one repeated value that lies nowhere: padding rows, constants."""

    __slots__ = ("kind", "shape", "value")

    def __init__(self, shape: Sequence[int], kind: str, value: float = 0) -> None:
        self.shape, self.kind, self.value = tuple(shape), kind, value

    def read(self, box: Box) -> torch.Tensor:
        import torch

        return torch.full(lengths(box), self.value, dtype=self.dtype)


class Slice(Lazy):
    """`src` narrowed to [start, stop) along one dimension."""

    __slots__ = ("dim", "src", "start", "stop")

    def __init__(self, src: Lazy, dim: int, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= src.shape[dim], (src, dim, start, stop)
        at = 0
        if isinstance(src, Slice) and src.dim == dim:
            at, src = src.start, src.src
        self.src: Lazy = src
        self.dim: int = dim
        self.start: int = at + start
        self.stop: int = at + stop

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.src.kind

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        s = self.src.shape
        return s[: self.dim] + (self.stop - self.start,) + s[self.dim + 1 :]

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src,)

    def read(self, box: Box) -> torch.Tensor:
        a, b = box[self.dim]
        return self.src.read(box[: self.dim] + ((a + self.start, b + self.start),) + box[self.dim + 1 :])


class Concat(Lazy):
    """Tensors joined along one dimension."""

    __slots__ = ("dim", "shape", "srcs", "starts")

    def __init__(self, srcs: Sequence[Lazy], dim: int) -> None:
        first = srcs[0]
        for src in srcs:
            same = src.shape[:dim] + src.shape[dim + 1 :] == first.shape[:dim] + first.shape[dim + 1 :]
            if len(src.shape) != len(first.shape) or not same or src.kind != first.kind:
                raise LayoutError(f"cannot join {first!r} and {src!r} along dimension {dim}")
        self.srcs, self.dim = tuple(srcs), dim
        self.starts = tuple(itertools.accumulate((s.shape[dim] for s in srcs), initial=0))
        self.shape = first.shape[:dim] + (self.starts[-1],) + first.shape[dim + 1 :]

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.srcs[0].kind

    def sources(self) -> tuple[Lazy, ...]:
        return self.srcs

    def read(self, box: Box) -> torch.Tensor:
        import torch

        lo, hi = box[self.dim]
        pieces = []
        for i in range(bisect.bisect_right(self.starts, lo) - 1, len(self.srcs)):
            at, src = self.starts[i], self.srcs[i]
            if at >= hi:
                break
            a, b = max(lo - at, 0), min(hi - at, src.shape[self.dim])
            if a < b:
                pieces.append(src.read(box[: self.dim] + ((a, b),) + box[self.dim + 1 :]))
        if not pieces:
            return torch.empty(lengths(box), dtype=self.dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


class Map(Lazy):
    """`fn` of the same box of every source, elementwise.  `whole=True`: fn needs the entire tensors.

    fn takes tensors of the sources' kinds and returns one of `kind` and of the same shape.
    """

    __slots__ = ("fn", "kind", "shape", "srcs", "whole")

    def __init__(
        self,
        fn: Callable[..., torch.Tensor],
        srcs: Sequence[Lazy],
        kind: str | None = None,
        shape: Sequence[int] | None = None,
        whole: bool = False,
    ) -> None:
        self.fn, self.srcs, self.whole = fn, tuple(srcs), whole
        self.kind = kind or srcs[0].kind
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
        if any((s.shape, s.kind) != (srcs[0].shape, srcs[0].kind) for s in srcs):
            raise LayoutError(f"the copies of {name} differ: {', '.join(map(repr, srcs))}")

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.srcs[0].kind

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
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def cast(src: Lazy, kind: str) -> Lazy:
    """`src` in another dtype; `src` itself if it has that dtype.  One rounding, to nearest even."""
    return src if src.kind == kind else Map(lambda t: t.to(torch_dtype(kind)), (src,), kind)


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
