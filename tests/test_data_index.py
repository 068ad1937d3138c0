"""`surgery data index` and `inspect`: payloads of other programs get an index; what a token file is, or cannot be."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from itertools import chain

import numpy as np
import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.data.files.idx import read_index
from surgery.data.inspection import inspect_tokens
from surgery.data.payload_index import index_payload, payloads
from surgery.errors import ConfigError, FileError, OutputError, SurgeryError
from tests.test_data_tokenize import GOLDEN, TEXTS, VOCABULARY, ids, rows, run


def cli(*args):
    return CliRunner().invoke(main, ["data", *map(str, args)])


@pytest.fixture
def other(tmp_path):
    """Files that dolma and datatrove wrote."""
    shutil.copytree(GOLDEN / "dolma", tmp_path / "dolma")
    shutil.copytree(GOLDEN / "datatrove", tmp_path / "datatrove")
    return tmp_path


def megatron(path):
    """The documents of a .bin by its .idx, read by hand."""
    index, payload = path.with_suffix(".idx").read_bytes(), path.read_bytes()
    magic, version, code, count, entries = struct.unpack("<9sQBQQ", index[:34])
    assert (magic, version, entries) == (b"MMIDIDX\0\0", 1, count + 1)
    dtype = np.dtype({1: "u1", 4: "<i4", 8: "<u2"}[code])
    lengths = np.frombuffer(index, "<i4", count, 34)
    offsets = np.frombuffer(index, "<i8", count, 34 + 4 * count)
    documents = np.frombuffer(index, "<i8", count + 1, 34 + 12 * count)
    assert documents.tolist() == list(range(count + 1))
    pairs = zip(offsets.tolist(), lengths.tolist(), strict=True)
    return [np.frombuffer(payload, dtype, n, at).tolist() for at, n in pairs]


def test_dolmas_files_get_an_index_and_no_byte_is_copied(other):
    found = [document for _, document in rows(other / "dolma")]
    done = [index_payload(path) for path in payloads(other / "dolma")]
    assert [d.linked for d in done] == ["hard"] * 3
    assert all(os.path.samefile(d.payload, d.bin) for d in done)
    assert [doc for d in done for doc in megatron(d.bin)] == found
    with pytest.raises(FileError, match="have an index, or a NumPy header"):
        payloads(other / "dolma")


def test_datatroves_index_is_megatrons_byte_for_byte(other):
    """Megatron's own builder wrote the same documents: its .idx is the oracle."""
    [path] = payloads(other / "datatrove")
    done = index_payload(path, to=other / "new", link="symbolic")
    assert done.linked == "symbolic" and (other / "new" / "00000_unshuffled.bin").is_symlink()
    assert done.index.read_bytes() == (GOLDEN / "megatron_uint16.idx").read_bytes()
    assert megatron(done.bin) == [ids(t) for t in TEXTS if t]
    assert not list((other / "datatrove").glob("*.idx"))


def test_a_bare_bin_needs_its_dtype_and_what_ends_documents(tmp_path):
    ends = np.array([5, 6, 0, 7, 0, 0, 8, 9], "<u2")  # the last document is not ended
    path = tmp_path / "old.bin"
    ends.tofile(path)
    with pytest.raises(ConfigError, match="nothing beside it tells its dtype"):
        index_payload(path, eos=0)
    with pytest.raises(ConfigError, match=r"where documents end\n  hint: say which id ends them: --eos ID"):
        index_payload(path, dtype="uint16")
    done = index_payload(path, dtype="uint16", eos=0)
    assert (done.linked, done.documents, done.tokens) == ("", 4, 8)
    assert megatron(path) == [[5, 6, 0], [7, 0], [0], [8, 9]]
    with pytest.raises(OutputError, match="exists already"):
        index_payload(path, dtype="uint16", eos=0)


