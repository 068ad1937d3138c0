"""Megatron's `.idx`: byte for byte what Megatron-core writes, and nothing believed that contradicts the files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.data.files import idx
from surgery.data.files.idx import IndexedWriter, read_index, write_index
from surgery.errors import ConfigError, FileError

GOLDEN = Path(__file__).parent / "golden" / "data" / "megatron"
NAMES = ("a_uint16_oneepoch", "b_int32_epochs", "multi")


@pytest.mark.parametrize("name", NAMES)
def test_what_megatron_wrote_is_written_again_byte_for_byte(name, tmp_path):
    index = read_index(GOLDEN / name)
    write_index(tmp_path / "x.idx", index.dtype, index.lengths, index.documents, index.modes)
    assert (tmp_path / "x.idx").read_bytes() == (GOLDEN / f"{name}.idx").read_bytes()


@pytest.mark.parametrize("name", ["a_uint16_oneepoch", "b_int32_epochs"])
def test_the_writer_writes_what_megatron_writes(name, tmp_path):
    index, raw = read_index(GOLDEN / name), (GOLDEN / f"{name}.bin").read_bytes()
    ids = np.frombuffer(raw, index.dtype)
    cuts = index.offsets[1:] // index.dtype.itemsize
    with IndexedWriter(tmp_path / "one", index.dtype) as writer:
        for document in np.split(ids, cuts):
            writer.add(document)
    with IndexedWriter(tmp_path / "many", index.dtype) as writer:
        writer.extend(ids, index.lengths)
    for made in ("one", "many"):
        assert (tmp_path / f"{made}.idx").read_bytes() == (GOLDEN / f"{name}.idx").read_bytes()
        assert (tmp_path / f"{made}.bin").read_bytes() == raw


def test_the_sequences_of_a_document_are_told_apart():
    index = read_index(GOLDEN / "multi.idx")
    assert index.lengths.tolist()[:8] == [2, 2, 2, 1, 1, 1, 1, 5]
    assert index.documents.tolist()[:4] == [0, 4, 7, 11]
    assert (index.tokens, index.dtype, len(index.lengths), len(index.documents)) == (477, np.uint16, 90, 26)


def naive(path: Path) -> tuple[list[int], list[int], list[int]]:
    """The three lists of an index, by struct alone."""
    data = path.read_bytes()
    n, d = struct.unpack("<QQ", data[18:34])
    lengths = struct.unpack(f"<{n}i", data[34 : 34 + 4 * n])
    offsets = struct.unpack(f"<{n}q", data[34 + 4 * n : 34 + 12 * n])
    return list(lengths), list(offsets), list(struct.unpack(f"<{d}q", data[34 + 12 * n : 34 + 12 * n + 8 * d]))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=12), st.integers(1, 5), st.booleans())
def test_any_documents_come_back(tmp_path_factory, documents, chunk, whole):
    """Documents of any numbers of sequences, empty ones as well, in chunks of any size."""
    folder = tmp_path_factory.mktemp("idx")
    flat = [n for lengths in documents for n in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idx, "CHUNK", chunk)
        if whole:
            with IndexedWriter(folder / "x", "uint16") as writer:
                for lengths in documents:
                    writer.add(np.arange(sum(lengths)))
            assert (writer.tokens, writer.count) == (sum(flat), len(documents))
        else:
            (folder / "x.bin").write_bytes(bytes(2 * sum(flat)))
            write_index(folder / "x.idx", "uint16", flat, np.cumsum([0, *map(len, documents)]))
        index = read_index(folder / "x")
    want = [[sum(d)] for d in documents] if whole else documents
    lengths, offsets, firsts = naive(folder / "x.idx")
    assert lengths == index.lengths.tolist() == [n for d in want for n in d]
    assert offsets == index.offsets.tolist() == [2 * n for n in np.cumsum([0, *lengths])[:-1]]
    assert firsts == index.documents.tolist() == np.cumsum([0, *map(len, want)]).tolist()
    assert index.tokens == sum(lengths)


def test_an_id_that_does_not_fit_leaves_nothing_behind(tmp_path):
    def write() -> None:
        with IndexedWriter(tmp_path / "x", "uint16") as writer:
            writer.add([1, 2])
            writer.add([1, 70000])

    with pytest.raises(ConfigError, match="70000 do not fit uint16"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_uint32_is_written_as_int32_and_ids_beyond_it_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "x", "uint32") as writer:
        writer.add([1, 2**31 - 1])
    assert read_index(tmp_path / "x").dtype == np.int32
    with pytest.raises(ConfigError, match="do not fit int32"), IndexedWriter(tmp_path / "y", "uint32") as writer:
        writer.add([2**31])


@pytest.mark.parametrize(
    ("at", "bytes_", "says"),
    [
        (0, b"X", "no Megatron index"),
        (9, b"\2", "only version 1"),
        (17, b"\6", "no token ids"),
        (17, b"\x63", "unknown"),
        (17, b"\4", "out of its place"),  # int32 for a payload of uint16
        (18, b"\xff" * 8, "the file has"),
        (26, b"\0" * 8, "the file has"),
        (34, b"\xff\xff\xff\xff", "negative length"),
        (38, b"\x7f", "out of its place"),
        (34 + 4 * 120 + 8, b"\x01", "out of its place"),
        (34 + 12 * 120, b"\1", "begins with sequence 1"),
        (34 + 12 * 120 + 8 * 60, b"\0\0", "begins with sequence"),
        (34 + 12 * 120 + 8 * 120, b"\x70", "begins with sequence 112"),
        (34 + 12 * 120 + 8 * 120, b"\x79", "end with sequence 121 of 120"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, at, bytes_, says):
    data = bytearray((GOLDEN / "a_uint16_oneepoch.idx").read_bytes())
    data[at : at + len(bytes_)] = bytes_
    (tmp_path / "x.idx").write_bytes(data)
    (tmp_path / "x.bin").write_bytes((GOLDEN / "a_uint16_oneepoch.bin").read_bytes())
    with pytest.raises(FileError, match=says):
        read_index(tmp_path / "x.idx")


def test_a_payload_of_another_size_is_refused(tmp_path):
    for cut in (-1, -2, 2):
        raw = (GOLDEN / "multi.bin").read_bytes()
        (tmp_path / "x.bin").write_bytes(raw + b"\0" * cut if cut > 0 else raw[:cut])
        (tmp_path / "x.idx").write_bytes((GOLDEN / "multi.idx").read_bytes())
        with pytest.raises(FileError, match="lists 477 tokens"):
            read_index(tmp_path / "x")


def test_modes_are_kept(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(10))
    write_index(tmp_path / "x.idx", "uint16", [2, 3], modes=[0, 1])
    modes = read_index(tmp_path / "x").modes
    assert modes is not None and modes.tolist() == [0, 1]
    assert read_index(GOLDEN / "multi").modes is None
