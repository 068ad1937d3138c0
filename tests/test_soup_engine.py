"""Merged tensors are the same whatever the blocks, threads, memory and loops; random masks are mergekit's formulas."""

from __future__ import annotations

import hashlib
import itertools
from unittest import mock

import numpy as np
import pytest
import torch

from surgery.errors import SurgeryError
from surgery.merging.engine import inputs as soup_inputs
from surgery.merging.engine import merged as engine
from surgery.merging.engine import order_statistics as select
from surgery.merging.engine import random_masks as masks
from surgery.merging.engine.inputs import Inputs
from surgery.merging.engine.merged import Merged
from surgery.merging.engine.pool import Engine, compiled_loops
from surgery.merging.methods.registry import METHODS
from surgery.merging.parameters import resolve
from surgery.tensors import lazy
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import lengths, whole


@pytest.fixture(params=["torch", "compiled"])
def loops(request):
    """The compiled loops or None, for tests that must hold with both."""
    if request.param == "torch":
        return None
    assert compiled_loops(), "numba, which the tests need, is not installed"
    return compiled_loops()


class Given(InMemory):
    """What is read may be overwritten."""

    def read(self, box):
        return super().read(box).clone()


def tensors(shape, count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    rest = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count - 1)]
    return [t.to(dtype) for t in [base, *rest]]


def options_of(name, count, given):
    method = METHODS[name]
    own = {"weight": [0.4, 0.7, 0.3], "density": [0.3, 0.6, 0.5], "gamma": [0.05, 0.01, 0.02], "t": 0.3} | given
    takers = count - (method.base != "ignored")
    out = {}
    for p in method.parameters:
        if p.scope == "all":
            out[p.name] = resolve(p, [own], "x", 0.0)
        else:
            values = own.get(p.name, [p.default] * takers)
            out[p.name] = list(values)[: takers if p.scope == "other" else count]
    return out


def merge(name, given, engine=None, kind="float32", work="float32", tensor="w", seed=3, loops=None, **own):
    base = None if METHODS[name].base == "ignored" else 0
    inputs = Inputs(tensor, [Given(t) for t in given], base, work, seed, engine or Engine(1, loops=loops))
    return Merged(METHODS[name].run, inputs, options_of(name, len(given), own), kind)


COUNT = {"passthrough": 1, "slerp": 2, "nearswap": 2, "arcee_fusion": 2, "linear": 3}
ALL = [(name, {}) for name in METHODS] + [
    ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("model_stock", {"filter_wise": True}),
    ("sce", {"select_topk": 0.3}),
    ("ties", {"rescale": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "own"), ALL, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain")
@pytest.mark.parametrize("shape", [(24, 50), (4, 10, 14), (900,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_box_in_any_threads_is_the_same(name, own, shape, dtype, loops, monkeypatch):
    """Chunks are fixed by the tensor; a box, a block size or a pool of threads changes no bit."""
    monkeypatch.setattr(soup_inputs, "CHUNK", 256)
    given = tensors(shape, COUNT.get(name, 3), dtype)
    full = merge(name, given, loops=loops, **own).full()
    monkeypatch.setattr(engine, "BLOCK", 64)
    monkeypatch.setattr(engine, "LARGE_BLOCK", 64)
    for memory in (1 << 14, 1 << 20):  # too little to hold the sources, and enough
        pool = Engine(3, memory, loops)
        try:
            lazy = merge(name, given, pool, **own)
            assert torch.equal(lazy.full(), full)
            generator = np.random.default_rng(1)
            for _ in range(4):
                box = tuple(tuple(sorted(generator.choice(n + 1, 2, replace=False).tolist())) for n in shape)
                assert torch.equal(lazy.read(box), full[tuple(slice(a, b) for a, b in box)])
        finally:
            pool.close()
    monkeypatch.setattr(soup_inputs, "CHUNK", 1 << 20)
    assert torch.allclose(merge(name, given, loops=loops, **own).full(), full, rtol=1e-4, atol=1e-6)


LARGE = {"density": [0.5, 0.2, 0.7]} | {"gamma": [0.1, 0.0, 0.3]}


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"normalize": False, "lambda": 0.7}, {"normalize": True, "rescale": True}, LARGE])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_compiled_loops_and_torch_give_the_same_bits(name, own):
    """Dtypes alone and mixed, infinities, zeros of both signs, many equal values, and any dtype of the result."""
    compiled = compiled_loops()
    count = COUNT.get(name, 3)
    for seed, shape in enumerate([(37, 75), (2, 30, 40), (1203,), (1, 1)]):
        kinds = [torch.float32, torch.bfloat16, torch.float16]
        for given in (
            *(tensors(shape, count, kind, seed) for kind in kinds),
            [t.to(kinds[i]) for i, t in enumerate(tensors(shape, count, seed=seed))],
            [(t * 4).round() / 4 for t in tensors(shape, count, torch.bfloat16, seed)],
            [t * (t.abs() > 1) * -1 for t in tensors(shape, count, torch.bfloat16, seed)],
        ):
            for kind in ("bfloat16", "float32", "float16"):
                ours, theirs = (merge(name, given, kind=kind, loops=k, **own).full() for k in (compiled, None))
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), (shape, given[0].dtype, kind)


@pytest.mark.parametrize("own", [{}, {"normalize": True, "rescale": True}])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if "density" in {p.name for p in m.parameters}))
def test_any_number_of_task_vectors_gives_the_same_bits_in_both_lanes(name, count, own):
    given = [t * (t.abs() > 0.3) for t in tensors((37, 75), count, torch.bfloat16)]
    lanes = (compiled_loops(), None)
    compiled, plain = (merge(name, given, kind="bfloat16", loops=k, **own).full() for k in lanes)
    assert torch.equal(compiled, plain)