def test_uint32_is_indexed_as_int32_where_the_bytes_are_the_same(tmp_path):
    for name, last in (("good", 2**31 - 1), ("bad", 2**31)):
        np.array([1, 2, last, 0], "<u4").tofile(tmp_path / f"{name}.npy")
        with gzip.open(tmp_path / f"{name}.csv.gz", "wt") as file:
            file.write("0,1,a,x,1\r\n1,4,b,x,2\r\n")
    assert index_payload(tmp_path / "good.npy").dtype == "int32"
    assert megatron(tmp_path / "good.bin") == [[1], [2, 2**31 - 1, 0]]
    with pytest.raises(ConfigError, match="token 2 is 2147483648, too large for int32"):
        index_payload(tmp_path / "bad.npy")
    assert sorted(p.name for p in tmp_path.glob("bad*")) == ["bad.csv.gz", "bad.npy"]
    np.array([1, 0], "<u8").tofile(tmp_path / "wide.npy")
    with pytest.raises(ConfigError, match="cannot say uint64"):
        index_payload(tmp_path / "wide.npy", dtype="uint64", eos=0)


def test_names_that_are_taken(other, monkeypatch):
    path = sorted((other / "dolma").glob("*.npy"))[0]
    path.with_suffix(".bin").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"exists already, and is not part-0-00000\.npy"):
        index_payload(path)
    path.with_suffix(".bin").unlink()

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match=r"Invalid cross-device link\n  hint: --link symbolic"):
        index_payload(path, link="hard")
    assert index_payload(path).linked == "symbolic"
    assert len(megatron(path.with_suffix(".bin"))) == 48


def test_a_numpy_file_with_a_header_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 0], "u2"))
    with pytest.raises(ConfigError, match="with a header"):
        index_payload(tmp_path / "a.npy", eos=0)
    with pytest.raises(FileError, match="have an index, or a NumPy header"):
        payloads(tmp_path)


def test_the_mask_moves_along(tmp_path):
    np.array([1, 0], "<u2").tofile(tmp_path / "a.npy")
    np.array([1, 0], "u1").tofile(tmp_path / "a.mask")
    index_payload(tmp_path / "a.npy", to=tmp_path / "new", dtype="uint16", eos=0)
    assert os.path.samefile(tmp_path / "a.mask", tmp_path / "new" / "a.mask")
    [found] = inspect_tokens(tmp_path / "new" / "a.bin")
    assert found.learnt == 1


def test_inspect_against_numbers_by_hand(tmp_path):
    run(GOLDEN / "documents", tmp_path / "out")
    [found] = inspect_tokens(tmp_path / "out", vocabulary=VOCABULARY)
    lengths = [len(ids(t)) for t in TEXTS if t]
    every = [i for t in TEXTS if t for i in ids(t)]
    assert (found.format, found.dtype, found.tokens) == ("megatron", "uint16", 12378)
    assert (found.documents, found.shortest, found.longest, found.empty) == (115, min(lengths), max(lengths), 0)
    assert (found.smallest_id, found.largest_id, found.bytes) == (min(every), max(every), 2 * len(every))
    assert TEXTS[1].startswith(found.begins[:40]) and found.notes == () and found.mask is None
    assert found.first_ids == tuple(every[:64])


def test_inspect_refuses_what_cannot_be(tmp_path):
    run(GOLDEN / "documents", tmp_path / "out")
    path = tmp_path / "out" / "tokens.bin"
    with pytest.raises(FileError, match="but the vocabulary has 300 ids"):
        inspect_tokens(path, vocab_size=300)
    with pytest.raises(FileError, match="uint16 cannot hold a vocabulary of 70000 ids"):
        inspect_tokens(path, vocab_size=70_000)
    wide = np.zeros(6_000_000, "<u2")
    wide[4_500_001] = 999  # in none of the places that are looked at when a file is opened
    wide.tofile(tmp_path / "wide.npy")
    with pytest.raises(FileError, match="token 4500001 is 999, but the vocabulary has 600 ids"):
        inspect_tokens(tmp_path / "wide.npy", dtype="uint16", vocab_size=600)
    (tmp_path / "odd.npy").write_bytes(b"123")
    with pytest.raises(FileError, match="no whole number"):
        inspect_tokens(tmp_path / "odd.npy", dtype="uint16")
    with pytest.raises(ConfigError, match="tells its dtype"):
        inspect_tokens(tmp_path / "wide.npy")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FileError, match="do not belong together"):
        inspect_tokens(path)
    with pytest.raises(FileError, match="holds no token files"):
        inspect_tokens(GOLDEN / "documents")


