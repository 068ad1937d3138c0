"""Tensors that lie in files: the only leaf of a lazy tensor that does I/O.

weight = Extent(File("model.safetensors"), offset=4096, shape=(1024, 512), dtype="bfloat16")
weight.read(((1000, 1008), (0, 512)))      # 8 rows: one read of 8 KiB
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from surgery.errors import FileError
from surgery.tensors.files import File
from surgery.tensors.lazy import ITEMSIZE, Box, Lazy, Shape, bytes_of, empty, lengths, same_bits, whole

if TYPE_CHECKING:
    import torch

MAX_OVERLAP = 64 << 20  # bytes that an overlapping view (stride 0, windows) may grow to


def dense_strides(shape: Sequence[int]) -> Shape:
    """Row-major strides, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Extent(Lazy):
    """A tensor that lies in a file: the only leaf that does I/O.  All containers reduce to tables of these.

    `offset` is the byte of element 0; `strides` are in elements (None: row-major); `swap` says that the stored
    elements are big-endian.  That every element lies inside `file` is checked here, once.
    """

    __slots__ = ("dtype", "file", "offset", "shape", "strides", "swap")

    def __init__(
        self,
        file: File,
        offset: int,
        shape: Sequence[int],
        dtype: str,
        strides: Sequence[int] | None = None,
        swap: bool = False,
    ) -> None:
        self.file, self.offset, self.shape, self.dtype, self.swap = file, offset, tuple(shape), dtype, swap
        self.strides = None if strides is None or _is_dense(self.shape, strides) else tuple(strides)
        if math.prod(self.shape):
            file.check(offset, self._span(whole(self.shape)), "tensor data")

    def _span(self, box: Box) -> int:
        """Bytes from the first to the last element of a box that is not empty."""
        strides = self.strides or dense_strides(self.shape)
        return (1 + sum((b - a - 1) * s for (a, b), s in zip(box, strides, strict=True))) * ITEMSIZE[self.dtype]

    def read(self, box: Box) -> torch.Tensor:
        if self.strides is not None and all(a < b for a, b in box):
            out = self._read_strided(box)
        else:
            out = empty(lengths(box), self.dtype)
            self._read_dense(self.shape, box, out)
        return _byteswapped(out) if self.swap else out

    def read_into(self, box: Box, out: torch.Tensor) -> None:
        if self.strides is None and not self.swap and out.is_contiguous():
            self._read_dense(self.shape, box, out)
        else:
            super().read_into(box, out)

    def read_flat(self, start: int, stop: int, out: memoryview) -> None:
        if self.strides is None and not self.swap:
            self.file.read_into(self.offset + start * ITEMSIZE[self.dtype], out, "tensor data")
        else:
            super().read_flat(start, stop, out)

    def _read_dense(self, shape: Shape, box: Box, out: torch.Tensor) -> None:
        """Fill `out` with a box of the row-major tensor of `shape` that lies here, by as few reads as rows allow."""
        if not out.numel():
            return
        lens, run = lengths(box), ITEMSIZE[self.dtype]
        strides = [s * run for s in dense_strides(shape)]
        k = len(lens)  # dimensions k.. form one run of bytes in the file
        while k and lens[k - 1] == shape[k - 1]:
            k, run = k - 1, run * shape[k - 1]
        if k:
            k -= 1
            run *= lens[k]
        start = self.offset + (box[k][0] * strides[k] if k < len(lens) else 0)
        if k == 0:
            self.file.read_into(start, bytes_of(out), "tensor data")
        else:
            self.file.read_runs(_offsets(start, box[:k], strides), run, bytes_of(out), "tensor data")

    def _read_strided(self, box: Box) -> torch.Tensor:
        assert self.strides is not None
        # A transposed view is a dense tensor with its dimensions in another order: read it in memory's order.
        order = sorted(range(len(self.shape)), key=lambda i: (-self.strides[i], self.shape[i] == 1))  # type: ignore[index]
        stored = tuple(self.shape[i] for i in order)
        if _is_dense(stored, [self.strides[i] for i in order]):
            inner = tuple(box[i] for i in order)
            got = empty(lengths(inner), self.dtype)
            self._read_dense(stored, inner, got)
            return got.permute([order.index(i) for i in range(len(order))])
        return self._read_view(box)

    def _read_view(self, box: Box) -> torch.Tensor:
        """Any other view: one dimension at a time until what is left lies close together."""
        import torch

        assert self.strides is not None
        item, lens = ITEMSIZE[self.dtype], lengths(box)
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
        raw = empty([span // item], self.dtype)
        start = self.offset + sum(a * s for (a, _), s in zip(box, self.strides, strict=True)) * item
        self.file.read_into(start, bytes_of(raw), "tensor data")
        return raw.as_strided(lens, self.strides).contiguous()


def look_equal(a: Lazy, b: Lazy) -> bool:
    """Whether two tensors of one shape and dtype agree in a few of their rows, bit for bit; little is read."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = {a.shape[0] * i // 16 for i in range(16)} | {a.shape[0] - 1}
    if not all(isinstance(t, Extent) and t.strides is None and not t.swap for t in (a, b)):
        return all(same_bits(a[r : r + 1], b[r : r + 1]) for r in rows)
    size = a.nbytes // a.shape[0]
    ours, theirs = ((t.file, t.offset) for t in (a, b) if isinstance(t, Extent))  # of the bytes, torch is not needed
    return all(ours[0].read(ours[1] + r * size, size) == theirs[0].read(theirs[1] + r * size, size) for r in rows)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    at = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1:
            if stride != at:
                return False
            at *= n
    return True


def _offsets(start: int, box: Box, strides: Sequence[int]) -> Iterable[int]:
    """The bytes at which the runs of a box begin, in row-major order."""
    if not box:
        return (start,)
    (a, b), stride = box[0], strides[0]
    steps = range(start + a * stride, start + b * stride, stride)
    return steps if len(box) == 1 else itertools.chain.from_iterable(_offsets(s, box[1:], strides[1:]) for s in steps)


def _byteswapped(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    width = tensor.element_size() // (2 if tensor.is_complex() else 1)
    flat = tensor.reshape(-1).view(torch.uint8).reshape(-1, width).flip(-1)
    return flat.reshape(-1).view(tensor.dtype).reshape(tensor.shape)
