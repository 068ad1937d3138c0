"""Megatron's torch_dist optimizers, as megatron-core 0.16.1 wrote them: one state in several forms, read as the same.

The goldens are two updates on gloo ranks (`tests/upstream/make_megatron_optimizer_goldens.py`): tp 2 and pp 2 in
buckets, gathered, and under the weights' keys; experts on two ranks with an optimizer of their own.
"""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import surgery
from surgery.containers.dcp import Dcp
from surgery.errors import FileError, LayoutError, SurgeryError
from surgery.formats.flat import aligned, fill
from surgery.formats.megatron.entries import optimizer_notes
from surgery.formats.megatron.optimizer_writer import Wanted
from surgery.formats.megatron.rank_buffers import KEY
from surgery.formats.registry import open_checkpoint
from tests.test_optimizer import GOLDEN, copied, equal, opened, values

ITERATION = "iter_0000002"
START = "optimizer.distributed.dp_group_idx_{}."
BUCKET = START + "gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_{}.{}"


@pytest.mark.parametrize(("buffers", "whole"), [
    ("megatron-buckets", "megatron-reshardable"), ("megatron-gathered", "megatron-reshardable"),
    ("megatron-buckets-experts", "megatron-reshardable-experts"),
])  # fmt: skip
def test_buffers_of_ranks_hold_the_state_that_lies_under_the_weights(buffers, whole):
    found, want = opened(GOLDEN / buffers), opened(GOLDEN / whole)
    assert equal(values(found), values(want))
    assert found.optimizer.step == want.optimizer.step == 2
    assert found.optimizer.groups == want.optimizer.groups
    assert {g.weight_decay for g in found.optimizer.groups.values()} == {0.0, 0.1}


def test_inspect_says_that_there_is_a_state():
    assert open_checkpoint(GOLDEN / "megatron-gathered").details["optimizer"] == "in the buffers of ranks"


def test_weight_decay_that_two_groups_cannot_say_is_told():
    found = opened(GOLDEN / "megatron-reshardable")

    def told(**decays: float) -> list[str]:
        groups = {n: replace(g, weight_decay=decays.get(n, g.weight_decay)) for n, g in found.optimizer.groups.items()}
        changed = replace(found, optimizer=replace(found.optimizer, groups=groups))
        return [note for note in optimizer_notes(changed, Wanted(), "torch_dist") if "did otherwise" in note]

    assert not told() and not told(**dict.fromkeys(found.optimizer.groups, 0.0))
    assert "norms and biases: embed, final_norm did" in told(embed=0.0, final_norm=0.1)[0]
    assert "norms and biases: embed did" in told(embed=0.05)[0]


def test_a_number_without_end_is_none_of_a_rank():
    assert KEY.fullmatch("chained_1.optimizer.distributed.dp_group_idx_3.optimizer/shard_0_1")
    assert not KEY.fullmatch(f"optimizer.distributed.dp_group_idx_{'9' * 5000}.optimizer/shard_0_1")
    assert not KEY.fullmatch(f"chained_{'9' * 5000}.optimizer.distributed.dp_group_idx_0.optimizer/shard_0_1")


def patched(folder: Path, name: str, start: int, numbers: torch.Tensor) -> None:
    """The elements of a stored tensor from `start` on, changed in the file."""
    for key, place in FileSystemReader(folder / ITERATION).read_metadata().storage_data.items():
        if key.fqn != name:
            continue
        path = folder / ITERATION / place.relative_path
        data = path.read_bytes()
        with path.open("rb") as file:
            file.seek(place.offset)
            piece = torch.load(io.BytesIO(file.read(place.length)))
        changed, at = piece.clone(), start - key.offset[0]
        for i, number in enumerate(numbers.tolist()):
            if 0 <= at + i < len(changed):
                changed[at + i] = number
        old, new = piece.numpy().tobytes(), changed.numpy().tobytes()
        archive = data[place.offset : place.offset + place.length]
        assert archive.count(old) == 1
        path.write_bytes(data[: place.offset] + archive.replace(old, new) + data[place.offset + place.length :])


