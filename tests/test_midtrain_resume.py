"""Checkpoints of runs: read by torch's own reader, damaged and passed over; what may change when a run goes on."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors import safe_open

from surgery.cli.main import main
from surgery.errors import ConfigError, FileError, OutputError
from surgery.midtraining import after_step, saving
from surgery.midtraining.averages import Averages
from surgery.midtraining.checkpoint import newest, open_saved, stitched
from surgery.midtraining.loop import prepare
from surgery.midtraining.parallel import World
from surgery.midtraining.run import midtrain
from surgery.midtraining.run_file import make_run
from surgery.midtraining.run_folder import claimed, read_folder
from surgery.midtraining.selftests import MOVED, TESTS
from surgery.midtraining.settings import Average
from surgery.writing.interrupt import Interrupted, Requeue
from tests import tiny
from tests.test_midtrain_loop import STEPS, record, settings

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A folder with a run that has ended, and kept its last four checkpoints: 12, 15, 18 and 20."""
    folder = tmp_path_factory.mktemp("resume")
    tiny.save("llama", folder / "model", l=2, h=48, f=40)
    record(folder / "batches.npz", masked=True, packed=False)
    midtrain(make_run(wanted(folder)))
    return folder


def wanted(folder: Path, **more: Any) -> dict[str, Any]:
    value = settings(folder / "model", folder / "batches.npz", folder / "out", dropout=0.1)
    return value | {"checkpoint": {"every": 3, "keep_last": 4}, "export": [], "skip_self_tests": [*TESTS, MOVED]} | more


@pytest.fixture
def place(ended, tmp_path) -> Path:
    """The same to spoil."""
    shutil.copytree(ended, tmp_path / "place")
    return tmp_path / "place"


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "out" / "checkpoints" / f"step{step:09d}"


def go_on(folder: Path, **more: Any) -> list[str]:
    said: list[str] = []
    midtrain(make_run(wanted(folder, **more)), say=said.append)
    return said


# ------------------------------------------------------------------------------------------------------------ contents


def test_torch_reads_what_a_checkpoint_holds(ended):
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    saved = open_saved(checkpoint(ended, 18))
    into = {name: torch.zeros(t.shape, dtype=t.torch_dtype) for name, t in saved.tensors.items()}
    load(into, storage_reader=HuggingFaceStorageReader(str(saved.folder)), no_dist=True)
    assert len(into) == 4 * 21 + 1
    for name, tensor in saved.tensors.items():
        assert torch.equal(into[name], tensor.full()), name
    assert float(into["optim.step.model.norm.weight"]) == 18
    assert saved.trainer.state["progress"]["step"] == 18 and saved.trainer.data["step"] == 18


def test_what_is_kept(ended):
    names = sorted(p.name for p in (ended / "out" / "checkpoints").iterdir())
    assert names == [f"step{step:09d}" for step in (12, 15, 18, 20)]


