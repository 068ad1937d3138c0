"""The data of other trainers, number for number: Megatron-core, OLMo, OLMo-core, and recorded batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.data.files.idx import read_index
from surgery.data.files.npy import open_npz
from surgery.data.rows import IGNORE
from surgery.data.trainers import megatron_order
from surgery.data.trainers.megatron_batches import open_megatron
from surgery.data.trainers.megatron_order import blend, exhaustive_blend, sample_order, split_documents
from surgery.data.trainers.olmo_batches import open_olmo
from surgery.data.trainers.olmo_order import CoreSource, core_mixture, core_order, olmo_order, repetitive
from surgery.data.trainers.recorded import RecordedBatches
from surgery.errors import ConfigError, FileError, UsageError

GOLDEN = Path(__file__).parent / "golden" / "data"
MEGATRON, OLMO, CORE = GOLDEN / "megatron", GOLDEN / "olmo", GOLDEN / "olmo_core"


def load(path: Path) -> Any:
    return json.loads(path.read_text())


CASES = [
    (name, part, number)
    for name, parts in (("a_uint16_oneepoch", 3), ("b_int32_epochs", 1))
    for number, part in enumerate(("train", "valid", "test")[:parts])
]


def asked(case: dict[str, Any], number: int) -> int:
    """Samples of a part, as the golden's maker asked for them."""
    samples: int = case["requested_samples"]
    return (samples, max(2, samples // 10), 3)[number]


@pytest.mark.parametrize(("name", "part", "number"), CASES)
def test_megatrons_indices(name, part, number):
    case, index = load(MEGATRON / "cases.json")["cases"][name], read_index(MEGATRON / name)
    documents = split_documents(case["split"], len(index.lengths))[number]
    with open_npz(MEGATRON / f"{name}.gpt.npz") as want:
        assert np.array_equal(want[f"{part}.documents"], np.array(documents))
        order = sample_order(index.lengths, documents, asked(case, number), case["sequence_length"], case["seed"])
        for field in ("document", "sample", "shuffle"):
            got = getattr(order, {"document": "documents", "sample": "samples"}.get(field, field))
            assert (
                np.array_equal(got, want[f"{part}.{field}_index"]) and got.dtype == want[f"{part}.{field}_index"].dtype
            )


@pytest.mark.parametrize(("name", "part", "number"), CASES)
def test_megatrons_samples(name, part, number, tmp_path):
    case = load(MEGATRON / "cases.json")["cases"][name]
    run = {
        "data": str(MEGATRON / name), "sequence_length": case["sequence_length"], "samples": asked(case, number),
        "rows_per_step": 1, "seed": case["seed"], "split": case["split"], "part": part, "pad_id": 999,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps({"megatron": run}))
    batches = open_megatron(tmp_path / "run.yaml")
    with open_npz(MEGATRON / f"{name}.gpt.npz") as want:
        tokens, labels, kept = (want[f"{part}.{field}"] for field in ("tokens", "labels", "loss_mask"))
        assert len(tokens) > 2 and len(batches) == len(want[f"{part}.shuffle_index"])
        for i in range(len(tokens)):
            rows = batches.rows(i)
            assert rows.tokens[0].tolist() == tokens[i].tolist()
            assert rows.labels[0].tolist() == np.where(kept[i] == 1, labels[i], IGNORE).tolist()


@pytest.mark.parametrize("name", ["w_5_3_2", "w_dolmino", "exhaustive", "real"])
def test_megatrons_blends(name):
    want = load(MEGATRON / "blend.json")[name]
    if want.get("weights"):
        dataset, sample = blend(want["weights"], want["size"])
    else:
        dataset, sample = exhaustive_blend(want["exhaustive_sizes"])
    shown = len(want["dataset"])
    assert dataset[:shown].tolist() == want["dataset"] and sample[:shown].tolist() == want["sample"]
    if "counts" in want:
        assert np.bincount(dataset).tolist() == want["counts"]


CACHES = {
    "single": {"data": ["multi"], "samples": 30, "split": "100,0,0"},
    "blend": {"data": [0.7, "a_uint16_oneepoch", 0.3, "multi"], "samples": 150, "split": "100,0,0"},
    "exhaustive": {"data": ["a_uint16_oneepoch", "multi"], "split": "90,10,0"},
}


@pytest.mark.parametrize("name", CACHES)
def test_the_cache_of_megatron_and_its_settings_give_the_same_run(name, tmp_path):
    """By the index files that Megatron-core left, and recomputed without them: what its datasets returned."""
    for file in [*MEGATRON.glob("*.bin"), *MEGATRON.glob("*.idx"), *(MEGATRON / "cache" / name).glob("*")]:
        shutil.copy(file, tmp_path)
    want = load(MEGATRON / "cache" / "expected.json")[name]
    kind = "GPTDataset" if name == "single" else "BlendedDataset"
    [described] = tmp_path.glob(f"*{kind}-train-description.txt")
    run = {"sequence_length": 24, "rows_per_step": 1, "seed": 1234, **CACHES[name]}
    (tmp_path / "run.yaml").write_text(json.dumps({"megatron": run}))
    cached, computed = open_megatron(described, 1, pad_id=999), open_megatron(tmp_path / "run.yaml", pad_id=999)
    assert len(cached) == len(computed) == want["samples"]
    for i in range(len(cached)):
        a, b = cached.rows(i), computed.rows(i)
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.labels, b.labels)
        assert i >= len(want["tokens"]) or a.tokens[0].tolist() == want["tokens"][i]
    with pytest.raises(UsageError, match="how many rows a step has"):
        open_megatron(described)


def naive_samples(lengths: list[int], length: int, count: int, extra: int) -> list[list[int]]:
    """Sample after sample, document after document."""
    found, document, offset = [[0, 0]], 0, 0
    for _ in range(count):
        rest = length + extra
        while rest:
            left = lengths[document] - offset
            rest -= left
            if rest <= 0:
                offset += rest + left - extra
                rest = 0
            elif document == len(lengths) - 1:
                offset = lengths[document] - extra
                break
            else:
                document, offset = document + 1, 0
        found.append([document, offset])
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=25), st.integers(2, 11), st.booleans(), st.booleans())
def test_sample_indices_against_a_loop(lengths, length, extra, drop_last):
    if sum(lengths) <= length or (not drop_last and not lengths[-1]):
        return
    found = megatron_order._samples(np.array(lengths), length, sum(lengths), int(extra), drop_last)
    assert found.tolist() == naive_samples(lengths, length, len(found) - 1, int(extra))


