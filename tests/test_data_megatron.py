"""Megatron-core's order of samples, its blends and its cache, number for number."""

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

from surgery.data.files.idx import IndexedWriter, read_index
from surgery.data.files.npy import open_npz
from surgery.data.rows import IGNORE
from surgery.data.trainers import megatron_order
from surgery.data.trainers.megatron_batches import Dataset, MegatronBatches, distinct_names
from surgery.data.trainers.megatron_order import blend, exhaustive_blend, sample_order, split_documents
from surgery.data.trainers.megatron_run import open_megatron
from surgery.errors import ConfigError, FileError, UsageError

MEGATRON = Path(__file__).parent / "golden" / "data" / "megatron"


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


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=25), st.integers(2, 11), st.booleans(), st.booleans())
def test_sample_indices_against_a_loop(lengths, length, extra, drop_last):
    if sum(lengths) <= length or (not drop_last and not lengths[-1]):
        return
    found = megatron_order._samples(np.array(lengths), length, sum(lengths), int(extra), drop_last)
    assert found.tolist() == naive_samples(lengths, length, len(found) - 1, int(extra))


def naive_order(lengths: list[int], samples: int, length: int, seed: int, extra: int) -> tuple[list[int], ...]:
    """Epochs until there are enough tokens; the last one is apart if less than 80% of its samples are wanted."""
    epochs, per_epoch = 1, sum(lengths)
    while epochs * per_epoch < samples * length + extra:
        epochs += 1
    before = ((epochs - 1) * per_epoch - extra) // length
    apart = epochs > 1 and samples - before < int(0.8 * ((per_epoch - extra) // length))
    random, order = np.random.RandomState(seed), []
    for count in [epochs - 1, 1] if apart else [epochs]:
        part = np.array(list(range(len(lengths))) * count, np.int32)
        random.shuffle(part)
        order += part.tolist()
    total = (epochs * per_epoch - extra) // length
    first, last = np.arange(before if apart else total), np.arange(before if apart else total, total)
    random.shuffle(first)
    random.shuffle(last)
    return order, naive_samples([lengths[i] for i in order], length, total, extra), [*first, *last]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 60), st.integers(2, 30), st.booleans())
def test_orders_of_any_number_of_epochs_against_a_loop(lengths, samples, length, extra):
    """Also where all documents together are shorter than a sample, as in small splits for validation."""
    if sum(lengths) < 2:
        return
    found = sample_order(np.array(lengths), range(len(lengths)), samples, length, 7, extra=extra)
    want = naive_order(lengths, samples, length, 7, int(extra))
    assert (found.documents.tolist(), found.samples.tolist(), found.shuffle.tolist()) == want


@pytest.mark.parametrize("extra", [True, False])
def test_megatrons_other_settings_against_a_loop(extra, tmp_path):
    """No extra token, a padded last sample, masked and isolating end-of-text ids: sample by sample."""
    rng = np.random.default_rng(3)
    texts = [[*rng.integers(1, 9, n).tolist(), 0] for n in (5, 3, 11, 2, 8)]
    with IndexedWriter(tmp_path / "d", "uint16") as writer:
        for text in texts:
            writer.add(text)
    run = {
        "data": "d", "sequence_length": 7, "rows_per_step": 1, "split": "0,1,0", "part": "valid", "pad_id": 8,
        "eod_id": 0, "eod_mask_loss": True, "isolate": True, "drop_last_partial_validation_sequence": False,
        "add_extra_token_to_sequence": extra,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps({"megatron": run}))
    batches = open_megatron(tmp_path / "run.yaml")
    order = np.arange(5, dtype=np.int32)
    random = np.random.RandomState(1234)
    random.shuffle(order)
    stream = [t for i in order for t in texts[i]]
    starts = np.arange(0, len(stream) - extra, 7)
    random.shuffle(starts)
    assert len(batches) == len(starts) and len(stream) % 7 != extra  # the last sample is padded
    for step, start in enumerate(starts):
        rows, ids = batches.rows(step), stream[start : start + 7 + extra]
        ids += [8] * (7 + extra - len(ids))
        following = ids[1:] if extra else [*ids[1:], 8]
        assert rows.tokens[0].tolist() == [t * (t != 8) for t in ids[:7]]
        masked = [IGNORE if a == 0 or b == 8 else b for a, b in zip(ids, following, strict=False)]
        assert rows.labels[0].tolist() == masked
        assert rows.positions is not None
        at = 0
        for token, position in zip(ids[:7], rows.positions[0], strict=True):
            assert position == at
            at = 0 if token == 0 else at + 1


def test_settings_of_megatron_that_cannot_be(tmp_path):
    good = {"data": str(MEGATRON / "multi"), "sequence_length": 24, "rows_per_step": 1, "split": "1,0,0"}
    for change, message in (
        ({"isolate": True}, "need eod_id"),
        ({"split": "1,0,0", "part": "test"}, r"multi\.idx: 0 documents of 0 tokens"),
        ({"samples": 10**30}, "more than any memory holds"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"data": [0, "a", 1, "b"]}, "neither prefixes nor weights"),
    ):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"megatron": {**good, **change}}))
        with pytest.raises(ConfigError, match=message):
            open_megatron(tmp_path / "run.yaml")


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


@pytest.mark.slow
def test_a_damaged_cache_never_gives_other_tokens(tmp_path):
    """Any one number of its indices changed: an error when it is opened, or the same samples in another order."""
    shutil.copytree(MEGATRON / "cache" / "blend", tmp_path / "run")
    for file in [*MEGATRON.glob("*.bin"), *MEGATRON.glob("*.idx")]:
        shutil.copy(file, tmp_path / "run")
    [described] = (tmp_path / "run").glob("*BlendedDataset-train-description.txt")
    rng, refused = np.random.default_rng(0), 0
    indices = sorted((tmp_path / "run").glob("*.npy"))
    for case in range(56):
        path = indices[case % len(indices)]
        before = path.read_bytes()
        array = np.load(path)
        at = tuple(rng.integers(0, array.shape))
        array[at] = rng.choice([-1 if array.dtype.kind == "i" else 2**31, array[at] + 1, 0, 10**4, array.flat[-1]])
        np.save(path, array)
        try:
            batches = open_megatron(described, 1)
            for step in range(len(batches)):
                source, number = (int(x[0]) for x in (batches.rows(step).source, batches.rows(step).instance))
                assert sum(p.stop - p.start for p in batches.passages(source, number)) == 25
        except (FileError, ConfigError):
            refused += 1
        path.write_bytes(before)
    assert refused > 28


def test_datasets_are_named_so_that_they_can_be_told_apart():
    for paths, names in (
        (["tok/web.idx", "tok/math.idx"], ("web", "math")),
        (["tok/web/tokens.idx", "tok/math/tokens.idx"], ("web/tokens", "math/tokens")),
        (["a/web/tokens.idx", "b/web/tokens.idx", "b/math.idx"], ("a/web/tokens", "b/web/tokens", "b/math")),
        (["web/tokens.idx", "web/tokens.idx"], ("tokens", "tokens")),
    ):
        assert distinct_names([Path(path) for path in paths]) == names


def test_a_blend_that_takes_more_than_there_is_is_an_error():
    index = read_index(MEGATRON / "multi")
    dataset = Dataset(index, sample_order(index.lengths, range(9), None, 4, 1), 4)
    few = len(dataset)
    assert len(MegatronBatches([dataset], blend([1], few), 1)) == few
    with pytest.raises(ConfigError, match=f"sample {few} of the blend is number {few} of dataset 0"):
        MegatronBatches([dataset], blend([1], few + 1), 1)


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