def test_two_parameters_of_a_bucket_that_changed_places_are_found(tmp_path):
    """Two norms of one length: the last of the stage's bucket, and the one before the projections."""
    folder = copied("megatron-buckets", tmp_path / "m")
    name = BUCKET.format(3, 0, "param")  # the last stage has one bucket: reversed, the head, then the final norm
    buffer = Dcp(folder / ITERATION).tensors[name].full()
    at, _ = aligned([("head", (32, 16)), ("final", (16,)), ("fc2", (16, 12)), ("fc1", (24, 16)), ("norm", (16,))], 64)
    a, b = (buffer[at[n] : at[n] + 16].clone() for n in ("final", "norm"))
    assert not torch.equal(a, b)
    patched(folder, name, at["final"], b)
    patched(folder, name, at["norm"], a)
    with pytest.raises(LayoutError, match="does not round to its weight"):
        values(opened(folder))
    with pytest.raises(LayoutError, match="does not round to its weight"):
        surgery.convert(folder, tmp_path / "out", to="olmo-core", optimizer=True)
    assert not (tmp_path / "out").exists()
    assert surgery.convert(folder, tmp_path / "alone", to="olmo-core").verified


@pytest.mark.parametrize(("case", "sizes", "words"), [
    ("megatron-buckets", {"tensor_model_parallel_size": 1}, "do not fill"),
    ("megatron-buckets", {"pipeline_model_parallel_size": 1}, "do not fill"),
    ("megatron-buckets", {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}, "do not fill"),
    ("megatron-buckets", {"transformer_impl": "transformer_engine"}, "do not fill"),
    ("megatron-gathered", {"tensor_model_parallel_size": 1}, "do not fill"),
    ("megatron-gathered", {"tensor_model_parallel_size": 4}, "divide"),
    ("megatron-buckets-experts", {"expert_model_parallel_size": 1}, "do not fill"),
    ("megatron-buckets-experts", {"pipeline_model_parallel_size": 1 << 20}, "not a positive whole number"),
    ("megatron-buckets-experts", {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2}, "divide"),
])  # fmt: skip
def test_sizes_that_are_not_the_runs_are_refused(case, sizes, words, tmp_path):
    folder = copied(case, tmp_path / "m")
    path = folder / ITERATION / "common.pt"
    tree = torch.load(path, weights_only=False)
    vars(tree["args"]).update(sizes)
    torch.save(tree, path)
    with pytest.raises(SurgeryError, match=words):
        values(opened(folder))


def test_a_group_of_ranks_that_is_missing_or_too_many(tmp_path):
    folder = copied("megatron-buckets", tmp_path / "m")
    path = folder / ITERATION / ".metadata"
    data = path.read_bytes()
    path.write_bytes(data.replace(START.format(3).encode(), START.format(7).encode()))
    with pytest.raises(FileError, match="holds no optimizer of tensor rank 1, stage 1"):
        opened(folder)
    shutil.rmtree(folder)
    folder = copied("megatron-buckets", tmp_path / "m")
    path.write_bytes(data.replace(b"bucket_idx_1.exp_avg_sq", b"bucket_idx_1.master_abc"))
    with pytest.raises(LayoutError, match="a bucket of exp_avg, master_abc, param "):
        opened(folder)
    path.write_bytes(data.replace(b"bucket_idx_1.exp_avg_sq", b"bucket_idx_x.exp_avg_sq"))
    with pytest.raises(LayoutError, match="no bucket of Adam's state"):
        opened(folder)


def test_buckets_are_filled_exactly_or_not_at_all():
    assert fill([(3, 5), (7,), (4,)], [71, 4], 64) == [(0, 0), (0, 64), (1, 0)]
    assert fill([(3, 5), (7,)], [64, 7], 64) == [(0, 0), (1, 0)]  # a bucket that ends with the next one's gap
    assert fill([(3, 5), (7,)], [15, 7], 64) == [(0, 0), (1, 0)]
    for sizes in ([71, 5], [70, 4], [71], [71, 4, 0], [], [30, 4], [71, 4, 9]):
        assert fill([(3, 5), (7,), (4,)], sizes, 64) is None
