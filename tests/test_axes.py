"""Named axes against einops and numpy, on random patterns, sizes and boxes."""

from __future__ import annotations

import itertools
import math

import einops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import LayoutError
from surgery.tensors.axes import Named, Rearrange, flat, parse, pattern
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import Concat, Fill, Map, Same, Slice, boxes, whole


class Memory(InMemory):
    """A lazy tensor in memory that counts what is read of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self.elements = 0

    def read(self, box):
        got = super().read(box).clone()
        self.elements += got.numel()
        return got


@st.composite
def groupings(draw, letters):
    """The letters in some order, as dimensions of one or more axes."""
    order = draw(st.permutations(letters))
    cuts = draw(st.lists(st.booleans(), min_size=len(order) - 1, max_size=len(order) - 1))
    groups = [[order[0]]]
    for letter, cut in zip(order[1:], cuts, strict=True):
        groups.append([letter]) if cut else groups[-1].append(letter)
    return tuple(tuple(g) for g in groups)


@st.composite
def rearrangements(draw):
    letters = [*"gnhve"][: draw(st.integers(2, 5))]
    sizes = {a: draw(st.integers(1, 5)) for a in letters}
    return draw(groupings(letters)), draw(groupings(letters)), sizes


def box_of(draw, shape):
    spans = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return tuple((a, b) for a, b in spans)


def einops_pattern(axes):
    return " ".join(f"({' '.join(g)})" for g in axes)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(rearrangements(), st.data())
def test_rearrange_is_einops(case, data):
    left, right, sizes = case
    shape = [math.prod(sizes[a] for a in g) for g in left]
    source = torch.arange(math.prod(shape)).reshape(shape)
    want = einops.rearrange(source, f"{einops_pattern(left)} -> {einops_pattern(right)}", **sizes)
    memory = Memory(source)
    lazy = Named(memory, left, sizes).to(right).data
    assert torch.equal(lazy.full(), want)
    memory.elements = 0
    box = box_of(data.draw, want.shape)
    got = lazy.read(box)
    assert torch.equal(got, want[tuple(slice(a, b) for a, b in box)])
    assert memory.elements == got.numel()  # nothing else was read


@settings(max_examples=150, deadline=None)
@given(rearrangements(), st.data())
def test_take_and_cat_are_inverse(case, data):
    left, right, sizes = case
    shape = [math.prod(sizes[a] for a in g) for g in left]
    source = torch.arange(math.prod(shape)).reshape(shape)
    axis = data.draw(st.sampled_from(sorted(sizes)))
    cut = data.draw(st.integers(0, sizes[axis]))
    named = Named(Memory(source), left, sizes)
    parts = [named.take(axis, a, b) for a, b in ((0, cut), (cut, sizes[axis])) if b > a]
    assert torch.equal(Named.cat(parts, axis).to(right).data.full(), named.to(right).data.full())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=4), st.integers(1, 200))
def test_boxes_cover_a_shape_once_in_order(shape, limit):
    flat_order = torch.arange(math.prod(shape)).reshape(shape)
    seen = [flat_order[tuple(slice(a, b) for a, b in box)].reshape(-1) for box in boxes(tuple(shape), 4, limit)]
    assert all(s.numel() * 4 <= max(limit, 4) for s in seen)
    assert torch.equal(torch.cat([*seen, flat_order.new_empty(0)]), flat_order.reshape(-1))


def test_two_rearrangements_are_one():
    named = Named(Memory(torch.arange(24).reshape(6, 4)), parse("(g n) h"), {"g": 2, "n": 3, "h": 4})
    twice = named.to(parse("h (n g)")).to(parse("(n g) h"))
    assert isinstance(twice.data, Rearrange)
    assert isinstance(twice.data.src, Memory)
    back = twice.to(parse("(g n) h"))
    assert isinstance(back.data, Memory)


def test_weaving_reads_nothing_extra():
    g, n, d, h = 3, 2, 4, 5
    q, k, v = (Memory(torch.randn(g * m * d, h)) for m in (n, 1, 1))
    sizes = {"g": g, "n": n, "two": 2, "half": d // 2, "h": h}
    strands = []
    for part, star in ((q, ("n",)), (k, ()), (v, ())):
        one = Named(part, parse("(g n d) h") if star else parse("(g d) h"), sizes)
        one = one.to((("g",), star, ("two",), ("half",), ("h",)))
        strands.append(one.rename(star, ("*",), {"*": n if star else 1}))
    woven = Named.cat(strands, "*").to(parse("(g * d) h")).data
    rows = [t.tensor.reshape(g, -1, d, h) for t in (q, k, v)]
    want = torch.cat(rows, 1).reshape(-1, h)
    for a, b in itertools.combinations(range(want.shape[0] + 1), 2):
        for part in (q, k, v):
            part.elements = 0
        assert torch.equal(woven.read(((a, b), (1, 4))), want[a:b, 1:4])
        assert sum(part.elements for part in (q, k, v)) == (b - a) * 3


def test_patterns():
    assert parse("(g n d) h") == (("g", "n", "two", "half"), ("h",))
    assert pattern(parse("(g * d) h")) == "(g * d) h"
    assert flat(parse("l e (* m) h")) == ("l", "e", "*", "m", "h")
    for bad in ("(g n", "g n) h", "g g", "g-n"):
        with pytest.raises(ValueError, match=r"pattern|twice"):
            parse(bad)


def test_a_wrong_shape_is_told_with_pattern_and_sizes():
    with pytest.raises(LayoutError, match=r"has shape \[6, 4\], but '\(g n\) h' with g=2, n=2, h=4 is \[4, 4\]"):
        Named(Memory(torch.zeros(6, 4)), parse("(g n) h"), {"g": 2, "n": 2, "h": 4})


def test_slices_and_joins():
    a, b = Memory(torch.arange(12).reshape(4, 3)), Memory(torch.arange(100, 106).reshape(2, 3))
    joined = Concat((a, b), 0)
    assert torch.equal(joined[3:5, 1:], torch.tensor([[10, 11], [101, 102]]))
    assert torch.equal(Slice(Slice(joined, 0, 1, 6), 0, 2, 4).full(), torch.cat([a.tensor, b.tensor])[3:5])
    assert torch.equal(joined[-1], b.tensor[1])
    assert torch.equal(joined[..., 2], torch.tensor([2, 5, 8, 11, 102, 105]))
    assert Fill((2, 3), "bfloat16", 1.5).read(((0, 1), (0, 3))).tolist() == [[1.5] * 3]
    with pytest.raises(IndexError, match="step 1"):
        joined[::2]
    with pytest.raises(LayoutError, match="cannot join"):
        Concat((a, Fill((2, 4), "int64")), 0)


def test_maps_and_copies():
    a = Memory(torch.arange(6.0).reshape(2, 3))
    doubled = Map(lambda t: t * 2, (a,))
    assert doubled.read(((1, 2), (0, 2))).tolist() == [[6, 8]]
    sorted_rows = Map(lambda t: t.flip(0), (a,), whole=True)
    assert sorted_rows.read(((0, 1), (1, 3))).tolist() == [[4, 5]]
    assert Same((a, Memory(a.tensor.clone())), "norm").full().equal(a.tensor)
    other = a.tensor.clone()
    other[1, 2] = -0.0 if other[1, 2] == 0 else other[1, 2] + 1
    with pytest.raises(LayoutError, match="norm should be the same on every rank"):
        Same((a, Memory(other)), "norm").read(whole((2, 3)))
    assert Same((a, Memory(other)), "norm").read(((0, 1), (0, 3))).equal(a.tensor[:1])
