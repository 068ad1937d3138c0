"""Extents: any box of any shape, exactly its bytes and no others, and files that end too early."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import FileError
from surgery.extent import Extent
from surgery.files import IO, File
from surgery.lazy import boxes, bytes_of, same_bits


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("extents") / "numbers"
    values = torch.arange(20_000, dtype=torch.int32)
    path.write_bytes(b"head" + bytes(bytes_of(values)))
    return path, values


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