def test_ranks_in_long_rows_of_few_different_values_are_those_of_a_sort():
    given = [(t * 4).round() / 4 for t in tensors((2, 20000), 3, torch.bfloat16)]
    compiled, plain = (merge("della", given, kind="float32", loops=k).full() for k in (compiled_loops(), None))
    assert torch.equal(compiled, plain)


@pytest.mark.parametrize("name", ["linear", "ties", "breadcrumbs_ties", "dare_ties", "sce", "model_stock", "slerp"])
def test_what_is_not_finite_stays_so(name, loops):
    """In both lanes: a NaN or an infinity of a model is not turned into a number."""
    given = tensors((40, 50), COUNT.get(name, 3), torch.bfloat16)
    given[-1][3, 7], given[-1][20, 1] = torch.nan, torch.inf
    made = merge(name, given, kind="bfloat16", loops=loops, density=[1.0, 1.0], gamma=[0.0, 0.0]).full()
    assert not made[3, 7].isfinite()
    assert not made[20, 1].isfinite()


@pytest.mark.parametrize("name", ["linear", "ties", "breadcrumbs", "breadcrumbs_ties", "nearswap", "ram", "ramplus_tl"])
def test_many_chunks_give_what_mergekit_gives(name, loops, monkeypatch):
    """Where nothing is summed over the tensor, cutting it into chunks changes no bit."""
    from mergekit.merge_methods.api import merge_tensors

    monkeypatch.setattr(soup_inputs, "CHUNK", 128)
    given = tensors((33, 41), COUNT.get(name, 3))
    options = options_of(name, len(given), {"epsilon": 0.05})
    theirs = merge_tensors(given, name, parameters=options, base_index=None if name == "linear" else 0)
    assert torch.equal(merge(name, given, loops=loops, epsilon=0.05).full(), theirs)


