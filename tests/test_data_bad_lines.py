"""Lines and files that hold no document are counted, named and borne up to a limit; none gives a wrong token."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from surgery.data.tokenizing import text, tokenize
from surgery.data.tokenizing.bad_lines import Limit
from surgery.data.tokenizing.prepare import Choices, settings_for
from surgery.data.tokenizing.sources import find_sources
from surgery.data.tokenizing.vocabulary import Vocabulary
from surgery.errors import FileError, UsageError
from tests.test_data_tokenize import ANY, DOCUMENTS, DOLMA, MEGATRON, TEXTS, documents, ids, run

GOOD = [json.dumps({"text": t, "id": str(i)}).encode() for i, t in enumerate(["one two", "three", "four"])]
BAD = {
    b"": "blank line",
    b" \t ": "blank line",
    b'{"text": "a"': "not JSON",
    b'{"text": "a"} x': "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "not JSON",
    b'{"text": "\xff"}': "not UTF-8",
    b'["text"]': "not an object",
    b"null": "not an object",
    b'{"body": "a"}': "no text",
    b'{"text": null}': "no text",
    b'{"text": 7}': "text of a wrong type",
    b'{"text": ["a"]}': "text of a wrong type",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
}


def reported(folder):
    return [json.loads(line) for line in (folder / "bad_lines.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("choices", [MEGATRON, DOLMA], ids=["megatron", "dolma"])
def test_each_kind_is_named_with_its_line(choices, tmp_path):
    lines = [line for pair in zip(BAD, [GOOD[0]] * len(BAD), strict=True) for line in pair]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    report = run(tmp_path / "a.jsonl", tmp_path / "out", choices, max_bad=ANY)
    found = reported(tmp_path / "out")
    assert [(bad["line"], bad["kind"]) for bad in found] == list(zip(range(1, 99, 2), BAD.values(), strict=False))
    assert {bad["file"] for bad in found} == {str(tmp_path / "a.jsonl")}
    assert documents(tmp_path / "out") == [ids("one two")] * len(BAD)
    assert report.kinds == Counter(BAD.values())
    assert (report.total.lines, report.total.bad, report.total.documents) == (2 * len(BAD), len(BAD), len(BAD))


def test_names_of_a_wrong_type(tmp_path):
    names = '"x"', "7", "null", "[1]", "true", json.dumps("x" * 1001)
    held = [f'{{"text": "a", "id": {name}}}' for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join([*held, '{"text": "a"}']))
    run(tmp_path / "a.jsonl", tmp_path / "out", DOLMA, max_bad=ANY)
    assert [(bad["line"], bad["kind"]) for bad in reported(tmp_path / "out")] == [
        (n, "id of a wrong type") for n in (4, 5, 6)
    ]
    assert run(tmp_path / "a.jsonl", tmp_path / "megatron").total.bad == 0


@pytest.mark.parametrize("block", [1 << 20, 10])
def test_lines_are_counted_across_blocks(block, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", block)
    lines = [random.Random(i).choice([*GOOD, b"", b"{"]) for i in range(300)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    run(tmp_path / "a.jsonl.gz", tmp_path / "out", max_bad=ANY)
    ends_open = not lines[-1]  # nothing behind the last newline is no line
    bad = [i for i, line in enumerate(lines, 1) if line in (b"", b"{") and not (ends_open and i == 300)]
    assert [entry["line"] for entry in reported(tmp_path / "out")] == bad


@pytest.mark.parametrize(
    ("limit", "bad", "lines", "ended", "allowed"),
    [
        ("0.1%", 1, 1000, True, True),
        ("0.1%", 1, 999, True, False),
        ("0.1%", 10, 20, False, True),
        ("0.1%", 11, 20, False, False),
        ("0.1%", 11, 11_000, False, True),
        ("0%", 1, 10**6, False, False),
        ("100%", 5, 5, True, True),
        ("3", 3, 4, True, True),
        ("3", 4, 10**9, False, False),
        ("0", 0, 9, True, True),
    ],
)
def test_the_limit(limit, bad, lines, ended, allowed):
    assert Limit.parse(limit).allows(bad, lines, ended) is allowed


@pytest.mark.parametrize("wrong", ["", "x", "-1", "0.1", "1%%", "1e3", "٣"])
def test_limits_that_are_none(wrong):
    with pytest.raises(UsageError, match="write a share as"):
        Limit.parse(wrong)


def test_too_many_stop_the_run_and_more_may_be_borne_later(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(GOOD * 10 + [b"{", b""] * 6))
    with pytest.raises(FileError) as caught:
        run(tmp_path / "a.jsonl", tmp_path / "out")
    said = str(caught.value)
    assert "more than 0.1% of all lines are bad: 11 of 41 lines" in said
    assert f"{tmp_path}/a.jsonl line 31: not JSON" in said and "--max-bad" in said
    listed = Path(said.split("listed in ")[1].split(";")[0])
    assert len(listed.read_text().splitlines()) == 11  # the last line is empty: the file ends with a newline
    assert not (tmp_path / "out").exists()
    report = run(tmp_path / "a.jsonl", tmp_path / "out", max_bad=Limit.parse("11"))
    assert documents(tmp_path / "out") == [ids(t) for t in ("one two", "three", "four")] * 10
    assert report.total.bad == 11


def test_a_run_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 100)
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 100_000)
    told = []
    with pytest.raises(FileError, match="are bad"):
        run(tmp_path / "a.jsonl", tmp_path / "out", progress=lambda read, *_: told.append(read))
    assert sum(told) < 2000


def test_a_text_of_no_tokens_is_blank(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n{"text": "  "}\n{"text": "a"}')
    assert run(tmp_path / "a.jsonl", tmp_path / "a").total.blank == 1  # Megatron's texts are taken as they are
    assert run(tmp_path / "a.jsonl", tmp_path / "b", DOLMA).total.blank == 2


def test_what_the_tokenizer_refuses(tmp_path):
    """A vocabulary of words without an unknown one: the library raises on any other word, here on two of four texts."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<eos>": 2}, "unk_token": "?"}
    held = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    vocabulary = Vocabulary("words", json.dumps(held).encode())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a b", "x", "b", "a y")))
    sources, _ = find_sources([str(tmp_path / "a.jsonl")])
    settings = settings_for(Choices(eos="2"), vocabulary)
    tokenize.tokenize(sources, tmp_path / "out", vocabulary, settings, workers=1, max_bad=ANY)
    assert documents(tmp_path / "out") == [[0, 1, 2], [1, 2]]
    assert [(b["line"], b["kind"]) for b in reported(tmp_path / "out")] == [
        (n, "refused by the tokenizer") for n in (2, 4)
    ]


