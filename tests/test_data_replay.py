"""The data of OLMo and OLMo-core, number for number, and recorded batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.data.rows import IGNORE
from surgery.data.trainers.olmo_batches import open_olmo
from surgery.data.trainers.olmo_order import CoreSource, core_mixture, core_order, olmo_order, repetitive
from surgery.data.trainers.recorded import RecordedBatches
from surgery.errors import ConfigError, FileError, UsageError

GOLDEN = Path(__file__).parent / "golden" / "data"
OLMO, CORE = GOLDEN / "olmo", GOLDEN / "olmo_core"


def load(path: Path) -> Any:
    return json.loads(path.read_text())


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


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        (None, "data", [], "no section data"),
        (None, "global_train_batch_size", 0, "a whole number from 1 on"),
        ("model", "max_sequence_length", 0, "a whole number from 1 on"),
        ("data", "paths", ["a", 5], "lists no files"),
        ("data", "label_mask_paths", [7, "b"], "does not name a file for each"),
        ("data", "instance_filter", "yes", "no section instance_filter"),
        ("data", "instance_filter", {"repetition_min_period": 1}, "repetition_max_period is None"),
        ("data", "memmap_dtype", ["uint16"], "memmap_dtype is"),
        ("data", "datasets", ["x"], "only data.paths is known"),
    ],
)
def test_configs_of_olmo_that_cannot_be(section, key, value, says, tmp_path):
    shutil.copytree(OLMO, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    (config[section] if section else config)[key] = value
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=says):
        open_olmo(tmp_path / "run")


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


@pytest.mark.slow
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


def test_what_olmo_core_refuses():
    web, math = CoreSource("web", {"a": 640}, 0.6), CoreSource("math", {"b": 320}, 0.4)
    assert sum(part.tokens for part in core_mixture([web, math], 500, 64, 16)) == 512
    for sources, batch, message in (
        ([web], 64, "target_ratios must sum to 1.0, got 0.6"),
        ([web, math], 60, "global_batch_size must be multiple of sequence_length"),
        ([web, CoreSource("math", {"b": 0}, 0.4)], 64, "source: math @ target global ratio: 0.4 :: 0 < 200"),
        (
            [web, CoreSource("math", {"b": 320}, 0.4, 2.0, 0.25)],
            64,
            "source: math @ target global ratio: 0.4 :: 160 < 200",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            core_mixture(sources, 500, batch, 16)


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