def test_averages_are_those_of_the_weights():
    torch.manual_seed(3)
    weights = [{"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()} for _ in range(11)]
    averages = Averages(Average(last=3, ema=0.8, every=2), weights[0], steps=10)
    half = None
    for step in range(1, 11):
        averages.add(step, weights[step])
        if step == 5:
            half = copy.deepcopy((averages.tensors(), averages.state_dict()))
    ema = weights[2]["a"].clone()
    for step in (4, 6, 8, 10):
        ema = 0.8 * ema + 0.2 * weights[step]["a"]
    torch.testing.assert_close(averages.weights("ema")["a"], ema)
    mean = sum(weights[step]["b"].float() for step in (6, 8, 10)) / 3
    torch.testing.assert_close(averages.weights("last")["b"], mean)

    again = Averages(Average(last=3, ema=0.8, every=2), weights[0], steps=10)
    for name, tensor in again.tensors().items():
        tensor.copy_(half[0][name])
    again.load_state_dict(half[1])
    for step in range(6, 11):
        again.add(step, weights[step])
    assert all(torch.equal(t, averages.tensors()[n]) for n, t in again.tensors().items())


# -------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoints_are_passed_over_and_the_run_ends_the_same(place):
    whole = checkpoint(place, 20).joinpath(SHARD).read_bytes()
    metrics = (place / "out" / "metrics.jsonl").read_bytes()
    flip(checkpoint(place, 20) / SHARD)
    path = checkpoint(place, 18) / SHARD
    os.truncate(path, path.stat().st_size - 9)
    said = "\n".join(go_on(place))
    assert "step000000020" in said and "another sha256" in said
    assert "step000000018" in said and "bytes, and the manifest says" in said
    assert "weights and moments are those of checkpoints/step000000015" in said
    assert checkpoint(place, 20).joinpath(SHARD).read_bytes() == whole
    assert (place / "out" / "metrics.jsonl").read_bytes() == metrics
    aside = sorted(p.name for p in (place / "out" / "checkpoints").glob("damaged*"))
    assert aside == ["damaged-step000000018", "damaged-step000000020"]


SPOILERS = {
    "flipped trainer": lambda folder: flip(folder / "trainer.json"),
    "flipped manifest": lambda folder: flip(folder / "MANIFEST.json"),
    "no trainer": lambda folder: (folder / "trainer.json").unlink(),
    "no shard": lambda folder: (folder / SHARD).unlink(),
    "no manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "link": lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).symlink_to("/etc/passwd")),
    "outside": lambda folder: rewrite(folder, "files", {"../../../run.json": {"bytes": 1, "sha256": ""}}),
    "empty list": lambda folder: rewrite(folder, "files", {}),
    "another step": lambda folder: rewrite(folder, "step", 17),
    "another format": lambda folder: rewrite(folder, "format", "surgery-checkpoint-9"),
    "unknown key": lambda folder: rewrite(folder, "pickle", "data.pkl"),
}


def rewrite(folder: Path, key: str, value: Any) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "MANIFEST.json").write_text(json.dumps(manifest | {key: value}))


@pytest.mark.parametrize("spoil", SPOILERS)
def test_whatever_is_wrong_is_found(spoil, place):
    SPOILERS[spoil](checkpoint(place, 20))
    with pytest.raises(FileError):
        open_saved(checkpoint(place, 20))
    found = newest(place / "out" / "checkpoints", World())
    assert found.saved.step == 18 and [p.name for p in found.bad] == ["step000000020"]


def test_boxes_that_overlap_or_leave_gaps_are_refused(ended, tmp_path):
    from surgery.tensors.in_memory import InMemory

    def written(name: str, start: int, rows: int) -> Path:
        saving.write_shard(tmp_path / name, {"x": (InMemory(torch.ones(rows, 3)), [start, 0])})
        return tmp_path / name

    a, b, c = written("a", 0, 2), written("b", 2, 5), written("c", 3, 4)
    assert stitched([b, a])["x"].shape == (7, 3)
    for wrong in ([a, c], [a, a], [b]):
        with pytest.raises(FileError, match=r"whole|another file"):
            stitched(wrong)


def test_without_a_good_checkpoint_nothing_is_lost(place):
    for path in (place / "out" / "checkpoints").iterdir():
        flip(path / SHARD)
    before = (place / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(OutputError, match="no checkpoint that is good"):
        go_on(place)
    assert (place / "out" / "metrics.jsonl").read_bytes() == before
    assert len(list((place / "out" / "checkpoints").glob("step*"))) == 4


def test_a_full_disk_leaves_the_last_checkpoint(place, monkeypatch):
    shutil.rmtree(checkpoint(place, 20))
    before = checkpoint(place, 18).joinpath(SHARD).read_bytes()

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.os, "write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        go_on(place)
    monkeypatch.undo()
    assert checkpoint(place, 18).joinpath(SHARD).read_bytes() == before
    assert not list((place / "out" / "checkpoints").glob(".*"))
    assert "step000000018" in "".join(go_on(place))
    assert read_folder(place / "out").status == "finished"


# ------------------------------------------------------------------------------------------------------ what may change


def test_a_run_that_has_ended_takes_no_step(place):
    before = checkpoint(place, 20).joinpath(SHARD).stat().st_ino
    go_on(place, log={"every": 2})
    assert checkpoint(place, 20).joinpath(SHARD).stat().st_ino == before
    assert [m["step"] for m in read_folder(place / "out").metrics] == list(range(1, STEPS + 1))


def test_other_settings_are_refused_by_name(place):
    changed = wanted(place)
    changed["train"]["schedule"]["start_lr"] = 1e-4
    changed["moe"] = {"balance": 0.3}
    with pytest.raises(ConfigError) as caught:
        midtrain(make_run(changed))
    assert "train.schedule.start_lr" in str(caught.value) and "moe.balance" in str(caught.value)


def test_another_model_or_other_data_are_refused(place):
    record(place / "batches.npz", masked=False, packed=False)
    with pytest.raises(ConfigError, match="data"):
        go_on(place)
    tiny.save("llama", place / "other", l=3, h=48, f=40)
    value = wanted(place)
    value["model"]["path"] = str(place / "other")
    with pytest.raises(ConfigError, match="model: "):
        midtrain(make_run(value))


def test_resume_never_and_must(place):
    with pytest.raises(OutputError, match="holds a run already"):
        go_on(place, resume="never")
    shutil.rmtree(place / "out" / "checkpoints")
    with pytest.raises(OutputError, match="no checkpoint"):
        go_on(place, resume="must")
    with pytest.raises(OutputError, match="finished"):
        go_on(place)
    (place / "out" / "end.json").unlink()
    with pytest.raises(ConfigError, match=r"average\.ema"):
        go_on(place, average={"ema": 0.5})
    assert "it begins anew" in "\n".join(go_on(place))
    assert [m["step"] for m in read_folder(place / "out").metrics] == list(range(1, STEPS + 1))


def test_two_runs_do_not_share_a_folder(place):
    with claimed(place / "out"), pytest.raises(OutputError, match="another run is at work"):
        go_on(place)


def test_choices_of_auto_are_kept(place):
    value = wanted(place)
    saved = open_saved(checkpoint(place, 18))
    assert saved.trainer.choices == {"precision": "fp32", "compile": "no"}
    job = prepare(make_run(value), saved=saved)
    assert (job.begun, job.choices, job.digest) == (18, dict(saved.trainer.choices), saved.trainer.lineage["model"])


# ------------------------------------------------------------------------------------------------------------- signals


def test_the_command_ends_with_75_and_goes_on(place, monkeypatch):
    shutil.rmtree(place / "out")
    (place / "run.yaml").write_text(yaml.safe_dump(wanted(place)))
    real = after_step.Saves.__call__

    def call(self, job, state):
        if state["progress"].step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        real(self, job, state)

    monkeypatch.setattr(after_step.Saves, "__call__", call)
    stopped = CliRunner().invoke(main, ["midtrain", str(place / "run.yaml")])
    assert stopped.exit_code == 75, stopped.output
    assert "stopped by SIGUSR1" in stopped.output
    assert [e["text"] for e in read_folder(place / "out").events] == ["stopped by SIGUSR1"]
    monkeypatch.undo()
    again = CliRunner().invoke(main, ["midtrain", str(place / "run.yaml")])
    assert again.exit_code == 0, again.output
    assert "checkpoints/step000000005" in again.output


def test_an_export_that_fails_at_the_end_loses_no_step(place, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OutputError("cannot be written: no space left on device")

    shutil.rmtree(checkpoint(place, 20))
    monkeypatch.setattr(after_step, "export", full)
    with pytest.raises(OutputError):
        go_on(place, export=[{"to": "hf"}])
    assert read_folder(place / "out").status == "failed" and checkpoint(place, 20).is_dir()
    monkeypatch.undo()
    assert any("checkpoints/step000000020" in line for line in go_on(place, export=[{"to": "hf"}]))
    assert (place / "out" / "export" / "step000000020-hf" / "model.safetensors").is_file()


def test_what_is_wanted_in_another_way_is_written_again(place):
    """Only that: an export that is there as it is wanted stays."""
    weights = place / "out" / "export" / "step000000020-hf" / "model.safetensors"
    seen = []
    for dtype, every in (("fp32", None), ("bf16", None), ("bf16", 7)):
        go_on(place, export=[{"to": "hf", "dtype": dtype, "every": every}])
        with safe_open(weights, "pt") as opened:
            seen.append((opened.get_tensor("model.norm.weight").dtype, weights.stat().st_ino))
    assert [dtype for dtype, _ in seen] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert seen[1] == seen[2]


def test_what_is_wanted_in_another_way_is_written_again_though_that_failed_before(place, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OutputError("cannot be written: no space left on device")

    go_on(place, export=[{"to": "hf", "dtype": "fp32"}])
    monkeypatch.setattr(after_step, "export", full)
    with pytest.raises(OutputError):
        go_on(place, export=[{"to": "hf", "dtype": "bf16"}])
    monkeypatch.undo()
    go_on(place, export=[{"to": "hf", "dtype": "bf16"}])
    with safe_open(place / "out" / "export" / "step000000020-hf" / "model.safetensors", "pt") as opened:
        assert opened.get_tensor("model.norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("export", "what"),
    [
        ([{"to": "ggfu"}, {"to": "megatron", "tp": 3}], "no format 'ggfu'.*\n.*among 3 ranks"),
        ([{"to": "megatron"}, {"to": "megatron", "tp": 2}], "megatron is named twice"),
        ([{"to": "meta", "options": {"shard": "1"}}], "no option shard"),
    ],
)
def test_exports_that_cannot_be_are_refused_before_the_first_step(place, export, what):
    with pytest.raises(ConfigError, match=what):
        go_on(place, export=export, output=str(place / "new"))
    assert not (place / "new").exists() or read_folder(place / "new").steps == []


def test_a_signal_in_the_last_export_is_made_up_for(place, monkeypatch):
    def cut(*args: Any, **kwargs: Any) -> None:
        raise Interrupted(signal.SIGTERM, place)

    shutil.rmtree(checkpoint(place, 20))
    monkeypatch.setattr(after_step, "export", cut)
    for _ in range(2):  # in the last step, and when the run is called again
        with pytest.raises(Requeue):
            go_on(place, export=[{"to": "hf"}])
        assert read_folder(place / "out").status == "stopped" and checkpoint(place, 20).is_dir()
    monkeypatch.undo()
    go_on(place, export=[{"to": "hf"}])
    assert read_folder(place / "out").status == "finished"
    assert (place / "out" / "export" / "step000000020-hf" / "model.safetensors").is_file()