def broken(data, chance):
    """Damage of many kinds."""
    data = bytearray(data)
    kind = chance.randrange(4)
    at = chance.randrange(len(data))
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 2:
        data[at:at] = chance.randbytes(chance.randrange(1, 9))
    else:
        data[at : at + chance.randrange(1, 50)] = b"\0" * chance.randrange(1, 50)
    return bytes(data)


def unpacked(suffix, data):
    """The lines of a packed file by the libraries themselves, or None if it is broken."""
    try:
        return gzip.decompress(data) if suffix.endswith("gz") else zstd.decompress(data)
    except (EOFError, OSError, zlib.error, zstd.ZstdError):
        return None


def parsed(lines):
    """The texts in lines of JSON, and how many lines are bad; None: there are no lines, as they do not unpack."""
    if lines is None:
        return [], None
    good, bad = [], 0
    for line in lines.removesuffix(b"\n").split(b"\n") if lines else []:
        try:
            value = json.loads(line.decode())["text"]
            value.encode()
            good.append(value)
        except (ValueError, KeyError, TypeError, AttributeError):
            bad += 1
    return good, bad


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_damage_gives_what_is_really_there_or_nothing(suffix, tmp_path, monkeypatch):
    """300 damaged files of each packing: the documents are those that the libraries see, or none of the file."""
    monkeypatch.setattr(text, "BLOCK", 9000)
    lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS[:40])
    checked = {zstd.CompressionParameter.checksum_flag: 1}
    packed = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.zst": zstd.compress(lines, options=checked)}
    chance, expected, seen = random.Random(suffix), [], Counter()
    for number in range(300):
        data = broken(packed[suffix], chance)
        (tmp_path / f"{number:03d}.{suffix}").write_bytes(data)
        good, bad = parsed(data if suffix == "jsonl" else unpacked(suffix, data))
        expected += [ids(t) for t in good if t]
        seen["broken" if bad is None else "some" if bad else "whole"] += 1
    report = run(tmp_path, tmp_path / "out", max_bad=ANY)
    assert documents(tmp_path / "out") == expected
    assert report.kinds["broken file"] == seen["broken"]
    assert seen["some" if suffix == "jsonl" else "broken"] > 150, seen