def test_a_split_that_comes_to_no_documents_is_an_error():
    with pytest.raises(ConfigError, match="0 documents of 0 tokens make no sample"):
        sample_order(np.full(100, 9, np.int32), split_documents("949,50,1", 100)[2], 3, 8, 1)
    with pytest.raises(ConfigError, match="not three weights"):
        split_documents("90;10", 5)


def test_a_cache_of_other_data_is_refused(tmp_path):
    for file in (MEGATRON / "cache" / "single").glob("*"):
        shutil.copy(file, tmp_path)
    for suffix in ("bin", "idx"):
        shutil.copy(MEGATRON / f"b_int32_epochs.{suffix}", tmp_path / f"multi.{suffix}")
    [described] = tmp_path.glob("*description.txt")
    with pytest.raises(FileError, match="do not fit"):
        open_megatron(described, 1)


def test_olmos_batches():
    want, batches = load(OLMO / "expected.json"), open_olmo(OLMO)
    assert batches.order.tolist() == want["global_indices"] == olmo_order(want["instances"], 6198).tolist()
    assert len(batches) == len(want["batches"]) == 4
    for step, batch in enumerate(want["batches"]):
        rows = batches.rows(step)
        for row, held in enumerate(batch):
            assert rows.instance[row] == held["index"] and rows.tokens[row].tolist() == held["input_ids"]
            kept = [t if m else IGNORE for t, m in zip(held["input_ids"], held["label_mask"], strict=True)]
            assert rows.labels[row].tolist() == [*kept[1:], IGNORE]
            assert [p.path.name for p in batches.passages(0, held["index"])] == [held["path"]]
        halves = [batches.rows(step, rank, 2) for rank in (0, 1)]
        assert [h.instance.tolist() for h in halves] == [rows.instance[0::2].tolist(), rows.instance[1::2].tolist()]


