"""Sources that fit into memory are read once, however often a method looks at them; and nothing is held for long."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.merging.engine import inputs as soup_inputs
from surgery.merging.engine import merged as engine
from surgery.merging.engine.cache import SourceCache
from surgery.merging.engine.pool import Engine, compiled_loops
from surgery.tensors.lazy import lengths
from test_soup_engine import Given, merge, tensors


class Counted(Given):
    """Notes how many elements were read."""

    def __init__(self, tensor):
        super().__init__(tensor)
        self.elements = 0

    def read(self, box):
        self.elements += int(np.prod(lengths(box)))
        return super().read(box)


def chunk(first, count):
    return np.stack([np.arange(first, first + count), np.arange(first, first + count) + 1000]).astype(np.uint16)


def test_what_was_put_comes_back_in_parts_of_any_cut():
    held = SourceCache(1 << 20)
    for first, count in [(20, 10), (0, 20), (30, 5)]:
        held.put("a", first, chunk(first, count))
    for start, stop in [(0, 20), (3, 9), (15, 35), (20, 30), (34, 35)]:
        found = np.concatenate(held.take("a", start, stop, last=False), axis=1)
        assert (found == chunk(start, stop - start)).all()
    assert held.take("a", 30, 36, last=False) == []  # the last is not there
    assert held.take("b", 0, 5, last=False) == []


def test_what_was_taken_for_the_last_time_is_let_go():
    held = SourceCache(1 << 20)
    held.put("a", 0, chunk(0, 20))
    held.put("a", 20, chunk(20, 10))
    assert len(held.take("a", 0, 25, last=True)) == 2
    assert held.nbytes == 2 * 2 * 10  # the second is not at its end
    assert held.take("a", 0, 5, last=False) == []
    assert len(held.take("a", 25, 30, last=True)) == 1
    assert held.nbytes == 0


def test_the_oldest_go_when_there_is_no_room():
    held = SourceCache(budget=100)
    for name in "abc":
        held.put(name, 0, chunk(0, 10))  # 40 bytes each
    assert [bool(held.take(name, 0, 10, last=False)) for name in "abc"] == [False, True, True]
    held.put("b", 0, chunk(0, 10))  # again: now the youngest, and counted once
    assert held.nbytes == 80
    held.put("d", 0, chunk(0, 40))  # more than there is room for
    assert held.nbytes == 0


@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "sce", "model_stock", "breadcrumbs", "slerp"])
@pytest.mark.parametrize(("memory", "times"), [(1 << 20, 1), (1 << 13, 2)])
def test_sources_that_fit_are_read_once(name, memory, times, monkeypatch):
    monkeypatch.setattr(soup_inputs, "CHUNK", 512)
    monkeypatch.setattr(engine, "LARGE_BLOCK", 512)
    sources = [Counted(t) for t in tensors((64, 50), 2 if name == "slerp" else 3, torch.bfloat16)]
    monkeypatch.setattr("test_soup_engine.Given", lambda t: t)
    pool = Engine(1, memory, compiled_loops())
    lazy = merge(name, sources, pool)
    rows = [lazy.read(((a, a + 8), (0, 50))) for a in range(0, 64, 8)]
    wanted = merge(name, [Given(s.tensor) for s in sources], Engine(1, 1 << 10, pool.loops)).full()
    assert torch.equal(torch.cat(rows), wanted)
    looked = 3 * 1024 if times == 1 else 0  # a selection looks at a sample, too
    for source in sources:
        assert source.elements >= times * 3200
        assert times > 1 or source.elements <= 3200 + looked
    assert times > 1 or pool.cache.nbytes == 0


def test_variances_above_zero_are_counted_without_computing_them():
    loops = compiled_loops()
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 4):
        for scale in (1.0, 1e-12, 1e-19, 1e-22, 1e-30):
            base = torch.randn(5000, generator=generator)
            given = [base + scale * torch.randn(5000, generator=generator) for _ in range(count - 1)]
            given[-1][::3] = given[0][::3]
            bits = torch.stack([torch.zeros(5000), *given]).view(torch.int32).numpy().view(np.uint32)
            values = np.empty(5000, np.uint32)
            loops.variances(bits, values)
            assert loops.varied(bits) in (-1, np.count_nonzero(values))
            assert scale < 1 or loops.varied(bits) >= 0
    bits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e-25, 0.0], [2e-25, 0.0]]).view(torch.int32).numpy().view(np.uint32)
    assert loops.varied(bits[[0, 2, 3]].copy()) == -1  # too near to tell
    odd = torch.tensor([[0.0], [torch.inf], [torch.inf]]).view(torch.int32).numpy().view(np.uint32)
    assert loops.varied(odd) == -1
