"""Megatron's distributed optimizers, as megatron-core 0.16.1 wrote them: read, and written to the same bytes.

The goldens are two updates on gloo ranks (`tests/upstream/make_megatron_optimizer_goldens.py`): tp 2 and pp 2 in
buckets, gathered, and under the weights' keys; stages of one layer and of two; experts on two ranks with an optimizer
of their own; distrib_optim.pt of a tied model on two stages, and of experts.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import surgery
from surgery.containers.dcp import Dcp
from surgery.errors import FileError, LayoutError, NoStateError, SurgeryError, UsageError
from surgery.formats.flat import aligned, fill
from surgery.formats.megatron.entries import optimizer_notes
from surgery.formats.megatron.files import open_rank
from surgery.formats.megatron.optimizer_writer import Wanted
from surgery.formats.megatron.rank_buffers import KEY
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import Topology
from tests.oracle import same_bits
from tests.test_optimizer import GOLDEN, copied, equal, opened, values

ITERATION = "iter_0000002"
START = "optimizer.distributed.dp_group_idx_{}."
BUCKET = START + "gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_{}.{}"


@pytest.mark.parametrize(("buffers", "whole"), [
    ("megatron-buckets", "megatron-reshardable"), ("megatron-gathered", "megatron-reshardable"),
    ("megatron-buckets-experts", "megatron-reshardable-experts"), ("megatron-buckets-virtual", "megatron-flat-virtual"),
])  # fmt: skip
def test_buffers_of_ranks_hold_the_state_that_lies_under_the_weights(buffers, whole):
    found, want = opened(GOLDEN / buffers), opened(GOLDEN / whole)
    assert equal(values(found), values(want))
    assert found.optimizer.step == want.optimizer.step == 2
    assert found.optimizer.groups == want.optimizer.groups
    assert {g.weight_decay for g in found.optimizer.groups.values()} == {0.0, 0.1}


def test_stages_of_unequal_length_are_told_by_their_buffers():
    """One layer on the first stage, two on the last; the masters prove every place."""
    found = opened(GOLDEN / "megatron-buckets-uneven")
    assert found.spec.layers == 3 and len(values(found)) == 3 * len(found.parts)
    assert {t.count_nonzero() for t in values(found).values()} != {0}


# ------------------------------------------------------------------------------------------------ distrib_optim.pt

FLAT_CASES = {
    "megatron-flat": (Topology(), "128"),
    "megatron-flat-tied": (Topology(tp=2, pp=2), "31"),
    "megatron-flat-experts": (Topology(ep=2), "64"),
    "megatron-flat-mixed": (Topology(pp=2, ep=2), "64"),
    "megatron-flat-virtual": (Topology(pp=2, vpp=2), "64"),
}
IDENTIFIERS = (
    "wd_mult",
    "lr_mult",
    "is_expert_parallel",
    "is_decoupled_lr",
    "betas",
    "eps",
    "weight_decay",
    "lr",
    "step",
)


def same(a: object, b: object) -> bool:
    """Equal keys in equal order, equal bytes."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("case", FLAT_CASES)
def test_the_distributed_optimizer_is_written_as_megatron_writes_it(case, tmp_path):
    """Every rank's file: the tied head's bucket, and of two ranks with the same dense parameters only the first."""
    topology, multiple = FLAT_CASES[case]
    options = {"spec": "local", "optimizer": "distributed", "vocab_multiple": multiple}
    done = surgery.convert(GOLDEN / case, tmp_path / "m", to="megatron", optimizer=True, topology=topology,
                           options=options)  # fmt: skip
    assert done.verified and any("any number of data-parallel ranks" in note for note in done.notes)
    theirs = sorted((GOLDEN / case).rglob("distrib_optim.pt"))
    assert len(theirs) == topology.tp * topology.pp * topology.ep == len(list(tmp_path.rglob("distrib_optim.pt")))
    for path in theirs:
        ours = tmp_path / "m" / path.relative_to(GOLDEN / case)
        assert same(torch.load(path, weights_only=True), torch.load(ours, weights_only=True))
        want, got = (open_rank(p.with_name("model_optim_rng.pt")).root["optimizer"] for p in (path, ours))
        want, got = (entry if isinstance(entry, list) else [entry] for entry in (want, got))
        for one, other in zip(want, got, strict=True):
            said = [{key: group[key] for key in IDENTIFIERS} for group in other["optimizer"]["param_groups"]]
            assert other.keys() == {"optimizer"} and not any("params" in g for g in other["optimizer"]["param_groups"])
            assert said == [{key: group[key] for key in IDENTIFIERS} for group in one["optimizer"]["param_groups"]]
    assert equal(values(opened(tmp_path / "m")), values(opened(GOLDEN / case)))


