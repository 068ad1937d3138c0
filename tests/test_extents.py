"""Extents: any box of any shape, exactly its bytes and no others, and files that end too early."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import FileError
from surgery.tensors.extent import Extent
from surgery.tensors.files import IO, File
from surgery.tensors.fingerprint import Ledger
from surgery.tensors.lazy import Concat, Fill, Map, Slice, boxes, bytes_of, lengths, same_bits


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("extents") / "numbers"
    values = torch.arange(20_000, dtype=torch.int32)
    path.write_bytes(b"head" + bytes(bytes_of(values)))
    return path, values


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_box_reads_exactly_its_bytes(numbers, data):
    path, values = numbers
    shape = data.draw(st.lists(st.integers(1, 7), max_size=5))
    box = []
    for n in shape:
        a = data.draw(st.integers(0, n))
        box.append((a, data.draw(st.integers(a, n))))
    whole = values[100 : 100 + math.prod(shape)].reshape(shape)
    want = whole[tuple(slice(a, b) for a, b in box)]
    before = IO["bytes"]
    got = Extent(File(path), 4 + 400, shape, "int32").read(tuple(box))
    assert got.shape == want.shape and torch.equal(got, want)
    assert IO["bytes"] - before == want.nbytes


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_way_of_reading_gives_the_same(numbers, data):
    """`read`, `read_into` a given tensor (dense or not), and `read_flat` of any range, of every kind of node."""
    file = File(numbers[0])
    a, b = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    plain, turned = Extent(file, 4, (a, b), "int32"), Extent(file, 404, (a, b), "int32", (1, a))
    cut = data.draw(st.integers(0, a))
    node = data.draw(
        st.sampled_from(
            [
                plain,
                turned,
                Extent(file, 4, (a, b), "int32", swap=True),
                Slice(Extent(file, 44, (a + 3, b), "int32"), 0, 2, a + 2),
                Slice(Extent(file, 44, (a, b + 3), "int32"), 1, 1, b + 1),
                Concat((Slice(plain, 0, 0, cut), Slice(turned, 0, cut, a)), 0),
                Concat((plain, Fill((a, 2), "int32", 7), turned), 1),
                Map(torch.neg, (plain,)),
                Ledger().tap("x", plain),
            ]
        )
    )
    full = node.full()
    box = tuple(tuple(sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in node.shape)
    want = full[tuple(slice(i, j) for i, j in box)]
    dense, spaced = torch.zeros(lengths(box), dtype=torch.int32), torch.zeros((*lengths(box), 2), dtype=torch.int32)
    node.read_into(box, dense)
    node.read_into(box, spaced[..., 0])
    assert same_bits(node.read(box), want) and same_bits(dense, want) and same_bits(spaced[..., 0], want)
    assert not spaced[..., 1].any()
    start, stop = sorted((data.draw(st.integers(0, full.numel())), data.draw(st.integers(0, full.numel()))))
    flat = torch.zeros(stop - start, dtype=torch.int32)
    node.read_flat(start, stop, bytes_of(flat))
    assert same_bits(flat, full.reshape(-1)[start:stop])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=4), st.integers(1, 200))
def test_boxes_give_a_tensor_back_to_front_order(numbers, shape, limit):
    path, values = numbers
    extent = Extent(File(path), 4, shape, "int32")
    parts = [extent.read(box).reshape(-1) for box in boxes(extent.shape, 4, limit)]
    assert torch.equal(torch.cat(parts), values[: math.prod(shape)])


@pytest.mark.parametrize("box", [((0, 90), (0, 100)), ((0, 90), (3, 40)), ((85, 90), (0, 100))])
def test_a_file_that_was_cut_after_it_was_opened(box, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(9000))
    extent = Extent(File(path), 0, (90, 100), "uint8")
    os.truncate(path, 8700)
    assert same_bits(extent.read(((0, 80), (5, 9))), torch.zeros(80, 4, dtype=torch.uint8))
    with pytest.raises(FileError, match="the file ends before byte"):
        extent.read(box)


def test_short_reads_are_completed(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(bytes(range(200)))
    real = os.preadv

    def preadv(fd, buffers, offset):
        return real(fd, [memoryview(buffers[0])[:3]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    before = IO["bytes"]
    got = Extent(File(path), 0, (10, 20), "uint8").read(((2, 5), (4, 12)))
    assert torch.equal(got, torch.arange(200, dtype=torch.uint8).reshape(10, 20)[2:5, 4:12])
    assert IO["bytes"] - before == 24
