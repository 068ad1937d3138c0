"""Text becomes token files: as the upstream programs do it, whatever the packing, the processes and the blocks."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from tokenizers import Tokenizer

from surgery.data import extra
from surgery.data.files.readers import open_tokens
from surgery.data.tokenizing import text, tokenize
from surgery.data.tokenizing.arrange import permutation
from surgery.data.tokenizing.bad_lines import Limit
from surgery.data.tokenizing.prepare import Choices, settings_for
from surgery.data.tokenizing.sources import find_sources
from surgery.data.tokenizing.vocabulary import load_vocabulary
from surgery.errors import ConfigError, FileError, OutputError, SurgeryError, UsageError
from tests.killing import tree

GOLDEN = Path(__file__).parent / "golden" / "tokenize"
NAIVE = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
VOCABULARY = load_vocabulary(str(GOLDEN / "tokenizer.json"))
LINES = b"".join(gzip.decompress(p.read_bytes()) for p in sorted(GOLDEN.glob("documents/*.gz")))
DOCUMENTS = [json.loads(line) for line in LINES.splitlines()]
TEXTS = [d["text"] for d in DOCUMENTS]
MEGATRON = Choices(eos="0")
DOLMA = Choices(format="dolma", eos="<|endoftext|>", pad="1", max_size=6000, ring=2, batch=25)
ANY = Limit.parse("100%")


def run(source, dst, choices=MEGATRON, **more):
    """Tokenize; the sources are given as strings or paths."""
    places = source if isinstance(source, list) else [source]
    sources, _ = find_sources([str(place) for place in places])
    settings = settings_for(choices, VOCABULARY)
    return tokenize.tokenize(sources, Path(dst), VOCABULARY, settings, **{"workers": 1, "durable": False} | more)


def ids(text, eos=True):
    return NAIVE.encode(text, add_special_tokens=False).ids + [0] * eos


def documents(folder):
    """All documents of all token files in a folder, as lists, by the readers of this package."""
    found = []
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".bin", ".npy")):
        [file] = open_tokens(path)
        starts = file.bounds.starts(np.arange(len(file.bounds) + 1))
        found += [file.ids.array[a:b].tolist() for a, b in pairwise(starts)]
    return found


def rows(folder):
    """dolma's documents, read by the standard library alone: (id, path, line) -> ids, in the order of the files."""
    found = []
    for path in sorted(Path(folder).glob("*.npy")):
        payload, at = np.fromfile(path, "<u2"), 0
        with gzip.open(path.with_suffix("").with_suffix(".csv.gz"), "rt", newline="") as file:
            for start, end, name, source, line in csv.reader(file):
                assert int(start) == at
                at = int(end)
                found.append(((name, source, int(line)), payload[int(start) : at].tolist()))
        assert at == len(payload)
    return found


@pytest.fixture
def here(monkeypatch):
    """The paths in dolma's golden are relative to its folder."""
    monkeypatch.chdir(GOLDEN)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "workers"), [("uint16", 1), ("int32", 1), ("uint16", 2)])
def test_megatrons_files_byte_for_byte(dtype, workers, tmp_path):
    report = run(GOLDEN / "documents", tmp_path / "out", replace(MEGATRON, dtype=dtype), workers=workers)
    for suffix in (".bin", ".idx"):
        golden = GOLDEN / f"megatron_{dtype}{suffix}"
        assert (tmp_path / "out" / f"tokens{suffix}").read_bytes() == golden.read_bytes()
    assert report.total.lines == 120 and report.total.documents == 115 and report.total.blank == 5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokens.bin", "tokens.idx", "tokens.json"]


def test_datatroves_documents(tmp_path):
    run(GOLDEN / "documents", tmp_path / "out")
    assert (tmp_path / "out" / "tokens.bin").read_bytes() == (GOLDEN / "datatrove/00000_unshuffled.ds").read_bytes()