def test_a_stage_without_experts_has_an_optimizer_of_none(tmp_path):
    """Megatron's own entries, of the plain optimizer: numbers, states and masters of every rank."""
    case = "megatron-plain-mixed"
    surgery.convert(GOLDEN / case, tmp_path / "core", to="olmo-core", optimizer=True)
    options = {"spec": "local", "adam": "fused", "vocab_multiple": "64", "iteration": "2"}
    surgery.convert(tmp_path / "core", tmp_path / "m", to="megatron", optimizer=True, topology=Topology(pp=2, ep=2),
                    options=options, dtype="bf16")  # fmt: skip
    theirs = sorted((GOLDEN / case).rglob("model_optim_rng.pt"))
    assert len(theirs) == 4
    for path in theirs:
        want, got = (
            torch.load(p, weights_only=False)["optimizer"]
            for p in (path, tmp_path / "m" / path.relative_to(GOLDEN / case))
        )
        for one, other in zip(want, got, strict=True):
            assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
            assert same(_plain(one["optimizer"]["state"]), _plain(other["optimizer"]["state"]))
            assert same(_plain(one["fp32_from_fp16_params"]), _plain(other["fp32_from_fp16_params"]))
            for group, ours in zip(one["optimizer"]["param_groups"], other["optimizer"]["param_groups"], strict=True):
                assert all(group[key] == ours[key] for key in (*IDENTIFIERS, "params"))
    assert equal(values(opened(tmp_path / "m")), values(opened(GOLDEN / case)))


def _plain(tree: Any) -> Any:
    """Without what parameters are besides tensors, the keys in order."""
    if isinstance(tree, dict):
        return {key: _plain(tree[key]) for key in sorted(tree)}
    return [_plain(t) for t in tree] if isinstance(tree, list) else tree.detach()


def test_virtual_stages_and_experts_that_share_no_tensors(tmp_path):
    """Buffers of each chunk, and two ranks of a grid of four: read back as they were.  Experts have an optimizer of
    their own only where they are divided among ranks, whatever etp says: so they do in Megatron's layers."""
    cases = {"chunks": ("hf-llama", Topology(vpp=2), "auto"), "divided": ("hf-qwen3_moe", Topology(2, 1, 2), "1"),
             "repeated": ("hf-qwen3_moe", Topology(2), "1")}  # fmt: skip
    held = {}
    for name, (case, topology, etp) in cases.items():
        options = {"optimizer": "distributed", "etp": etp, "vocab_multiple": "1"}
        surgery.convert(GOLDEN / case, tmp_path / name, to="megatron", optimizer=True, topology=topology,
                        options=options, max_memory="16MB")  # fmt: skip
        assert equal(values(opened(tmp_path / name)), values(opened(GOLDEN / case)))
        held[name] = torch.load(next((tmp_path / name).rglob("distrib_optim.pt")), weights_only=True)
    assert [key for key in held["chunks"] if type(key) is int] == [0, 1]
    assert isinstance(held["divided"], list) and isinstance(held["repeated"], dict)