def splitmix64(place, key):
    """One number of the generator, in Python's integers."""
    x = (place * 0x9E3779B97F4A7C15 + key + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def numbers(key, count):
    """The documented random numbers in [0, 1), one after the other."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    coarse, fine = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
    first = [splitmix64(i // 4, coarse) >> 16 * (i % 4) & 0xFFFF for i in range(count)]
    rest = [splitmix64(i, fine) >> 27 for i in range(count)]
    return torch.tensor([(a + b / 2**37) / 2**16 for a, b in zip(first, rest, strict=True)], dtype=torch.float64)


@pytest.mark.parametrize("name", ["dare_ties", "dare_linear", "della", "della_linear"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(30, 44), (700,), (3, 14, 20)])
def test_random_methods_are_mergekits_with_the_same_mask(name, dtype, shape, loops):
    """Its `torch.bernoulli` is given our numbers; the rest is its own code."""
    from mergekit.merge_methods.api import merge_tensors

    from tests.merges import ties_by_place

    given = tensors(shape, 3, getattr(torch, dtype))
    options = options_of(name, 3, {"epsilon": [0.1, 0.15], "density": [0.3, 0.5]})
    calls = itertools.count()

    def bernoulli(probabilities):
        drawn = numbers((3, "w", next(calls)), probabilities.numel()).reshape(probabilities.shape)
        return (drawn < probabilities.double()).to(probabilities.dtype)

    with mock.patch("torch.bernoulli", bernoulli), ties_by_place():
        theirs = merge_tensors(given, name, parameters=options, base_index=0)
    own = {"epsilon": options.get("epsilon"), "density": options["density"]}
    ours = merge(name, given, kind=dtype, work=dtype, loops=loops, **{k: v for k, v in own.items() if v}).full()
    assert next(calls) == 2
    assert torch.equal(ours, theirs)


def test_masks_have_their_density_and_belong_to_seed_tensor_and_source():
    def kept(seed=0, name="w", source=0, density=0.3):
        return masks.below((seed, name, source), [(0, 200_000)], density)

    first = kept()
    assert abs(first.mean() - 0.3) < 0.005
    for other in (kept(seed=1), kept(name="v"), kept(source=1)):
        assert abs((first & other).mean() - 0.09) < 0.005
    assert (kept() == first).all()
    for lag in (1, 2, 3, 4, 5):  # four elements share a hash
        assert abs((first[lag:] & first[:-lag]).mean() - 0.09) < 0.005


@pytest.mark.parametrize("density", [0.0, 1e-7, 2**-16, 0.3, 0.5, 0.7 - 2**-20, 1.0])
def test_an_element_stays_if_its_number_is_below_the_density(density):
    own = numbers((1, "t", 0), 3001).numpy()
    near = int(np.abs(own - density).argmin())
    for limit in (density, own[near], np.nextafter(own[near], 1)):  # a number that only the last bits tell apart
        chosen = masks.below((1, "t", 0), [(0, 3001)], limit)
        assert (chosen == (own < limit)).all()
        each = masks.below((1, "t", 0), [(0, 3001)], np.full(3001, limit))
        assert (each == chosen).all()


def test_random_numbers_do_not_depend_on_how_they_are_asked_for():
    whole_ = masks.below((1, "t", 0), [(0, 1001)], 0.4)
    pieces = [(0, 3), (7, 5), (12, 1), (500, 501)]
    assert (masks.below((1, "t", 0), pieces, 0.4) == np.concatenate([whole_[a : a + n] for a, n in pieces])).all()
    box = ((1, 3), (0, 4), (2, 5))
    index = np.arange(5 * 4 * 6).reshape(5, 4, 6)[1:3, 0:4, 2:5].reshape(-1)
    flat = np.concatenate([np.arange(a, a + n) for a, n in masks.runs((5, 4, 6), box)])
    assert (flat == index).all()


def test_marks_give_back_what_was_noted_in_any_runs():
    chosen = masks.below((1, "t", 0), [(0, 1000)], 0.4)
    marks = masks.Bitmap(2, 1000)
    for start, stop in ((616, 1000), (0, 16), (16, 616)):
        marks.put(0, [(start, stop - start)], chosen[start:stop])
        marks.put(1, [(start, stop - start)], ~chosen[start:stop])
    assert not marks.complete
    marks.close()
    assert marks.complete
    for start, stop in itertools.combinations((0, 5, 12, 13, 14, 200, 609, 616, 617, 999, 1000), 2):
        assert (marks.get(0, [(start, stop - start)]) == chosen[start:stop]).all()
    assert (marks.get(1, [(3, 20), (600, 50)]) == ~np.concatenate([chosen[3:23], chosen[600:650]])).all()


def test_marks_that_would_share_a_byte_are_given_up():
    marks = masks.Bitmap(1, 100)
    marks.put(0, [(50, 50)], np.ones(50, bool))
    marks.close()
    assert not marks.complete


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("chunk", "bins"), [(64, 3), (64, 12), (1 << 14, 12)])
def test_selection_is_a_stable_sort(dtype, last, chunk, bins, loops, monkeypatch):
    """The n-th of values full of ties, and which element it is, in one pass or (too many in a bracket) in several."""
    monkeypatch.setattr(soup_inputs, "CHUNK", chunk)
    monkeypatch.setattr(select, "BINS", bins)
    generator = torch.Generator().manual_seed(4)
    values = (torch.randint(0, 40, (13, 29), generator=generator) / 8).to(dtype)
    passes = selected(values, last, (0, 1, 100, 188, 376), loops)
    assert (max(passes) > 1) == (chunk == 64)


def selected(values, last, ranks, loops):
    """Check the elements of these ranks against a stable sort; how many passes each took."""
    inputs = Inputs("w", [Given(values)], None, str(values.dtype).removeprefix("torch."), 0, Engine(1, loops=loops))
    scans, scan = [], inputs.scan
    inputs.scan = lambda fn: scans.append(1) or scan(fn)
    flat = values.reshape(-1)
    order = torch.sort(flat, descending=last, stable=True).indices
    order, passes = order.flip(0) if last else order, []
    for rank in ranks:
        before = len(scans)
        found = select.order(inputs, lambda block: [t.abs() for t in block.tensors], [select.Query(0, rank, last)])[0]
        assert found.value == float(flat[order[rank]])
        assert found.index == int(order[rank])
        passes.append(len(scans) - before)
    return passes


@pytest.mark.parametrize("kind", ["sorted", "rows of other sizes", "the sample misses", "two values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_of_unusual_orders_takes_few_passes(kind, dtype, loops, monkeypatch):
    """Where a bracket crowds one chunk, or a rank lies outside it."""
    monkeypatch.setattr(soup_inputs, "CHUNK", 1 << 13)
    monkeypatch.setattr(select, "SLICES", 4)
    monkeypatch.setattr(select, "SLICE", 1 << 8)
    values = torch.rand((1 << 6, 1 << 10), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    if kind == "sorted":
        values = values.reshape(-1).sort().values.reshape(values.shape)
    elif kind == "rows of other sizes":
        values = torch.where(torch.arange(64)[:, None] % 8 == 3, values * 1e-3 + 0.5, values)
    elif kind == "two values":
        values = (values > 0.5).double()
    else:
        flat = values.reshape(-1)
        for i in range(64):  # the places of the sample hold large values only
            flat[flat.numel() * i // 64 // 256 * 256 :][:256] += 100
    passes = selected(values.to(dtype), True, (0, 7, 20_000, 32_768, 65_535), loops)
    assert 1 < max(passes) <= (4 if dtype == torch.float32 else 7)


def test_boxes_of_flat_ranges_cover_them_in_order():
    shape = (3, 4, 5)
    table = torch.arange(60).reshape(shape)
    for start, stop in itertools.combinations(range(0, 61, 7), 2):
        read = [table[tuple(slice(a, b) for a, b in box)].reshape(-1) for box in lazy.ranges(shape, start, stop)]
        assert torch.cat(read).tolist() == list(range(start, stop))


def test_bad_numbers_are_told_with_the_tensor():
    given = tensors((4, 6), 3)
    for name, own in (("linear", {"weight": [1.0, -1.0, 0.0]}), ("della", {"density": [0.9, 0.5]})):
        with pytest.raises(SurgeryError, match=r"^w: "):
            merge(name, given, **own).full()


def test_empty_and_scalar_tensors(loops):
    for shape in ((0, 4), (1,), ()):
        given = tensors(shape, 3)
        for name in ("linear", "ties", "slerp", "model_stock", "dare_ties"):
            got = merge(name, given[: COUNT.get(name, 3)], loops=loops).read(whole(shape))
            assert list(got.shape) == lengths(whole(shape))