@pytest.mark.slow
def test_damaged_parquet_gives_what_pyarrow_reads_or_nothing(tmp_path):
    table = pa.table({"text": TEXTS})
    pq.write_table(table, tmp_path / "good", row_group_size=40, write_page_checksum=True, use_dictionary=False)
    whole, chance, expected, lost = (tmp_path / "good").read_bytes(), random.Random(3), [], 0
    for number in range(300):
        path = tmp_path / f"{number:03d}.parquet"
        path.write_bytes(broken(whole, chance))
        try:
            held = pq.read_table(path, page_checksum_verification=True).column("text").to_pylist()
        except KeyError:
            path.unlink()  # the name of the column is damaged, which is another error
            continue
        except (pa.ArrowException, OSError):
            held, lost = [], lost + 1
        expected += [ids(t) for t in held if t]
    report = run(tmp_path, tmp_path / "out", max_bad=ANY)
    assert documents(tmp_path / "out") == expected
    assert report.kinds["broken file"] == lost > 150


def test_a_broken_file_loses_all_its_lines_and_no_other(tmp_path):
    lines = b"".join(json.dumps(d).encode() + b"\n" for d in DOCUMENTS)
    source = tmp_path / "in"
    source.mkdir()
    for name in "abc":
        (source / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))
    data = bytearray((source / "b.jsonl.gz").read_bytes())
    data[-8] ^= 1  # of the checksum, behind the last letter
    (source / "b.jsonl.gz").write_bytes(data)
    for choices in (MEGATRON, DOLMA):
        report = run(source, tmp_path / "out", choices, max_bad=ANY, force=True)
        assert (report.total.lines, report.total.bad) == (361, 121)
        [bad] = reported(tmp_path / "out")
        assert bad["kind"] == "broken file" and bad["line"] == 121 and "CRC" in bad["detail"]
        assert bad["file"].endswith("b.jsonl.gz")
        texts = [t.strip() if choices is DOLMA else t for t in TEXTS * 2]
        assert sorted(documents(tmp_path / "out")) == sorted(ids(t) for t in texts if t)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_packed_file_of_no_byte_is_broken(suffix, tmp_path):
    """What a broken copy leaves; an empty file that was packed has a header."""
    (tmp_path / f"a.jsonl.{suffix}").touch()
    with pytest.raises(FileError, match="1 broken file"):
        run(tmp_path, tmp_path / "out", MEGATRON)
    pack = {"gz": gzip.compress, "zst": zstd.compress}[suffix]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(b""))
    assert run(tmp_path, tmp_path / "whole", MEGATRON).total.lines == 0


def test_a_line_without_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 1 << 10)
    monkeypatch.setattr(text, "LONGEST", 1 << 14)
    (tmp_path / "a.jsonl").write_bytes(GOOD[0] + b"\n" + b"x" * (1 << 15))
    with pytest.raises(FileError, match="line 2 has more than 16384 bytes"):
        run(tmp_path / "a.jsonl", tmp_path / "out")
    (tmp_path / "a.txt").write_bytes(b"x" * (1 << 15))
    with pytest.raises(FileError, match=r"too many for one document\n  hint: --txt line"):
        run(tmp_path / "a.txt", tmp_path / "other")


def test_a_bomb_does_not_fill_the_memory(tmp_path, monkeypatch):
    """32 MB of zeros in 32 kB are read in small pieces; having no newline, they are refused early."""
    monkeypatch.setattr(text, "LONGEST", 4 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bytes(32 << 20)))
    sizes, real = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: sizes.append(n) or real(self, n))
    with pytest.raises(FileError, match="has more than"):
        run(tmp_path / "a.jsonl.gz", tmp_path / "out")
    assert 0 < max(sizes) <= text.BLOCK and sum(sizes) < 6 << 20


def test_rows_of_parquet_that_are_bad(tmp_path):
    column = pa.array(["a", None, "", "b"])
    table = pa.table({"text": column, "id": ["1", "2", "3", "4"]})
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [b"\xff", b"a"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "c.parquet")
    run(tmp_path, tmp_path / "out", max_bad=ANY)
    assert documents(tmp_path / "out") == [ids("a"), ids("b")]
    kinds = [(Path(bad["file"]).name, bad["line"], bad["kind"]) for bad in reported(tmp_path / "out")]
    wrong = "text of a wrong type"
    assert kinds == [("a.parquet", 2, "no text"), *((f, n, wrong) for f in ("b.parquet", "c.parquet") for n in (1, 2))]


def test_nothing_but_bad_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{\n{\n")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    report = run(tmp_path, tmp_path / "out", max_bad=ANY)
    assert report.total.documents == 0 and documents(tmp_path / "out") == []
    assert np.fromfile(tmp_path / "out" / "tokens.bin", "u1").size == 0
    assert report.total.lines == 2 and "there is no document in any of the sources" in report.notes