def test_dolmas_documents(here, tmp_path):
    """Each of dolma's documents under its id, path and line; the order is dolma's accident, so compared as a set."""
    report = run("documents/*.jsonl.gz", tmp_path / "out", DOLMA)
    mine, golden = rows(tmp_path / "out"), rows("dolma")
    assert dict(mine) == dict(golden) and len(mine) == len(golden) == 105
    assert [p.name for p in sorted((tmp_path / "out").glob("*.npy"))] == [f"part-0-0000{i}.npy" for i in range(3)]
    assert all(p.stat().st_size // 2 < 6000 for p in (tmp_path / "out").glob("*.npy"))
    assert report.total.blank == 15


@pytest.mark.slow
def test_dolmas_order_is_that_of_the_seed(here, tmp_path, monkeypatch):
    def order(name, choices, block=text.BLOCK, **more):
        monkeypatch.setattr(text, "BLOCK", block)
        run("documents", tmp_path / name, choices, **more)
        return [key for key, _ in rows(tmp_path / name)], tree(tmp_path / name)

    first = order("first", DOLMA)
    assert order("second", DOLMA, block=997) == first
    assert order("third", DOLMA, workers=2) == first
    others = [order("seed", replace(DOLMA, seed=7))[0], order("ring", replace(DOLMA, ring=4))[0]]
    assert all(sorted(other) == sorted(first[0]) and other != first[0] for other in others)
    plain, _ = order("plain", replace(DOLMA, in_order=True))
    assert plain == sorted(plain, key=lambda key: key[1:])
    batches = [{key[1] for key in first[0][i : i + 25]} for i in range(0, 100, 25)]
    assert max(map(len, batches)) <= 3  # two files are read at a time, and one may end


def test_a_permutation_is_the_same_for_ever():
    def mixed(place, key):  # splitmix64, in plain integers
        x = ((place + 1) * 0x9E3779B97F4A7C15 + key) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = mixed(4, 3920)
    assert permutation(99, 3920, 4).tolist() == sorted(range(99), key=lambda i: mixed(i, key))
    for count in (0, 1, 1000):
        assert sorted(permutation(count, 2**70, 1).tolist()) == list(range(count))


def packed(folder):
    """The same documents in every format and packing."""
    lines = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in DOCUMENTS).encode()
    table = pa.table({"text": TEXTS, "id": [d["id"] for d in DOCUMENTS], "n": range(120)})
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.ndjson").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    (folder / "c.json.gz").write_bytes(b"".join(map(gzip.compress, (lines[:5000], lines[5000:]))))
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})  # more than is unpacked by default
    frames = zstd.compress(lines[:7000]), packer.compress(lines[7000:]), packer.flush()
    (folder / "d.jsonl.zst").write_bytes(b"".join(frames))
    pq.write_table(table, folder / "e.parquet", row_group_size=50, compression="snappy")
    return sorted(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("block", [1 << 20, 4096, 61])
def test_the_format_and_where_blocks_end_do_not_matter(block, tmp_path, monkeypatch):
    files, golden = packed(tmp_path / "in"), (GOLDEN / "megatron_uint16.bin").read_bytes()
    monkeypatch.setattr(text, "BLOCK", block)
    for file in files:
        report = run(file, tmp_path / "out", force=True)
        assert (tmp_path / "out" / "tokens.bin").read_bytes() == golden, file
        assert (report.total.lines, report.total.bad) == (120, 0)
    run(tmp_path / "in", tmp_path / "all")
    assert (tmp_path / "all" / "tokens.bin").read_bytes() == golden * len(files)


def test_urls_of_fsspec(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for i, path in enumerate(sorted(GOLDEN.glob("documents/*.gz"))):
        with system.open(f"/bucket/web/{i}/docs.jsonl.gz", "wb") as file:
            file.write(path.read_bytes())
    system.pipe("/bucket/web/README", b"no text")
    for number, place in enumerate(
        ("memory://bucket/web", "memory://bucket/web/*/docs*.gz", "memory://bucket/**/*.gz")
    ):
        run(place, tmp_path / str(number))
        assert (tmp_path / str(number) / "tokens.bin").read_bytes() == (GOLDEN / "megatron_uint16.bin").read_bytes()
    assert "README" in find_sources(["memory://bucket/web"])[1][0]
    for place in ("memory://bucket/none", "memory://bucket/*.parquet", "nonsense://x/y.jsonl"):
        with pytest.raises(FileError):
            find_sources([place])


def test_plain_text(tmp_path):
    book = "\ufeffone two\r\n\nthree\n"
    (tmp_path / "book.txt").write_bytes(book.encode())
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(b"four"))
    run(tmp_path / "book.txt", tmp_path / "file")
    assert documents(tmp_path / "file") == [ids(book[1:])]
    report = run([tmp_path / "book.txt", tmp_path / "more.txt.gz"], tmp_path / "lines", replace(MEGATRON, txt="line"))
    assert documents(tmp_path / "lines") == [ids("one two"), ids("three"), ids("four")]
    assert (report.total.blank, report.total.bad) == (1, 0)


def test_files_hold_fewer_tokens_than_max_size(tmp_path):
    run(GOLDEN / "documents", tmp_path / "out", replace(MEGATRON, max_size=700))
    sizes = [p.stat().st_size // 2 for p in sorted((tmp_path / "out").glob("*.bin"))]
    lengths, expected, held = [len(ids(t)) for t in TEXTS if t], [], 0
    for length in lengths:
        if held and held + length >= 700:
            expected.append(held)
            held = 0
        held += length
    assert sizes == [*expected, held] and max(sizes) > 1000  # a long document has a file of its own
    assert documents(tmp_path / "out") == [ids(t) for t in TEXTS if t]


def test_what_is_put_around_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"t": " a<|endoftext|>"}\n{"t": "b"}\n{"t": "<|pad|>c "}')
    texts = [" a<|endoftext|>", "b", "<|pad|>c "]

    def made(name, **choices):
        run(tmp_path / "a.jsonl", tmp_path / name, Choices(text="t", **choices))
        return documents(tmp_path / name)

    assert made("none", append_eos=False) == [ids(t, eos=False) for t in texts]
    assert made("eos", eos="0") == [ids(t) for t in texts]
    assert made("both", eos="0", append_bos=True, bos="<|pad|>") == [[1, *ids(t)] for t in texts]
    once = made("dolma", format="dolma", in_order=True, eos="0", append_bos=True, bos="1")
    assert once == [[1, *ids("a<|endoftext|>", eos=False)], [1, *ids("b")], ids("<|pad|>c")]  # as dolma: never twice


def test_tokenizers_that_cut_pad_or_add_are_kept_from_it(tmp_path):
    held = json.loads((GOLDEN / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
           "pad_type_id": 0, "pad_token": "<|pad|>"}  # fmt: skip
    special = {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}}
    parts = [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special}
    document = json.dumps({**held, "truncation": cut, "padding": pad, "post_processor": template}).encode()
    vocabulary = replace(VOCABULARY, document=document)
    sources, _ = find_sources([str(GOLDEN / "documents")])
    tokenize.tokenize(sources, tmp_path / "out", vocabulary, settings_for(MEGATRON, vocabulary), workers=1)
    assert (tmp_path / "out" / "tokens.bin").read_bytes() == (GOLDEN / "megatron_uint16.bin").read_bytes()


def test_the_dtype_is_that_of_the_vocabulary():
    def dtype(format, size, given=None):
        return settings_for(Choices(format=format, eos="0"), VOCABULARY).output.dtype(size, given)

    assert [dtype("megatron", n) for n in (600, 65_499, 65_500, 200_000)] == ["uint16", "uint16", "int32", "int32"]
    assert [dtype("dolma", n) for n in (256, 257, 65_536, 65_537)] == ["uint8", "uint16", "uint16", "uint32"]
    assert dtype("megatron", 65_536, "uint16") == "uint16"
    for format, size, given in (("megatron", 65_537, "uint16"), ("megatron", 9, "uint32"), ("dolma", 2**33, None)):
        with pytest.raises(UsageError):
            dtype(format, size, given)


@pytest.mark.parametrize(
    ("choices", "what"),
    [
        (Choices(), "does not say which token is its eos"),
        (Choices(eos="600"), "--eos '600' is no token"),
        (Choices(eos="<|none|>"), "is no token of"),
        (Choices(eos="0", append_bos=True), "which token is its bos"),
        (Choices(eos="0", text="a", messages="b"), "exclude each other"),
        (Choices(eos="0", prompt="a"), "go together"),
        (Choices(eos="0", template="x.jinja"), "goes with --messages-key"),
        (Choices(messages="m"), "has no chat template"),
        (Choices(eos="0", seed=1, in_order=True), "does not go with --in-order"),
    ],
)
def test_choices_that_cannot_be(choices, what):
    with pytest.raises(UsageError, match=what):
        settings_for(choices, VOCABULARY)


def test_tokens_json_says_where_the_tokens_come_from(here, tmp_path):
    run("documents", tmp_path / "out")
    note = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert note["dtype"] == "uint16" and note["tokens"] == 12378 and note["settings"]["eos"] == 0
    assert note["tokenizer"]["sha256"] == VOCABULARY.sha256 and note["tokenizer"]["vocab_size"] == 600
    assert [s["path"] for s in note["sources"]] == [f"documents/docs-0{i}.jsonl.gz" for i in range(4)]
    assert [s["lines"] for s in note["sources"]] == [30] * 4
    for key in ("documents", "tokens", "blank"):
        assert sum(s[key] for s in note["sources"]) == note[key]


def test_an_output_is_not_replaced_and_another_job_not_mixed_in(tmp_path, monkeypatch):
    run(GOLDEN / "documents", tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        run(GOLDEN / "documents", tmp_path / "out")

    def stop(*_):
        raise KeyError

    def interrupted(name):
        with monkeypatch.context() as patch:
            patch.setattr(tokenize._Run, "index", stop)
            with pytest.raises(KeyError):
                run(GOLDEN / "documents", tmp_path / name, checkpoint=0.0)

    interrupted("new")
    with pytest.raises(OutputError, match=r"another job: its settings differ\n  hint: --force"):
        run(GOLDEN / "documents", tmp_path / "new", replace(MEGATRON, append_bos=True, bos="1"))
    with pytest.raises(OutputError, match="its sources differ"):
        run(GOLDEN / "documents/docs-00.jsonl.gz", tmp_path / "new")
    assert run(GOLDEN / "documents", tmp_path / "new").resumed == 12378
    assert tree(tmp_path / "new") == tree(tmp_path / "out")
    interrupted("other")
    report = run(GOLDEN / "documents/docs-00.jsonl.gz", tmp_path / "other", force=True)
    assert report.resumed == 0 and "discarded the unfinished output of another job" in report.notes


@pytest.mark.slow
def test_progress_adds_up(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 512)
    files, calls = packed(tmp_path / "in"), []
    for choices in (MEGATRON, DOLMA):
        calls.clear()
        report = run(files, tmp_path / choices.format, choices, progress=lambda *n: calls.append(n))
        read, count, tokens = map(sum, zip(*calls, strict=True))
        assert read == sum(f.stat().st_size for f in files) == report.bytes
        assert (count, tokens) == (report.total.documents, report.total.tokens)
        assert min(n for n, _, _ in calls) >= 0


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["none.jsonl"], "cannot be opened: No such file"),
        (["*.jsonl"], "no text there: nothing"),
        (["notes.md"], "no text there: only"),
        (["folder"], "no text there: only"),
        (["a.jsonl.gz", "link.jsonl.gz"], "named twice"),
    ],
)
def test_sources_that_are_none(names, what, tmp_path):
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden.jsonl").write_text("{}")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "link.jsonl.gz").symlink_to("a.jsonl.gz")
    with pytest.raises(SurgeryError, match=what):
        find_sources([str(tmp_path / name) for name in names])


