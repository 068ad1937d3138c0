"""Plans: every row against plain lists of documents, the same for any ranks, refused when the data changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from surgery.cli.data_plan import plan_command, show_command
from surgery.data.files.idx import IndexedWriter, read_index, write_index
from surgery.data.plans.batches import Batches
from surgery.data.plans.draft import draft_plan
from surgery.data.plans.order import split
from surgery.data.plans.plan import Plan, open_plan, write_plan
from surgery.data.rows import IGNORE
from surgery.errors import ConfigError, FileError, OutputError, SurgeryError, UsageError

TEXT = Path(__file__).parent / "golden" / "tokenize"
S = 16
# documents of each source, file by file: some empty, one longer than two rows, files that end inside a row
LENGTHS = {"web": [[5, 0, 21, 3, 40, 7], [2, 33, 1], [18, 6]], "math": [[4] * 9 + [9, 17]]}


def ids(name: str, file: int, document: int, length: int) -> list[int]:
    """Ids that no other document has in a row."""
    return [1 + (7 * t + 31 * document + 61 * file + (200 if name == "math" else 0)) % 499 for t in range(length)]


def stream(name: str) -> list[list[int]]:
    """All documents of a source, in order."""
    return [ids(name, f, d, n) for f, lengths in enumerate(LENGTHS[name]) for d, n in enumerate(lengths)]


def mask_of(name: str) -> list[int]:
    """math has a label mask: every third token is not learnt."""
    tokens = sum(map(len, stream(name)))
    return [int(name != "math" or t % 3 != 1) for t in range(tokens)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, files in LENGTHS.items():
        for number, lengths in enumerate(files):
            with IndexedWriter(tmp_path / f"{name}{number}", "uint16") as writer:
                for document, length in enumerate(lengths):
                    writer.add(ids(name, number, document, length))
    (tmp_path / "math0.mask").write_bytes(bytes(mask_of("math")))
    return tmp_path


def mixture(folder: Path, **more: Any) -> Path:
    sources = [
        {"name": "web", "paths": "web*.bin", "weight": 1},
        {"name": "math", "paths": ["math0.idx"], "weight": 1, "holdout": 1},
    ]
    path = folder / "mix.yaml"
    base = {"sequence_length": S, "budget": {"tokens": 40 * S}, "rows_per_step": 4, "vocab_size": 500}
    path.write_text(yaml.safe_dump({**base, "sources": sources, **more}))
    return path


def made(folder: Path, **more: Any) -> Plan:
    return write_plan(draft_plan(mixture(folder, **more)), folder / "plan", force=True)


Piece = list[tuple[int, int]]  # (position in its document's piece, place in the stream) of every token


def cut_rows(name: str) -> list[list[Piece]]:
    """Rows as they are cut from the stream: pieces of documents."""
    places = [(d, t) for d, document in enumerate(stream(name)) for t in range(len(document))]
    rows = []
    for i in range(len(places) // S):
        pieces: list[Piece] = []
        for k in range(i * S, (i + 1) * S):
            if not pieces or places[k][0] != places[k - 1][0]:
                pieces.append([])
            pieces[-1].append((len(pieces[-1]), k))
        rows.append(pieces)
    return rows


def document_rows(name: str) -> list[list[Piece]]:
    rows, at = [], 0
    for document in stream(name):
        if document:
            rows.append([[(t, at + t) for t in range(min(len(document), S))]])
        at += len(document)
    return rows


def expected(name: str, pieces: list[Piece], isolate: bool) -> tuple[list[int], list[int], list[int]]:
    """Tokens, labels and positions of a row, one token after the other."""
    flat = [t for document in stream(name) for t in document]
    mask = mask_of(name)
    tokens, labels, positions = [], [], []
    for number, piece in enumerate(pieces):
        for k, (position, place) in enumerate(piece):
            following = piece[k + 1] if k + 1 < len(piece) else None
            if following is None and not isolate and number + 1 < len(pieces):
                following = pieces[number + 1][0]
            tokens.append(flat[place])
            positions.append(position)
            labels.append(flat[following[1]] if following and mask[following[1]] else IGNORE)
    padding = S - len(tokens)
    return tokens + [0] * padding, labels + [IGNORE] * padding, positions + list(range(padding))


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(("packing", "rows_of"), [("concatenate", cut_rows), ("document", document_rows)])
def test_every_row_of_every_step(data, packing, rows_of: Callable[[str], list[list[Piece]]], isolate):
    batches = Batches(made(data, packing=packing, isolate=isolate))
    assert len(batches) == 10
    right, seen = {name: rows_of(name) for name in LENGTHS}, set()
    for step in range(len(batches)):
        rows = batches.rows(step)
        assert (rows.positions is None) == (not isolate)
        for row, (source, instance) in enumerate(zip(rows.source, rows.instance, strict=True)):
            name = batches.sources[source]
            tokens, labels, positions = expected(name, right[name][instance], isolate)
            assert rows.tokens[row].tolist() == tokens
            assert rows.labels[row].tolist() == labels
            assert rows.positions is None or rows.positions[row].tolist() == positions
            seen.add((name, int(instance)))
            passages = batches.passages(int(source), int(instance))
            assert sum(p.stop - p.start for p in passages) == sum(map(len, right[name][instance]))
            assert len(passages) == len(right[name][instance])
    out = int(batches.heldout("math").instance[0])
    assert seen == {(n, i) for n in LENGTHS for i in range(len(right[n]))} - {("math", out)}


def test_best_fit_rows_hold_whole_documents(data):
    batches = Batches(made(data, packing="best_fit"))
    documents = {tuple(d) for name in LENGTHS for d in stream(name) if 0 < len(d) <= S}
    whole = set()
    for rows in [*(batches.rows(step) for step in range(len(batches))), batches.heldout("math")]:
        assert rows.positions is not None
        for row in range(len(rows)):
            at = 0
            for passage in batches.passages(int(rows.source[row]), int(rows.instance[row])):
                size = passage.stop - passage.start
                held = rows.tokens[row, at : at + size].tolist()
                assert rows.positions[row, at : at + size].tolist() == list(range(size))
                assert rows.labels[row, at + size - 1] == IGNORE
                assert held == np.fromfile(passage.path, np.uint16)[passage.start : passage.stop].tolist()
                if batches.sources[rows.source[row]] == "web":
                    assert rows.labels[row, at : at + size - 1].tolist() == held[1:]
                whole |= {tuple(held)} & documents
                at += size
            assert (rows.labels[row, at:] == IGNORE).all() and (rows.tokens[row, at:] == 0).all()
    assert whole == documents


@pytest.mark.parametrize("world", [1, 2, 4, 8, 3])
def test_a_step_is_the_same_for_any_number_of_ranks(data, world):
    batches = Batches(made(data), rows_per_step=8)
    for step in range(len(batches)):
        whole = batches.rows(step)
        parts = [batches.rows(step, rank, world) for rank in range(world)]
        together = np.zeros_like(whole.tokens)
        for rank, part in enumerate(parts):
            together[rank::world] = part.tokens
        assert np.array_equal(together, whole.tokens)


def test_seeking_finds_what_iterating_finds(data):
    plan = made(data)
    one = [Batches(plan).rows(step).tokens for step in range(10)]
    for step in (9, 0, 5):
        assert np.array_equal(Batches(open_plan(data / "plan")).rows(step).tokens, one[step])
    wide = Batches(plan, rows_per_step=8)  # other batch sizes see the same rows in the same order
    assert np.array_equal(wide.rows(2).tokens, np.concatenate(one[4:6]))
    assert (Batches(plan, rows_per_step=7).unused, len(Batches(plan, rows_per_step=7))) == (5, 5)
    for step in (10, -1):
        with pytest.raises(UsageError, match="there is no step"):
            Batches(plan).rows(step)


def test_held_out_rows_are_fixed_and_never_trained_on(data):
    a, b = made(data, seed=1), made(data, seed=2)
    held = [Batches(p).heldout("math") for p in (a, b)]
    assert held[0].instance.tolist() == held[1].instance.tolist() == [1]
    assert np.array_equal(held[0].tokens, held[1].tokens)
    for plan in (a, b):
        source, instance = split(plan.order)
        assert not ((source == 1) & (instance == 1)).any()
    assert (a.order != b.order).any()
    assert len(Batches(a).heldout("web")) == 0
    with pytest.raises(UsageError, match="no source 'code'"):
        Batches(a).heldout("code")


def swapped(path: Path) -> None:
    """Another document order: the same size, other content."""
    path.write_bytes(np.fromfile(path, np.uint16)[::-1].tobytes())


def longer(path: Path) -> None:
    """One token more, and an index that knows it."""
    index, raw = read_index(path), np.fromfile(path, np.uint16)
    with IndexedWriter(path.with_suffix(""), "uint16") as writer:
        writer.extend(np.append(raw, 5), [*index.lengths[:-1], index.lengths[-1] + 1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swapped, r"web: 0 web0.bin: sample: .* -> "),
        (longer, r"web: 0 web0.bin: bytes: 152 -> 154"),
        (
            lambda path: path.with_suffix(".mask").write_bytes(bytes(76)),
            r"web: 0 web0.bin: web0.mask: bytes: not there -> 76",
        ),
    ],
)
def test_changed_data_are_named(data, change, says):
    made(data)
    change(data / "web0.bin")
    with pytest.raises(ConfigError, match=says):
        open_plan(data / "plan")


def test_missing_and_damaged_files_of_a_plan(data):
    made(data)
    order = (data / "plan" / "order.u64").read_bytes()
    (data / "plan" / "order.u64").write_bytes(order[:-8] + bytes(8))
    with pytest.raises(FileError, match=r"order.u64: is not what plan.json says"):
        open_plan(data / "plan")
    (data / "plan" / "order.u64").write_bytes(order)
    text = (data / "plan" / "plan.json").read_text()
    for old, new in (('"sources": [', '"sourcs": ['), ('"order.u64"', '"../order.u64"'), ("surgery-plan-1", "x")):
        (data / "plan" / "plan.json").write_text(text.replace(old, new))
        with pytest.raises(FileError, match=r"plan\.json"):
            open_plan(data / "plan")
    (data / "plan" / "plan.json").write_text(text)
    os.unlink(data / "math0.bin")
    with pytest.raises(FileError, match="cannot be opened"):
        open_plan(data / "plan")


def test_an_order_that_names_what_is_not_there_is_refused(data):
    """Even with a plan.json that agrees with it."""
    import hashlib

    made(data)
    order = np.fromfile(data / "plan" / "order.u64", np.uint64)
    for bad in (np.uint64(5 << 40), np.uint64(10_000)):
        order[0] = bad
        path, before = data / "plan" / "plan.json", (data / "plan" / "order.u64").read_bytes()
        (data / "plan" / "order.u64").write_bytes(order.tobytes())
        old, new = (hashlib.sha256(b).hexdigest() for b in (before, order.tobytes()))
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(FileError, match="names instances that are not there"):
            open_plan(data / "plan")


def test_resuming_with_another_plan_names_what_differs(data):
    saved = json.loads(json.dumps(made(data, seed=1).fingerprint))  # as a checkpoint keeps it
    open_plan(data / "plan").check(saved)
    other = made(data, seed=2, sequence_length=8)
    with pytest.raises(ConfigError) as caught:
        other.check(saved)
    assert "seed: 1 -> 2" in str(caught.value) and "sequence_length: 16 -> 8" in str(caught.value)
    assert other.digest != digest(data)


def digest(data: Path) -> str:
    return made(data, seed=1).digest


def test_data_and_plan_can_be_moved(data, tmp_path_factory):
    there = tmp_path_factory.mktemp("there")
    first = Batches(made(data)).rows(0).tokens
    shutil.copytree(data, there / "x")
    for path in [*data.glob("*.bin"), *data.glob("*.idx")]:
        os.unlink(path)
    with pytest.raises(FileError):
        open_plan(there / "x" / "plan")
    moved = open_plan(there / "x" / "plan", root=there / "x")
    assert np.array_equal(Batches(moved).rows(0).tokens, first)


def test_what_cannot_be_planned(data):
    np.save(data / "plain.npy", np.ones(100, np.uint16))
    web = {"name": "web", "paths": "web*.bin", "weight": 1}
    for more, says in (
        ({"sources": [{**web, "paths": "plain.npy"}]}, "nothing tells where the documents of plain.npy end"),
        ({"sources": [{**web, "paths": "none*.bin"}]}, "none.* names no file"),
        ({"sources": [{**web, "paths": ["web0.bin", "web0.idx"]}]}, "names .*web0.bin twice"),
        ({"sources": [{**web, "label_mask": ["math0.mask"]}]}, "names 1 files for 3 of tokens"),
        ({"vocab_size": 300}, "vocabulary has 300 ids"),
        ({"pad_id": 500, "packing": "document"}, "pad_id 500"),
        ({"sources": [{**web, "paths": "mix.yaml"}]}, "no token file that is known"),
    ):
        with pytest.raises(SurgeryError, match=says):
            draft_plan(mixture(data, **more))
    with pytest.raises(OutputError, match="exists already"):
        write_plan(draft_plan(mixture(data)), made(data).folder)
    plain = mixture(data, sources=[{**web, "paths": "plain.npy"}], isolate=False)
    assert Batches(write_plan(draft_plan(plain), data / "p")).rows(0).positions is None


def test_a_file_in_two_sources_and_a_hard_link_are_told(data):
    os.link(data / "web0.bin", data / "again.bin")
    shutil.copy(data / "web0.idx", data / "again.idx")
    sources = [{"name": n, "paths": p, "weight": 1} for n, p in (("a", "web0.bin"), ("b", "again.bin"))]
    notes = draft_plan(mixture(data, sources=sources)).notes
    assert "web0.bin is in a, b: what one holds out the others may train on" in notes
    twice = {"name": "a", "paths": ["web0.bin", "again.bin"], "weight": 1}
    with pytest.raises(ConfigError, match="twice"):
        draft_plan(mixture(data, sources=[twice]))


def test_what_is_said_of_masks_padding_and_cut_documents(data):
    notes = draft_plan(mixture(data, packing="document")).notes
    assert "math: a label mask says what is learnt" in notes
    assert "web: documents longer than 16 tokens are cut off; 48 tokens are lost" in notes
    assert "math: 65% of its instances is padding, which counts towards the budget" in notes  # 115 of 11 * 16
    web = {"name": "web", "paths": "web*.bin", "weight": 1}
    for more, says in ((["messages_key", "m"], "messages_key is for text"), (["label_mask", "x"], "x names no file")):
        with pytest.raises(ConfigError, match=says):
            draft_plan(mixture(data, sources=[{**web, more[0]: more[1]}]))


def test_an_index_that_is_made_later_changes_nothing(tmp_path):
    for file in (TEXT / "datatrove").iterdir():
        shutil.copy(file, tmp_path)
    source = {"name": "d", "paths": "*.ds", "weight": 1}
    plan = made(tmp_path, sources=[source], vocab_size=600)
    [file] = plan.sources[0].files
    assert file.bounds is not None
    lengths = np.diff(file.bounds.starts(np.arange(len(file.bounds) + 1)))
    write_index(tmp_path / "00000_unshuffled.idx", "uint16", lengths)
    assert open_plan(plan.folder).digest == plan.digest


@pytest.mark.slow
def test_hundreds_of_files_with_few_open(tmp_path):
    for number in range(400):
        np.save(tmp_path / f"f{number:03d}.npy", np.full(5, number, np.uint16))
    plan = made(tmp_path, sources=[{"name": "f", "paths": "f*.npy", "weight": 1}], isolate=False)
    rows = Batches(plan, rows_per_step=40).rows(0)
    for row, instance in enumerate(rows.instance):
        assert rows.tokens[row].tolist() == [t // 5 for t in range(instance * S, (instance + 1) * S)]
    opened = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert 0 < sum(path.startswith(str(tmp_path)) for path in opened) < 400  # and sockets of whatever ran before


def test_every_format_in_one_mixture(tmp_path):
    """dolma (whose ends the plan keeps), datatrove and Megatron hold the same documents in different orders."""
    sources = [
        {"name": "dolma", "paths": str(TEXT / "dolma" / "*.npy"), "weight": 1},
        {"name": "datatrove", "paths": str(TEXT / "datatrove_shuffled"), "weight": 1},
        {"name": "megatron", "paths": str(TEXT / "megatron_int32.idx"), "weight": 1},
    ]
    plan = made(tmp_path, sequence_length=64, vocab_size=600, budget={"tokens": 64 * 300}, sources=sources)
    assert [s.documents for s in plan.file.sources] == [105, 115, 115]
    kept = sorted(n for n in os.listdir(plan.folder) if n.endswith(".ends.i64"))
    assert kept == ["dolma.0.ends.i64", "dolma.1.ends.i64", "dolma.2.ends.i64"]
    rows = Batches(plan).rows(3)
    assert rows.positions is not None and (rows.positions[:, 1:] == 0).any()


def test_text_is_tokenized_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    shutil.copytree(TEXT / "documents", tmp_path / "docs")
    shutil.copy(TEXT / "tokenizer.json", tmp_path / "tokenizer.json")
    source = {"name": "docs", "paths": "docs", "multiplier": 1, "eos": 0}
    more = {"budget": None, "vocab_size": None, "tokenizer": "tokenizer.json", "sequence_length": 64}
    plan = made(tmp_path, sources=[source], **more)
    assert plan.sources[0].tokens == read_index(TEXT / "megatron_uint16").tokens
    ids = np.fromfile(TEXT / "megatron_uint16.bin", np.uint16)
    held = Batches(plan).rows(0)
    starts = held.instance * 64
    assert held.tokens.tolist() == [ids[s : s + 64].tolist() for s in starts]
    [folder] = (tmp_path / "cache" / "tokens").iterdir()
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    os.rename(tmp_path / "docs", tmp_path / "renamed")  # names are no part of it
    made(tmp_path, sources=[{**source, "paths": "renamed"}], **more)
    assert (folder / "tokens.bin").stat().st_mtime_ns == stamp
    assert list((tmp_path / "cache" / "tokens").iterdir()) == [folder]
    with pytest.raises(ConfigError, match="names no tokenizer"):
        draft_plan(mixture(tmp_path, sources=[{**source, "paths": "renamed"}], budget=None))
    (tmp_path / "renamed" / "notes.md").touch()
    url = {**source, "paths": f"file://{tmp_path}/renamed"}
    for _ in range(2):  # made, and taken from the cache
        draft = draft_plan(mixture(tmp_path, sources=[url], **more))
        assert draft.sources[0].tokens == plan.sources[0].tokens
        assert [n.partition(": ")[2].split(",")[0] for n in draft.notes[-2:]] == [
            f"left out of file://{tmp_path}/renamed", "blank documents left out: 5",
        ]  # fmt: skip


def test_bad_lines_of_text_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    shutil.copy(TEXT / "tokenizer.json", tmp_path / "tokenizer.json")
    lines = ['{"text": "ka vu mi zen"}'] * 2000
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "no JSON", *lines]))
    source = {"name": "docs", "paths": "a.jsonl", "multiplier": 1, "eos": 0}
    draft = draft_plan(mixture(tmp_path, sources=[source], budget=None, vocab_size=None, tokenizer="tokenizer.json"))
    assert draft.sources[0].documents == 4000
    [said] = [note for note in draft.notes if "bad lines" in note]
    what, _, report = said.partition(", listed in ")
    assert what == "docs: bad lines left out: 1" and json.loads(Path(report).read_text())["line"] == 2001


def run(*args: object) -> str:
    """What a command prints; its errors are raised."""
    command = {"plan": plan_command, "show": show_command}[str(args[0])]
    done = CliRunner().invoke(command, [str(a) for a in args[1:]], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands(data):
    path = mixture(data)
    table = run("plan", path)
    assert "web" in table and "40 instances of 16 tokens" in table and "10 steps of 4 rows" in table
    assert not (data / "plan").exists()
    found = json.loads(run("plan", path, data / "plan", "--seed", 7, "--rows-per-step", 5, "--json"))
    assert (found["seed"], found["steps"], found["left_over"]) == (7, 8, 0)
    assert [s["take"] for s in found["sources"]] == [20, 20]
    web = found["sources"][0]
    assert (web["documents"], web["tokens"], web["have"], web["epochs"]) == (11, 136, 8, 2.5)
    assert open_plan(data / "plan").digest == found["fingerprint"]

    shown = json.loads(run("show", data / "plan", "--step", 3, "--json"))
    rows = Batches(open_plan(data / "plan")).rows(3)
    assert [r["tokens"] for r in shown["rows"]] == rows.tokens.tolist()
    assert [r["labels"] for r in shown["rows"]] == rows.labels.tolist()
    math = json.loads(run("show", data / "plan", "--step", 3, "--source", "math", "--json"))["rows"]
    assert [r["row"] for r in math] == np.flatnonzero(rows.source == 1).tolist()
    text = run("show", data / "plan", "--step", 3, "--rows", "1:3")
    assert "step 3 of 8: 5 rows" in text and "row 1 " in text and "row 2 " in text and "row 3 " not in text
    assert f"web #{rows.instance[1]}" in text or f"math #{rows.instance[1]}" in text
    with pytest.raises(UsageError, match="none of the rows that are asked for") as caught:
        run("show", data / "plan", "--step", 3, "--rows", "5:9")
    assert caught.value.hint == "it has 0 to 4"


def test_show_decodes_and_refuses_another_tokenizer(tmp_path):
    shutil.copy(TEXT / "tokenizer.json", tmp_path / "tokenizer.json")
    source = {"name": "docs", "paths": str(TEXT / "megatron_uint16.bin"), "multiplier": 1}
    made(tmp_path, sources=[source], budget=None, vocab_size=None, tokenizer="tokenizer.json", sequence_length=128)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TEXT / "tokenizer.json"))
    shown = json.loads(run("show", tmp_path / "plan", "--step", 1, "--decode", "--json"))
    for row in shown["rows"]:
        texts = [p["text"] for p in row["passages"]]
        assert len(texts) > 0 and row["positions"].count(0) == len(texts)
        ends = [i for i, p in enumerate([*row["positions"], 0]) if p == 0]
        want = [row["tokens"][a:b] for a, b in pairwise(ends)]
        assert texts == [tokenizer.decode(t, skip_special_tokens=False) for t in want]
    text = run("show", tmp_path / "plan", "--step", 1, "--decode", "--rows", "0")
    assert all(line.isprintable() for line in text.splitlines())
    changed = json.loads((TEXT / "tokenizer.json").read_text())
    changed["added_tokens"][0]["normalized"] = not changed["added_tokens"][0]["normalized"]
    (tmp_path / "other.json").write_text(json.dumps(changed))
    (tmp_path / "other").mkdir()
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"tokenizer: [0-9a-f]{64} -> [0-9a-f]{64}"):
        open_plan(tmp_path / "plan")
    os.unlink(tmp_path / "tokenizer.json")
    assert len(Batches(open_plan(tmp_path / "plan"))) > 0  # training needs no tokenizer
    shutil.copy(TEXT / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.move(tmp_path / "other.json", tmp_path / "other" / "tokenizer.json")
    with pytest.raises(ConfigError, match="another tokenizer than the one of the plan"):
        run("show", tmp_path / "plan", "--step", 1, "--decode", "--tokenizer", tmp_path / "other")


def test_show_other_runs(tmp_path):
    golden = Path(__file__).parent / "golden" / "data"
    want = json.loads((golden / "olmo" / "expected.json").read_text())
    shown = json.loads(run("show", golden / "olmo", "--step", 2, "--json"))
    assert [r["tokens"] for r in shown["rows"]] == [b["input_ids"] for b in want["batches"][2]]
    run_ = {"data": str(golden / "megatron" / "multi"), "sequence_length": 24, "rows_per_step": 3, "split": "1,0,0"}
    (tmp_path / "run.yaml").write_text(json.dumps({"megatron": run_}))
    assert "step 1 of 6: 3 rows (3 of multi), 72 labels" in run("show", tmp_path / "run.yaml", "--step", 1)
    np.savez(tmp_path / "b.npz", input_ids=np.ones((2, 1, 3, 5), np.uint8))
    assert "12 labels" in run("show", tmp_path / "b.npz", "--step", 1)
    for name, says in (("olmo_core", "is no plan and no run"), ("megatron/cache/single", "name one of")):
        with pytest.raises(ConfigError, match=says):
            run("show", golden / name, "--step", 0)
    with pytest.raises(ConfigError, match="describes no run"):
        run("show", mixture(tmp_path), "--step", 0)
