"""Tensors that lie one after the other in flat buffers: where each begins, and each as a lazy tensor of its shape.

at = aligned([("a", (3, 5)), ("b", (7,))], 64)      # {"a": 0, "b": 64}, and 71 in all
cut(buffer, 64, (7,))
joined([(0, a), (64, b)])                           # the buffer again, with zeros from 15 to 64
fill([(3, 5), (7,), (4,)], [71, 4], 64)              # [(0, 0), (0, 64), (1, 0)]: bucket, and place in it
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from surgery.errors import LayoutError
from surgery.tensors.axes import Rearrange
from surgery.tensors.lazy import Concat, Fill, Lazy, Shape, Slice


def cut(buffer: Lazy, start: int, shape: Shape) -> Lazy:
    """The tensor whose elements, row-major, are those from `start` on.  Raises LayoutError if there are too few."""
    stop = start + math.prod(shape)
    if len(buffer.shape) != 1 or not 0 <= start <= stop <= buffer.shape[0]:
        raise LayoutError(f"a flat buffer of shape {list(buffer.shape)[:8]} has no elements {start} to {stop}")
    return reshaped(Slice(buffer, 0, start, stop), shape)


def reshaped(flat: Lazy, shape: Shape) -> Lazy:
    """A tensor of one dimension in another shape of as many elements."""
    if len(shape) == 1:
        return flat
    if flat.shape != (math.prod(shape),):
        raise LayoutError(f"{list(flat.shape)[:8]} elements do not make the shape {list(shape)[:8]}")
    axes = tuple(f"d{i}" for i in range(len(shape)))
    return Rearrange(flat, (axes,), tuple((a,) for a in axes), dict(zip(axes, shape, strict=True)))


def flattened(tensor: Lazy) -> Lazy:
    """A tensor's elements in one dimension, row-major."""
    axes = tuple(f"d{i}" for i in range(len(tensor.shape)))
    return Rearrange(tensor, tuple((a,) for a in axes), (axes,), dict(zip(axes, tensor.shape, strict=True)))


def joined(pieces: Iterable[tuple[int, Lazy]]) -> Lazy:
    """A flat buffer of tensors, each from its place on, in ascending order; zeros between them."""
    out: list[Lazy] = []
    at = 0
    for start, tensor in pieces:
        gap = [Fill((start - at,), tensor.dtype)] if start > at else []
        out += [*gap, flattened(tensor)]
        at = start + math.prod(tensor.shape)
    return Concat(out, 0)


def aligned(
    shapes: Iterable[tuple[str, Shape]], to: int, bucket: int | None = None, alone: Collection[str] = ()
) -> tuple[dict[str, int], int]:
    """Where each tensor begins, at multiples of `to` in its bucket, and how many elements there are in all.

    A bucket ends with the tensor that fills it up to `bucket` elements; the next one follows without a gap.  Those that
    are `alone` have buckets of their own; the one before ends with the gap that they begin behind.
    """
    out: dict[str, int] = {}
    begin = at = 0
    for name, shape in shapes:
        at += -(at - begin) % to
        out[name] = at
        at += math.prod(shape)
        if name in alone or (bucket is not None and at - begin >= bucket):
            begin = at
    return out, at


def fill(shapes: Iterable[Shape], sizes: Sequence[int], to: int) -> list[tuple[int, int]] | None:
    """(bucket, place in it) of each tensor, at multiples of `to`, in buckets of these sizes; None if they fill them
    not exactly.  A bucket may end with the gap before the next tensor."""
    out: list[tuple[int, int]] = []
    bucket = at = 0
    for shape in shapes:
        count, start = math.prod(shape), at + -at % to
        if bucket < len(sizes) and start + count > sizes[bucket]:
            if sizes[bucket] not in (at, start):
                return None
            bucket, start = bucket + 1, 0
        if bucket == len(sizes) or start + count > sizes[bucket]:
            return None
        out.append((bucket, start))
        at = start + count
    return out if bucket + 1 == len(sizes) and at == sizes[bucket] else None