def test_a_source_that_changes_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    sources, _ = find_sources([str(tmp_path / "a.jsonl")])
    os.utime(tmp_path / "a.jsonl", (1, 1))
    with pytest.raises(FileError, match="has changed since"):
        tokenize.tokenize(sources, tmp_path / "out", VOCABULARY, settings_for(MEGATRON, VOCABULARY), workers=1)
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_missing_is_named(tmp_path):
    packed(tmp_path / "in")
    with pytest.raises(FileError, match="has no column 'body', only 'text', 'id', 'n'"):
        run(tmp_path / "in" / "e.parquet", tmp_path / "out", Choices(text="body", eos="0"))


@pytest.mark.parametrize("module", ["pyarrow", "backports.zstd", "fsspec", "tokenizers", "jinja2"])
def test_a_missing_library_names_the_extra(module, tmp_path, monkeypatch):
    real = extra.importlib.util.find_spec
    monkeypatch.setattr(extra.importlib.util, "find_spec", lambda name: None if name == module else real(name))
    packed(tmp_path / "in")
    chat = tmp_path / "t.jinja"
    chat.write_text("{% generation %}{% endgeneration %}")
    source = "memory://x" if module == "fsspec" else tmp_path / "in"
    choices = Choices(messages="m", template=str(chat)) if module == "jinja2" else MEGATRON
    with pytest.raises(SurgeryError, match=rf"needs the package {module.split('.')[0]}.*\n.*\[data\]"):
        run(source, tmp_path / "out", choices)