def test_olmos_order_is_made_of_the_seed_where_there_is_no_file(tmp_path):
    for file in OLMO.iterdir():
        if file.name != "global_indices.npy":
            shutil.copy(file, tmp_path)
    assert open_olmo(tmp_path).order.tolist() == open_olmo(OLMO).order.tolist()
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("- part-1-00000.npy", "- part-0-00000.npy"))
    with pytest.raises(FileError, match="label mask of 447 uint8 for 849"):
        open_olmo(tmp_path)


def test_olmos_filter_and_its_isolated_documents(tmp_path):
    """A row of 32 repetitions has no labels; with generate_doc_lengths positions restart after every end of text."""
    shutil.copytree(OLMO, tmp_path / "run")
    ids = np.fromfile(OLMO / "part-0-00000.npy", np.uint16)
    ids[64:128] = np.tile([7, 8], 32)
    ids.tofile(tmp_path / "run" / "part-0-00000.npy")
    path = tmp_path / "run" / "config.yaml"
    text = path.read_text().replace("generate_doc_lengths: false", "generate_doc_lengths: true")
    filter_ = "{repetition_max_period: 13, repetition_min_period: 1, repetition_max_count: 32}"
    path.write_text(text.replace("instance_filter: null", f"instance_filter: {filter_}"))
    batches, plain = open_olmo(tmp_path / "run"), open_olmo(OLMO)
    for step in range(4):
        rows, before = batches.rows(step), plain.rows(step)
        assert rows.positions is not None
        for row, instance in enumerate(rows.instance):
            want = np.full(64, IGNORE) if instance == 1 else before.labels[row]
            assert rows.labels[row].tolist() == want.tolist()
            at = 0
            for token, position in zip(rows.tokens[row], rows.positions[row], strict=True):
                assert position == at
                at = 0 if token == 499 else at + 1


def naive_repetitive(row: list[int], low: int, high: int, times: int) -> bool:
    for n in range(low, min(high, len(row) // 3) + 1):
        for start in range(len(row) - n * times + 1):
            if row[start : start + n * times] == row[start : start + n] * times:
                return True
    return False


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=9, max_size=26), st.integers(1, 3), st.integers(1, 4), st.integers(3, 5))
def test_repetition_against_a_loop(row, low, high, times):
    found = repetitive(np.array([row]), low, high, times)
    assert found.tolist() == [naive_repetitive(row, low, high, times)]