def test_inspect_says_what_looks_wrong(tmp_path):
    np.arange(1, 50, dtype="<u4").tofile(tmp_path / "a.npy")
    [found] = inspect_tokens(tmp_path / "a.npy", dtype="uint16")
    assert "every second id is 0: is it uint32, not uint16?" in found.notes
    assert any("nothing tells where documents end" in note for note in found.notes) and found.documents is None
    run(GOLDEN / "documents", tmp_path / "out")
    note = tmp_path / "out" / "tokens.json"
    note.write_text(note.read_text().replace(VOCABULARY.sha256, "0" * 64))
    [found] = inspect_tokens(tmp_path / "out", vocabulary=VOCABULARY)
    assert "made with another tokenizer" in found.notes[0]
    (tmp_path / "out" / "tokens.mask").write_bytes(b"\1" * 12377 + b"\2")
    with pytest.raises(FileError, match="byte 12377 is 2: a label mask holds zeros and ones"):
        inspect_tokens(tmp_path / "out")


@pytest.mark.slow
def test_random_damage_is_an_error_or_changes_nothing_but_ids(other):
    """Of the .csv.gz, the .ds.index and the payloads' sizes: never another number of tokens in silence."""
    rng = np.random.default_rng(5)
    refused = 0
    for name in ("dolma/part-0-00000.csv.gz", "datatrove/00000_unshuffled.ds.index", "dolma/part-0-00002.npy"):
        path = other / name
        whole = path.read_bytes()
        payload = path.with_suffix("").with_suffix(".npy") if "csv" in name else path.with_suffix("")
        payload = path if name.endswith("npy") else payload
        expected = megatron(index_payload(payload, to=other / "good" / name).bin)
        for number in range(120):
            data = bytearray(whole)
            at = int(rng.integers(len(data)))
            if number % 3 == 0:
                data = data[:at]
            elif number % 3 == 1:
                data[at] ^= int(rng.integers(1, 256))
            else:
                data[at:at] = rng.bytes(int(rng.integers(1, 9)))
            path.write_bytes(data)
            try:
                done = index_payload(payload, to=other / f"{number}" / name)
                inspect_tokens(done.bin, vocab_size=600)
            except SurgeryError:
                refused += 1
                continue
            assert read_index(done.index).tokens * 2 == payload.stat().st_size
            if not name.endswith("npy"):
                assert list(chain(*megatron(done.bin))) == list(chain(*expected))
        path.write_bytes(whole)
    assert refused > 200


def test_the_command_line(tmp_path):
    words = [GOLDEN / "documents", tmp_path / "out", "--tokenizer", GOLDEN / "tokenizer.json", "--eos", 0]
    done = cli("tokenize", *words, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["tokens"], report["documents"], report["dtype"]) == (12378, 115, "uint16")
    again = cli("tokenize", *words)
    assert again.exit_code == 1 and "exists already" in again.stderr
    shown = cli("tokenize", *words, "--force", "--format", "dolma", "--max-size", "6k", "--workers", 1)
    assert shown.exit_code == 0 and "12,354 tokens in 105 documents" in shown.stdout and "uint16" in shown.stdout
    for wrong, what in (
        ("--eos=700", "is no token"),
        ("--max-bad=x", "write a share"),
        ("--max-size=x", "is no whole"),
    ):
        bad = cli("tokenize", *words[:-2], wrong, *(["--eos", 0] if "eos" not in wrong else []), "--force")
        assert bad.exit_code == 2 and what in bad.stderr, bad.output
    listed = cli("index", tmp_path / "out", "--json")
    assert [one["linked"] for one in json.loads(listed.stdout)] == ["hard"] * 3
    seen = cli("inspect", tmp_path / "out", "--tokenizer", GOLDEN / "tokenizer.json", "--json")
    found = json.loads(seen.stdout)
    assert {one["format"] for one in found} == {"megatron", "dolma"} and sum(
        one["tokens"] for one in found
    ) == 2 * 12354
    assert cli("inspect", tmp_path / "out").exit_code == 0


def test_lines_of_progress_where_there_is_no_terminal(tmp_path, monkeypatch):
    from surgery.writing import progress

    monkeypatch.setattr(progress, "EVERY", 0.0)
    words = [GOLDEN / "documents", tmp_path / "out", "--tokenizer", GOLDEN / "tokenizer.json", "--eos", 0]
    done = cli("tokenize", *words)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tokenize 115 documents, 12.38k tokens, 100.0%, ") and "B/s" in last