def test_tokenizers_in_other_files(tmp_path):
    """Meta's files become a tokenizer.json; what is none is refused."""
    meta = Path(__file__).parent / "golden" / "tokenizers"
    for name in ("llama2", "llama3"):
        path = next(p for p in sorted((meta / name).rglob("tokenizer.model")))
        vocabulary = load_vocabulary(str(path))
        assert vocabulary.special["eos"] < vocabulary.size
        assert vocabulary.tokenizer.encode("Hello", add_special_tokens=False).ids
    for name, data in (("tokenizer.json", b"{}"), ("vocab.txt", b"a\nb\n")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises((ConfigError, FileError)):
            load_vocabulary(str(tmp_path))
        (tmp_path / name).unlink()
    with pytest.raises(FileError, match="hf download some/one"):
        load_vocabulary("some/one")


def test_a_damaged_tokenizer_is_an_error_or_works(tmp_path):
    whole, chance, refused = (GOLDEN / "tokenizer.json").read_bytes(), random.Random(2), 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(3):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = chance.choice([b"", b"9", b'"', b"{", b"null", chance.randbytes(2)])
        (tmp_path / "tokenizer.json").write_bytes(data)
        try:
            vocabulary = load_vocabulary(str(tmp_path / "tokenizer.json"))
            assert vocabulary.size > 0
        except SurgeryError:
            refused += 1
    assert 50 < refused < 200
