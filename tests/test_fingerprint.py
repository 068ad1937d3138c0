"""Fingerprints: independent of the partition, sensitive to every change, equal to a naive sum over bytes."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import LayoutError
from surgery.formats.flat import joined
from surgery.tensors.fingerprint import Ledger, Uncounted, box_sum
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import ITEMSIZE, bytes_of, torch_dtype, whole

DTYPES = ["bfloat16", "float32", "uint8", "bool", "float8_e4m3fn", "int64", "complex64", "uint16", "complex128"]


def random_tensor(shape, kind, seed=0):
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch_dtype(kind))
    raw = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * ITEMSIZE[kind], np.uint8)
    raw = raw % 2 if kind == "bool" else raw
    return torch.from_numpy(raw).view(torch_dtype(kind)).reshape(shape)


def fingerprint(tensor):
    return box_sum(tensor, whole(tuple(tensor.shape)), tuple(tensor.shape))


def splitmix(i, seed):
    mask = (1 << 64) - 1
    x = ((i + 1) * 0x9E3779B97F4A7C15 + seed) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return (x ^ (x >> 31)) | 1


def naive(tensor):
    """The definition, byte by byte, in Python's integers."""
    width = (tensor.shape[-1] if tensor.dim() else 1) * tensor.element_size()
    data, total = bytes(bytes_of(tensor)), 0
    for r in range(len(data) // width if width else 0):
        row = data[r * width : (r + 1) * width]
        row += bytes(-width % 4)
        for k in range(0, len(row), 4):
            word = int.from_bytes(row[k : k + 4], "little", signed=True)
            total += splitmix(r, 0x6A09E667F3BCC908) * splitmix(k // 4, 0xBB67AE8584CAA73B) * word
    return total % 2**64


def random_partition(draw, box):
    """Cut a box at random places, again and again."""
    wide = [i for i, (a, b) in enumerate(box) if b - a > 1]
    if not wide or draw(st.integers(0, 3)) == 0:
        return [box]
    dim = draw(st.sampled_from(wide))
    a, b = box[dim]
    cut = draw(st.integers(a + 1, b - 1))
    left = (*box[:dim], (a, cut), *box[dim + 1 :])
    right = (*box[:dim], (cut, b), *box[dim + 1 :])
    return random_partition(draw, left) + random_partition(draw, right)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_partition_in_any_order_gives_the_naive_sum(data):
    kind = data.draw(st.sampled_from(DTYPES))
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
    tensor = random_tensor(shape, kind, data.draw(st.integers(0, 99)))
    parts = data.draw(st.permutations(random_partition(data.draw, whole(shape))))
    ledger = Ledger()
    tap = ledger.tap("t", InMemory(tensor))
    for box in parts:
        with ledger.collect() as seen:
            tap.read(box)
        ledger.add(seen)
    assert ledger.counts["t"][:2] == (naive(tensor), tensor.numel())
    assert not ledger.gaps()


@pytest.mark.parametrize("shape", [(3, 70000), (150001,), (2, 3, 66001), (70000, 3), (1, 65536)])
def test_large_rows_and_many_rows_agree_with_pieces(shape):
    tensor = random_tensor(shape, "bfloat16")
    n = shape[-1]
    cuts = [0, 1, n // 3, n // 2 + 1, n]
    total = 0
    for a, b in itertools.pairwise(cuts):
        box = (*whole(shape[:-1]), (a, b))
        total += box_sum(tensor[..., a:b], box, shape)
    assert total % 2**64 == fingerprint(tensor)
    if tensor.numel() < 200_000:
        assert fingerprint(tensor) == naive(tensor)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_flipped_bit_always_changes_it(data):
    kind = data.draw(st.sampled_from([k for k in DTYPES if k != "bool"]))
    shape = tuple(data.draw(st.lists(st.integers(1, 7), max_size=3)))
    tensor = random_tensor(shape, kind)
    before = fingerprint(tensor)
    view = bytes_of(tensor)
    at = data.draw(st.integers(0, len(view) - 1))
    view[at] ^= 1 << data.draw(st.integers(0, 7))
    assert fingerprint(tensor) != before


CHANGES = {
    "swap rows": lambda t: t[[1, 0, *range(2, len(t))]],
    "swap columns": lambda t: t[:, [1, 0, *range(2, t.shape[1])]],
    "swap two far elements": lambda t: swapped(t),
    "negate all": lambda t: -t,
    "negate a row": lambda t: torch.cat([-t[:1], t[1:]]),
    "negate two elements": lambda t: torch.cat([torch.cat([-t[:1, :2], t[:1, 2:]], 1), t[1:]]),
    "transpose": lambda t: t.T.contiguous().reshape(t.shape),
    "rotary order": lambda t: t.unflatten(0, (-1, 2, 8)).transpose(1, 2).reshape(t.shape),
    "shift by a row": lambda t: t.roll(1, 0),
    "shift by an element": lambda t: t.roll(1, 1),
    "a zero for a minus zero": lambda t: torch.where(t == 0, -t, t),
}


def swapped(t):
    t = t.clone()
    t[3, 5], t[40, 17] = t[40, 17].clone(), t[3, 5].clone()
    return t


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float16"])
def test_plausible_mistakes_change_it(change, kind):
    torch.manual_seed(0)
    tensor = torch.randn(64, 48).to(torch_dtype(kind))
    tensor[7, 7] = 0
    other = CHANGES[change](tensor)
    assert other.shape == tensor.shape
    assert fingerprint(other) != fingerprint(tensor)


def test_all_pairwise_row_and_column_swaps_are_seen():
    tensor = random_tensor((40, 40), "bfloat16")
    seen = {fingerprint(tensor)}
    for dim in (0, 1):
        for i in range(40):
            for j in range(i):
                order = list(range(40))
                order[i], order[j] = j, i
                seen.add(fingerprint(tensor.index_select(dim, torch.tensor(order))))
    assert len(seen) == 1 + 2 * 40 * 39 // 2


def test_a_view_that_is_not_contiguous_counts_its_elements_in_order():
    tensor = random_tensor((6, 10), "bfloat16")
    assert fingerprint(tensor.T) == naive(tensor.T.contiguous())


def test_content_digest_depends_on_names_kinds_and_shapes_but_not_on_order():
    def digest(parts):
        ledger = Ledger()
        for name, tensor in parts:
            with ledger.collect() as seen:
                ledger.tap(name, InMemory(tensor)).full()
            ledger.add(seen)
        return ledger.content_digest()

    a, b = random_tensor((4, 6), "bfloat16"), random_tensor((5,), "float32")
    base = digest([("a", a), ("b", b)])
    assert base == digest([("b", b), ("a", a)])
    others = [
        digest([("a", b), ("b", a)]),
        digest([("a", a.view(torch.float16)), ("b", b)]),
        digest([("a", a), ("b", b.reshape(1, 5))]),
        digest([("a", a)]),
        digest([("a", a), ("b", b), ("c", torch.zeros(0))]),
        digest([("a", a), ("c", b)]),
    ]
    assert len({base, *others}) == 7


def test_gaps_and_double_counts_are_named():
    ledger = Ledger()
    tap = ledger.tap("half.read", InMemory(torch.ones(4, 4)))
    twice = ledger.tap("read.twice", InMemory(torch.ones(2)))
    with ledger.collect() as seen:
        tap.read(((0, 2), (0, 4)))
        twice.full()
        twice.full()
    ledger.add(seen)
    with pytest.raises(LayoutError, match=r"half.read \(8 of 16 elements\), read.twice \(4 of 2 elements\)"):
        ledger.content_digest()


def test_reads_outside_of_collect_do_not_count():
    ledger = Ledger()
    tap = ledger.tap("t", InMemory(torch.ones(4)))
    tap.full()
    with ledger.collect() as seen:
        pass
    tap.full()
    assert seen == {}
    assert ledger.counts == {}


@given(st.integers(0, 1 << 30), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_a_replica_inside_a_flat_buffer_counts_nothing(seed, block):
    """Read in any blocks, a buffer has every byte, and the ledger each original once."""
    one, two = random_tensor((3, 5), "float32", seed), random_tensor((7,), "float32", seed + 1)
    ledger = Ledger()
    first, second = ledger.tap("one", InMemory(one)), ledger.tap("two", InMemory(two))
    buffer = joined([(0, first), (16, second), (24, Uncounted(first))])
    want = torch.cat([one.flatten(), torch.zeros(1), two, torch.zeros(1), one.flatten()])
    pieces = []
    for at in range(0, len(want), block):
        with ledger.collect() as seen:
            pieces.append(buffer.read(((at, min(at + block, len(want))),)))
        ledger.add(seen)
    assert bytes_of(torch.cat(pieces)) == bytes_of(want)
    assert not ledger.gaps()
    assert [ledger.counts[name][0] for name in ("one", "two")] == [fingerprint(one), fingerprint(two)]