def core_files() -> dict[str, int]:
    return {path.name: path.stat().st_size // 2 for path in CORE.glob("*.npy")}


@pytest.mark.parametrize("number", range(6))
def test_olmo_cores_mixtures(number):
    want, size = load(CORE / "expected.json"), core_files()
    case = want["mixtures"][number]
    sources = [
        CoreSource(name, {f: size[f] for f in want["files"][name]}, *rules) for name, rules in case["sources"].items()
    ]
    if "error" in case:
        with pytest.raises(ConfigError) as caught:
            core_mixture(sources, case["requested"], case["batch"], want["seq_len"])
        assert f"OLMoConfigurationError: {caught.value.what}" == case["error"]
        return
    parts = core_mixture(sources, case["requested"], case["batch"], want["seq_len"])
    said = [(r["source"], p["path"], p["tokens"], p["max_tokens"]) for r in case["result"] for p in r["paths"]]
    assert [(p.source, p.path, p.tokens, p.most) for p in parts] == said


@pytest.mark.parametrize("number", range(6))
def test_olmo_cores_orders(number):
    want = load(CORE / "expected.json")
    case = want["orders"][number]
    instances = sum(tokens // want["seq_len"] for tokens in core_files().values())
    order = core_order(instances, case["seed"], case["epoch"], case["chunk_size"])
    assert order.tolist() == case["order"]
    size, world = case["instances_per_batch"], case["world_size"]
    for rank, batches in enumerate(case["first_batches_per_rank"]):
        for step, batch in enumerate(batches):
            assert order[step * size : (step + 1) * size][rank::world].tolist() == batch


def test_recorded_batches(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 90, (5, 2, 3, 7)).astype(np.uint8)
    mask, positions = (
        rng.integers(0, 2, ids.shape).astype(np.uint8),
        np.tile(np.arange(7, dtype=np.uint8), (5, 2, 3, 1)),
    )
    np.savez_compressed(tmp_path / "b.npz", input_ids=ids, label_mask=mask, position_ids=positions, index=ids[..., 0])
    batches = RecordedBatches(tmp_path / "b.npz")
    assert (len(batches), batches.micro, batches.rows_per_step, batches.sequence_length) == (5, (2, 3), 6, 7)
    rows = batches.rows(3)
    assert rows.tokens.tolist() == [*ids[3, 0].tolist(), *ids[3, 1].tolist()]
    want = np.where(mask[3] == 1, ids[3].astype(int), IGNORE)[..., 1:].reshape(6, 6)
    assert rows.labels[:, :-1].tolist() == want.tolist() and set(rows.labels[:, -1]) == {IGNORE}
    assert rows.positions is not None and rows.positions[5].tolist() == list(range(7))
    assert rows.instance.tolist() == ids[3, ..., 0].reshape(-1).tolist()
    parts = [batches.rows(3, rank, 4).tokens.tolist() for rank in range(4)]
    assert sorted(row for part in parts for row in part) == sorted(rows.tokens.tolist())

    labels = np.where(mask == 1, ids.astype(np.int16), IGNORE)
    np.savez(tmp_path / "l.npz", input_ids=ids, labels=labels)
    assert np.array_equal(RecordedBatches(tmp_path / "l.npz").rows(3).labels, rows.labels)
    np.savez(tmp_path / "w.npz", input_ids=ids, labels=ids + 1)
    with pytest.raises(FileError, match="labels are other ids"):
        RecordedBatches(tmp_path / "w.npz")
    np.savez(tmp_path / "n.npz", tokens=ids)
    with pytest.raises(FileError, match="has no input_ids"):
        RecordedBatches(tmp_path / "n.npz")
    (tmp_path / "x.npz").write_bytes(b"PK\3\4 not a zip")
    with pytest.raises(FileError, match=r"is no \.npz"):
        RecordedBatches(tmp_path / "x.npz")
    with pytest.raises(UsageError, match="no step 5"):
        batches.rows(5)


def test_a_blend_with_a_tie(tmp_path):
    """Which of two equal weights comes first hangs on the last bit: Megatron's builder normalizes twice."""
    want = load(MEGATRON / "tie.json")
    data = [str(MEGATRON / x) if isinstance(x, str) else x for x in want["data"]]
    run = {key: want[key] for key in ("samples", "sequence_length", "seed", "split")} | {"data": data}
    (tmp_path / "run.yaml").write_text(json.dumps({"megatron": {**run, "rows_per_step": 1}}))
    batches = open_megatron(tmp_path / "run.yaml")
    rows = [batches.rows(i) for i in range(len(batches))]
    assert [int(r.source[0]) for r in rows] == want["dataset"]
    assert [int(r.instance[0]) for r in rows] == want["sample"]
    weights = [0.5, 0.2, 0.2]
    once, twice = (blend(w, len(rows))[0].tolist() for w in (weights, megatron_order.normalized(weights)))
    assert twice == want["dataset"] != once
