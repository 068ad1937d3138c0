"""Named axes: `"(g n d) h"` says how the dimensions of a tensor are products of the axes of a model.

    q = Named(lazy, parse("(g n d) h"), {"g": 8, "n": 4, "two": 2, "half": 64, "h": 4096})
    q.to(parse("(g n half two) h"))          # rotary pairs side by side, as Meta stores them
    q.take("g", 0, 4)                        # the rows of the first four key/value groups

A pattern lists the dimensions of a tensor; parentheses multiply several axes into one dimension, the first varying
slowest, as in einops.  `d` is short for `two half`: the two halves of a head that rotary embeddings turn against
each other.  Everything is lazy: rearranging reads nothing, and reading a box of the result reads just the elements
of the source that lie in it.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from surgery.errors import LayoutError
from surgery.tensors.lazy import Box, Concat, Lazy, Shape, Slice, lengths

if TYPE_CHECKING:
    import torch

Axes = tuple[tuple[str, ...], ...]  # "(g n d) h"  ->  (("g", "n", "two", "half"), ("h",))
Span = tuple[int, int]

STAR = "*"  # the axis along which the parts of a fused tensor are joined


def parse(pattern: str) -> Axes:
    """The axes of a pattern: one tuple per dimension."""
    tokens = re.findall(r"\([^()]*\)|[\w*]+", pattern)
    if " ".join(tokens) != " ".join(pattern.split()):
        raise ValueError(f"{pattern!r} is no pattern of axes")
    groups = [token.strip("()").split() for token in tokens]
    axes = tuple(tuple(a for x in g for a in (("two", "half") if x == "d" else (x,))) for g in groups)
    if len(set(flat(axes))) != len(flat(axes)):
        raise ValueError(f"{pattern!r} names an axis twice")
    return axes


@functools.cache
def flat(axes: Axes) -> tuple[str, ...]:
    return tuple(a for group in axes for a in group)


def pattern(axes: Axes) -> str:
    """The inverse of `parse`, for messages."""
    text = " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in axes)
    return text.replace("two half", "d")


class Rearrange(Lazy):
    """A permutation of named axes, pulled back box by box; `left` are the axes of `src`, `right` those of self."""

    __slots__ = ("dtype", "left", "right", "shape", "sizes", "src")

    def __init__(self, src: Lazy, left: Axes, right: Axes, sizes: Mapping[str, int]) -> None:
        assert _same_axes(left, right), (left, right)
        assert src.shape == shape_of(left, sizes), (src, left, sizes)
        self.src, self.left, self.right, self.dtype = src, left, right, src.dtype
        self.sizes = {a: sizes[a] for a in flat(left)}
        self.shape = shape_of(right, sizes)

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src,)

    def read(self, box: Box) -> torch.Tensor:
        import torch

        order = flat(self.left)
        permutation = [order.index(a) for a in flat(self.right)]
        cover = [list(_cover(*span, [self.sizes[a] for a in g])) for span, g in zip(box, self.right, strict=True)]
        out = None
        for combo in itertools.product(*cover):
            spans = {a: s for (_, _, ss), g in zip(combo, self.right, strict=True) for a, s in zip(g, ss, strict=True)}
            got = self._read_spans(spans).permute(permutation)
            if all(len(pieces) == 1 for pieces in cover):
                return got.reshape(lengths(box))  # copies only if the order of the elements changes
            if out is None:
                out = torch.empty(lengths(box), dtype=self.torch_dtype)
            target = out[tuple(slice(at, at + n) for at, n, _ in combo)]
            _split(target, [[b - a for a, b in ss] for _, _, ss in combo]).copy_(got)
        return torch.empty(lengths(box), dtype=self.torch_dtype) if out is None else out

    def _read_spans(self, spans: Mapping[str, Span]) -> torch.Tensor:
        """The block of the source in which every axis is limited to its span; one dimension per axis."""
        import torch

        lens = [spans[a][1] - spans[a][0] for a in flat(self.left)]
        runs = [list(_runs([spans[a] for a in g], [self.sizes[a] for a in g])) for g in self.left]
        if all(len(r) == 1 for r in runs):
            return self.src.read(tuple(r[0] for r in runs)).reshape(lens)
        out = torch.empty([sum(b - a for a, b in r) for r in runs], dtype=self.torch_dtype)
        starts = [list(itertools.accumulate((b - a for a, b in r), initial=0)) for r in runs]
        for index in itertools.product(*(range(len(r)) for r in runs)):
            part = self.src.read(tuple(r[i] for r, i in zip(runs, index, strict=True)))
            where = zip(starts, index, part.shape, strict=True)
            out[tuple(slice(at[i], at[i] + n) for at, i, n in where)] = part
        return out.reshape(lens)


def shape_of(axes: Axes, sizes: Mapping[str, int]) -> Shape:
    return tuple([sizes[g[0]] if len(g) == 1 else math.prod([sizes[a] for a in g]) for g in axes])


# There are few patterns and many tensors: what depends on the patterns alone is found once.


@functools.cache
def _same_axes(left: Axes, right: Axes) -> bool:
    return sorted(flat(left)) == sorted(flat(right))


class _Move(NamedTuple):
    """From one pattern to another: axes (of size one) that come and go, and both sides with all of them."""

    new: tuple[str, ...]
    gone: tuple[str, ...]
    source: Axes
    target: Axes


@functools.cache
def _move(left: Axes, axes: Axes) -> _Move:
    have, want = set(flat(left)), set(flat(axes))
    new, gone = tuple(sorted(want - have)), tuple(sorted(have - want))
    return _Move(new, gone, (*left[:-1], left[-1] + new), (*axes[:-1], axes[-1] + gone))


@functools.cache
def _dimension(axes: Axes, names: str) -> tuple[Axes, int]:
    """The axes, one dimension each but for `names` which share one, and where that one is."""
    group = tuple(names.split())
    single = tuple((a,) for a in flat(axes))
    at = single.index(group[:1])
    assert flat(single[at : at + len(group)]) == group, (names, axes)
    return (*single[:at], group, *single[at + len(group) :]), at


def _split(tensor: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """A view with every dimension split into its axes."""
    for dim in reversed(range(len(groups))):
        if len(groups[dim]) != 1:
            tensor = tensor.unflatten(dim, list(groups[dim])) if groups[dim] else tensor.squeeze(dim)
    return tensor


def _cover(lo: int, hi: int, sizes: Sequence[int], at: int = 0) -> Iterator[tuple[int, int, tuple[Span, ...]]]:
    """Cover the flat range [lo, hi) of a product of axes by boxes: yields (place, length, one span per axis)."""
    if lo >= hi:
        return
    if len(sizes) <= 1:
        yield at, hi - lo, ((lo, hi),) * len(sizes)
        return
    inner = math.prod(sizes[1:])
    (a, head), (b, tail) = divmod(lo, inner), divmod(hi, inner)
    if head or a == b:
        stop = tail if a == b else inner
        for p, n, rest in _cover(head, stop, sizes[1:], at):
            yield p, n, ((a, a + 1), *rest)
        if a == b:
            return
        at, a = at + inner - head, a + 1
    if a < b:
        yield at, (b - a) * inner, ((a, b), *((0, s) for s in sizes[1:]))
        at += (b - a) * inner
    for p, n, rest in _cover(0, tail, sizes[1:], at):
        yield p, n, ((b, b + 1), *rest)


def _runs(spans: Sequence[Span], sizes: Sequence[int]) -> Iterator[Span]:
    """The contiguous flat ranges that a box of a product of axes covers, in order."""
    k = len(sizes)
    while k and spans[k - 1] == (0, sizes[k - 1]):
        k -= 1
    if k == 0:
        yield 0, math.prod(sizes)
        return
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    lo, hi = spans[k - 1]
    for index in itertools.product(*(range(a, b) for a, b in spans[: k - 1])):
        base = sum(i * s for i, s in zip(index, strides, strict=False))
        yield base + lo * strides[k - 1], base + hi * strides[k - 1]


@dataclass(frozen=True, eq=False)
class Named:
    """A lazy tensor whose dimensions are products of named axes of the given sizes."""

    data: Lazy
    axes: Axes
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.data.shape != shape_of(self.axes, self.sizes):
            measures = ", ".join(f"{a}={self.sizes[a]}" for a in flat(self.axes))
            raise LayoutError(f"has shape {list(self.data.shape)}, but {pattern(self.axes)!r} with {measures}"
                              f" is {list(shape_of(self.axes, self.sizes))}")  # fmt: skip

    def to(self, axes: Axes) -> Named:
        """Reorder and regroup.  Axes of size one may come and go; all others must be the same on both sides."""
        src, left = self.data, self.axes
        if left == axes:
            return self
        if isinstance(src, Rearrange) and src.right == left and all(src.sizes[a] == self.sizes[a] for a in flat(left)):
            left, src = src.left, src.src  # two rearrangements are one
        if not axes or not left:  # 0-dim tensors have no dimension to put an axis of size one into
            for a in flat(left):
                self._drop(a, axes)
            assert left == axes, (left, axes)
            return self
        move = _move(left, axes)
        for a in move.gone:
            self._drop(a, axes)
        sizes = {**self.sizes, **dict.fromkeys(move.new, 1)} if move.new else self.sizes
        data = src if move.source == move.target else Rearrange(src, move.source, move.target, sizes)
        return Named(data, axes, sizes)

    def _drop(self, axis: str, axes: Axes) -> None:
        if self.sizes[axis] != 1:
            raise LayoutError(f"axis {axis!r} of size {self.sizes[axis]} has no place in {pattern(axes)!r}")

    def split(self, names: str) -> Named:
        """With a dimension for each axis, `names` together: what `take` needs, made once for many."""
        return self.to(_dimension(self.axes, names)[0])

    def take(self, names: str, start: int, stop: int) -> Named:
        """Narrow to [start, stop) along one axis, or along the product of adjacent ones ("g n")."""
        axes, at = _dimension(self.axes, names)
        if (start, stop) == (0, math.prod(self.sizes[a] for a in names.split())):
            return self
        wide = self.to(axes)
        sizes = {**wide.sizes, **_merged(names, stop - start)}
        return Named(Slice(wide.data, at, start, stop), axes, sizes)

    @staticmethod
    def cat(parts: Sequence[Named], names: str) -> Named:
        """Join along one axis, or along the product of adjacent ones."""
        if len(parts) == 1:
            return parts[0]
        axes, at = _dimension(parts[0].axes, names)
        data = [p.to(axes).data for p in parts]
        sizes = {**parts[0].sizes, **_merged(names, sum(t.shape[at] for t in data))}
        return Named(Concat(data, at), axes, sizes)

    def rename(self, old: tuple[str, ...], new: tuple[str, ...], sizes: Mapping[str, int]) -> Named:
        """Give the axes of one dimension other names and sizes, of the same product."""
        assert old in self.axes, (old, self.axes)
        axes = tuple(new if g == old else g for g in self.axes)
        return Named(self.data, axes, {**self.sizes, **sizes})


def _merged(names: str, n: int) -> dict[str, int]:
    """Sizes for a narrowed or joined product of axes: the first carries all."""
    first, *others = names.split()
    return {first: n, **dict.fromkeys(others, 1)}
