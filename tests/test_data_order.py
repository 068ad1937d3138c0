"""The order of a run: a permutation of what is taken, even passes, held-out rows that no seed touches; and packing."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.data.plans import order
from surgery.data.plans.order import Taken, heldout_of, make_order, passes, sample, split
from surgery.data.plans.packing import Packed, best_fit, pack
from surgery.errors import ConfigError

sources = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 9), st.floats(0, 3.5)).map(lambda t: (t[0], t[1], int(t[0] * t[2]))),
    min_size=1,
    max_size=5,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(sources, st.integers(0, 2**63 - 1), st.integers(1, 7))
def test_every_instance_comes_as_often_as_any_other(given_sources, seed, block):
    """Counts differ by at most one, held-out instances never come, and there is nothing else in it."""
    taken = [Taken(f"s{i}", have, out, take) for i, (have, out, take) in enumerate(given_sources)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK", block)
        source, instance = split(make_order(taken, seed, 0))
    for number, s in enumerate(taken):
        counts = Counter(instance[source == number].tolist())
        assert sum(counts.values()) == s.take
        allowed = set(range(s.have + s.heldout)) - set(heldout_of(s.have, s.heldout).tolist())
        assert set(counts) <= allowed and len(allowed) == s.have
        often = [counts[i] for i in allowed]
        assert max(often) - min(often) <= 1


TAKEN = [Taken("web", 900, 3, 1300), Taken("math", 50, 2, 200)]


def test_the_seed_decides_the_order_and_the_sample_seed_which_part_is_taken():
    a, b, c = make_order(TAKEN, 1, 0), make_order(TAKEN, 2, 0), make_order(TAKEN, 1, 5)
    assert (a == make_order(TAKEN, 1, 0)).all()
    assert (a != b).any() and sorted(a) == sorted(b)
    assert sorted(a) != sorted(c)
    math_alone = make_order(TAKEN[1:], 1, 0) | np.uint64(1 << 40)
    assert set(math_alone) == set(a[a >> np.uint64(40) == 1])  # which part is taken depends on no other source


def test_the_order_is_what_it_was():
    """A plan that is made again with these versions is the same; one that is on disk does not depend on them."""
    digest = hashlib.sha256(make_order(TAKEN, 42, 0).astype("<u8").tobytes()).hexdigest()
    assert digest == "6bf36f29e29d630e75f943fee09e6d7627c711a7c6f0d71420120162e6149d61"


def test_held_out_instances_are_spread_evenly():
    assert heldout_of(999, 1).tolist() == [500]
    assert heldout_of(6, 3).tolist() == [1, 4, 7]
    assert heldout_of(5, 0).tolist() == []
    for have, out in ((1000, 7), (3, 40), (1, 1)):
        found = heldout_of(have, out)
        assert len(set(found.tolist())) == out and 0 <= found.min() <= found.max() < have + out


@pytest.mark.slow
def test_a_partial_pass_is_a_fair_sample():
    """Every instance is drawn equally often, in blocks as in one piece (chi-square, 6 sigma)."""
    counts = np.zeros(23)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK", 5)
        for seed in range(4000):
            found = np.concatenate(list(sample(23, 9, np.random.default_rng(seed))))
            assert len(set(found.tolist())) == 9
            counts[found] += 1
    expected = 4000 * 9 / 23
    chi = ((counts - expected) ** 2 / (expected * (1 - 9 / 23))).sum() * 22 / 23
    assert abs(chi - 22) < 6 * np.sqrt(2 * 22)


def test_passes_over_nothing_and_too_much():
    assert list(passes(0, 0, np.random.default_rng(0))) == []
    with pytest.raises(ConfigError, match="one source can have 999,999,999"):
        make_order([Taken("big", 10**9, 0, 5)], 0, 0)


def naive_best_fit(sizes: list[int], room: int) -> list[int]:
    """The room left in every bin, one piece after the other."""
    bins: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b, left in enumerate(bins) if left >= size]
        if not fitting:
            bins.append(room)
            fitting = [len(bins) - 1]
        bins[min(fitting, key=lambda b: bins[b])] -= size
    return sorted(bins)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.integers(1, 30), st.data())
def test_best_fit_packs_as_a_loop_does(room, data):
    sizes = data.draw(st.lists(st.integers(1, room), max_size=50))
    bins, placed = best_fit(np.array(sizes, np.int64), room)
    assert sorted(placed.tolist()) == list(range(len(sizes)))
    filled = np.bincount(bins, sizes) if sizes else np.zeros(0)
    assert sorted((room - filled).tolist()) == naive_best_fit(sizes, room)


documents = st.lists(st.integers(0, 70), max_size=30)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(documents, st.integers(1, 20))
def test_packing_uses_every_token_once_and_splits_only_what_does_not_fit(lengths, room):
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - np.array(lengths, np.int64)
    packed = pack(starts, ends, room, "best_fit")
    pieces = [p for i in range(len(packed)) for p in packed.pieces(i).tolist()]
    assert sorted(t for a, b in pieces for t in range(a, b)) == list(range(sum(lengths)))
    for i in range(len(packed)):
        assert 0 < sum(b - a for a, b in packed.pieces(i).tolist()) <= room
    whole = {(int(a), int(b)) for a, b in zip(starts, ends, strict=True) if 0 < b - a <= room}
    assert whole <= {(a, b) for a, b in pieces}
    assert len(pieces) == sum(-(-n // room) for n in lengths)


def test_one_document_to_an_instance():
    starts, ends = np.array([0, 5, 5, 30]), np.array([5, 5, 30, 33])
    packed = pack(starts, ends, 10, "document")
    assert isinstance(packed, Packed)
    assert [packed.pieces(i).tolist() for i in range(len(packed))] == [[[0, 5]], [[5, 15]], [[30, 33]]]


@pytest.mark.parametrize("take", [2**50, 2**61, 10**30])
def test_an_order_that_no_memory_holds(take):
    with pytest.raises(ConfigError, match=f"an order of {take:,} instances needs .* of memory"):
        make_order([Taken("a", 5, 0, take)], 0, 0)


def test_memory_is_that_of_the_order_and_some_blocks():
    taken = [Taken("web", 20_000_000, 1000, 1_500_000), Taken("math", 400_000, 0, 1_500_000)]
    tracemalloc.start()
    found = make_order(taken, 0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 3_000_000
    assert peak < found.nbytes + 6 * 8 * order.BLOCK