def test_options_of_legacy_files_alone(tmp_path):
    refused = (
        ("megatron", {"optimizer": "distributed", "adam": "torch"}, "adam=torch goes with -O optimizer=plain"),
        ("megatron-dist", {"adam": "torch"}, "adam"),
        ("megatron-dist", {"optimizer": "distributed"}, "optimizer"),
    )
    for to, options, words in refused:
        with pytest.raises(UsageError, match=words):
            surgery.convert(GOLDEN / "megatron-flat", tmp_path / "m", to=to, optimizer=True, options=options)


def spoilt(case: str, folder: Path, change: Callable[[Any], Any]) -> Path:
    """A golden, with its first distrib_optim.pt changed."""
    path = sorted(copied(case, folder).rglob("distrib_optim.pt"))[0]
    torch.save(change(torch.load(path, weights_only=True)), path)
    return folder


def test_groups_of_which_the_saving_rank_had_no_share_count_no_updates(tmp_path):
    """FusedAdam passes over a group without parameters, as that of the norms is for the first of many ranks."""
    folder = copied("megatron-flat-tied", tmp_path / "m")
    for uncounted in (1, 0):
        for path in folder.rglob("model_optim_rng.pt"):
            tree = torch.load(path, weights_only=False)
            del tree["optimizer"]["optimizer"]["param_groups"][uncounted]["step"]
            torch.save(tree, path)
        if uncounted:
            found = opened(folder)
            assert found.optimizer.step == 2
            assert found.optimizer.groups == opened(GOLDEN / "megatron-flat-tied").optimizer.groups
    with pytest.raises(FileError, match="does not say how often"):
        opened(folder)


def test_a_damaged_state_is_told_from_one_that_is_not_read(tmp_path):
    """A run stops at the first, and begins anew at the second: alike in both forms."""

    def shorter(tree: Any) -> Any:
        fields = next(iter(tree[0].values()))
        return tree | {0: {key: {n: t[:-64] for n, t in fields.items() if n != "numel_unpadded"} for key in tree[0]}}

    def other(tree: Any) -> Any:
        fields = next(iter(tree[0].values()))
        return tree | {0: {key: {"param": fields["param"], "momentum": fields["exp_avg"]} for key in tree[0]}}

    def more(tree: Any) -> Any:
        return tree | {0: {key: {**fields, "slow": fields["exp_avg"]} for key, fields in tree[0].items()}}

    kinds = {}
    for what, change in (("shorter", shorter), ("other", other), ("more", more)):
        with pytest.raises(LayoutError) as caught:
            opened(spoilt("megatron-flat", tmp_path / what, change))
        kinds[what] = type(caught.value)
    assert kinds == {"shorter": LayoutError, "other": NoStateError, "more": NoStateError}
    for which, words in (([None, None], "holds nothing of optimizer 0"), ([], "holds nothing of optimizer 0")):
        with pytest.raises(FileError, match=words):
            opened(spoilt("megatron-flat-experts", tmp_path / f"{len(which)}", lambda tree, which=which: which))
    for number, nothing in enumerate(({}, 7)):
        with pytest.raises(LayoutError, match="holds no buffers") as caught:
            opened(spoilt("megatron-flat", tmp_path / f"nothing-{number}", lambda tree, nothing=nothing: nothing))
        assert type(caught.value) is LayoutError
    folder = copied("megatron-buckets", tmp_path / "buckets")
    path = folder / ITERATION / "common.pt"
    tree = torch.load(path, weights_only=False)
    vars(tree["args"]).update(tensor_model_parallel_size=1)
    torch.save(tree, path)
    with pytest.raises(LayoutError, match="do not fill") as caught:
        opened(folder)
    assert type(caught.value) is LayoutError


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
    ("megatron-buckets", {f"{axis}pipeline_model_parallel_size": 65535 for axis in ("", "virtual_")}, "of 4 ranks"),
    ("megatron-buckets-experts", {"expert_model_parallel_size": 65534}, "for 2 experts"),
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
    with pytest.raises(LayoutError, match="a bucket of exp_avg, master_abc, param: "):
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
