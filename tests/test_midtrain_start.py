"""What a run inherits: learning rates that other trainers' files record, and Adam's moments."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import ConfigError, FileError, LayoutError
from surgery.formats.registry import open_checkpoint
from surgery.midtraining.loop import prepare
from surgery.midtraining.optimizer import DECAYS, adamw, grouped
from surgery.midtraining.parallel import World
from surgery.midtraining.recorded_rate import peak_rate, recorded_rate
from surgery.midtraining.run import midtrain
from surgery.midtraining.run_file import make_run
from surgery.midtraining.run_folder import read_folder
from surgery.midtraining.selftests import MOVED, TESTS
from surgery.midtraining.settings import Init
from surgery.midtraining.settings_train import Schedule as Wanted
from surgery.midtraining.start import FILE, find_start, put_moments
from tests import tiny
from tests.servers import web
from tests.test_midtrain_loop import record, settings

OLMO2 = {  # OLMo2-7B-stage1.yaml, of allenai/OLMo
    "model": {"max_sequence_length": 4096},
    "optimizer": {"learning_rate": 3.0e-4},
    "scheduler": {"name": "cosine_with_warmup", "units": "tokens", "t_warmup": 8388608000, "t_max": 5e12,
                  "alpha_f": 0.1, "warmup_min_lr": 0.0},
    "global_train_batch_size": 1024,
    "max_duration": "1ep",
}  # fmt: skip


@pytest.fixture
def source(tiny_hf, tmp_path):
    """A checkpoint as another trainer would have left it."""
    shutil.copytree(tiny_hf("llama"), tmp_path / "m")
    opened = open_checkpoint(tmp_path / "m")
    return lambda format="hf", **said: replace(opened, format=format, **said)


def test_the_rate_at_which_olmo_2_began_to_anneal(source):
    """Its stage 2 says 0.000061499 by hand; by stage 1's file it is 0.24 % less."""
    rate, note = recorded_rate(source("olmo", config=OLMO2, details={"step": 928646}))
    assert rate == pytest.approx(6.1499e-5, rel=2.5e-3)
    assert "step 928,646" in note
    linear = {
        **OLMO2,
        "scheduler": {"name": "linear_with_warmup", "t_warmup": 100, "alpha_f": 0.2},
        "max_duration": 1100,
    }
    assert recorded_rate(source("olmo", config=linear, details={"step": 600}))[0] == pytest.approx(3e-4 * 0.6)
    constant = {**OLMO2, "scheduler": {"name": "constant"}}
    assert recorded_rate(source("olmo", config=constant, details={"step": 600})) is None
    assert recorded_rate(source("olmo", config=OLMO2)) is None


def test_the_rate_of_a_run_of_surgery(tiny_hf, tmp_path):
    """By the step that the export is of, whatever its format says of an older run."""
    run, export = tmp_path / "run", tmp_path / "run" / "export" / "step000000002-hf"
    shutil.copytree(tiny_hf("llama"), export)
    older = {"log_history": [{"learning_rate": 0.5}]}
    (export / "trainer_state.json").write_text(json.dumps(older))
    lines = [{"step": step, "lr": rate} for step, rate in ((1, 3e-4), (2, 2e-4), (3, 1e-4))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recorded_rate(open_checkpoint(export)) == (2e-4, "step 2 of the run run")
    shutil.move(export, run / "export" / "step000000004-hf")
    assert recorded_rate(open_checkpoint(run / "export" / "step000000004-hf")) is None
    shutil.move(run / "export", tmp_path / "elsewhere")
    assert recorded_rate(open_checkpoint(tmp_path / "elsewhere" / "step000000004-hf"))[0] == 0.5


def test_the_rate_at_which_megatron_goes_on(source):
    args = {"lr": 3e-4, "min_lr": 3e-5, "lr_decay_style": "cosine", "lr_decay_iters": 2000, "lr_warmup_iters": 200}
    rate, _ = recorded_rate(source("megatron", config=args, details={"iteration": 1100}))
    assert rate == pytest.approx((3e-4 + 3e-5) / 2)
    assert recorded_rate(source("megatron", config=args, details={"iteration": 2500}))[0] == 3e-5
    assert (
        recorded_rate(source("megatron-dist", config={**args, "lr_decay_style": "WSD"}, details={"iteration": 9}))
        is None
    )
    assert recorded_rate(source("meta")) is None


def test_the_last_rate_that_transformers_logged(source):
    opened = source()
    assert recorded_rate(opened) is None
    log = [{"step": 1, "learning_rate": 1e-4}, {"step": 2, "learning_rate": 7e-5}, {"train_runtime": 3.0}]
    (opened.path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert peak_rate(Wanted(), opened) == (7e-5, "learning rate 7e-05, by the last line of trainer_state.json")
    (opened.path / "trainer_state.json").write_text(json.dumps({"log_history": [{"learning_rate": 0.0}]}))
    with pytest.raises(ConfigError, match="is 0 at the end of its run") as error:
        peak_rate(Wanted(), opened)
    assert "start_lr: 3e-5" in str(error.value)
    (opened.path / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match="is not recorded beside it"):
        peak_rate(Wanted(), opened)


# ----------------------------------------------------------------------------------------------------------- moments


def moments(folder: Path, more: dict | None = None) -> Path:
    """Of every tensor of a folder: ones that can be told apart by their names and places."""
    out = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        out[f"exp_avg.{name}"] = tensor * 0.5
        out[f"exp_avg_sq.{name}"] = tensor.square() + 0.25
    save_file(out | (more or {}), folder / FILE)
    return folder / FILE


@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "olmoe", "granitemoe"])
def test_moments_follow_their_weights_into_the_module(family, tiny_hf, tmp_path):
    """Experts lie one by one in the files and stacked in the module; their moments with them."""
    shutil.copytree(tiny_hf(family), tmp_path / "m")
    moments(tmp_path / "m", {"step": torch.tensor(17.0)})
    batches = record(tmp_path / "b.npz", masked=False, packed=False)
    job = prepare(make_run({**settings(tmp_path / "m", batches, tmp_path), "init": {"optimizer": "auto"}}))
    assert job.start.note == f"Adam's moments are those of {FILE}, after 17 steps"
    for parameter in job.parameters:
        state = job.optimizer.state[parameter]
        assert float(state["step"]) == 17
        assert torch.equal(state["exp_avg"], parameter * 0.5)
        assert torch.equal(state["exp_avg_sq"], parameter.square() + 0.25)
    job.optimizer.zero_grad()
    job.optimizer.step()  # a state that AdamW takes


def test_moments_beside_the_checkpoint_are_taken_unless_told_otherwise(source):
    opened = source()
    assert find_start(Init(), opened).moments is None
    moments(opened.path)
    assert find_start(Init(optimizer="fresh"), opened).note == "Adam's moments start at zero"
    with pytest.raises(ConfigError, match="does not say how many steps") as error:
        find_start(Init(), opened)
    assert "init.optimizer_step" in str(error.value)
    assert find_start(Init(optimizer_step=3), opened).moments.step == 3


def test_moments_of_another_model_are_refused(source, tiny_hf, tmp_path):
    opened = source()
    shutil.copytree(tiny_hf("olmo2"), tmp_path / "other")
    path = str(moments(tmp_path / "other", {"step": torch.tensor(1)}))
    with pytest.raises(LayoutError, match=r"have no place|is missing"):
        find_start(Init(optimizer=path), opened)
    save_file({"exp_avg.x": torch.zeros(2), "momentum.x": torch.zeros(2)}, path)
    with pytest.raises(FileError, match=r"holds momentum\.x, which are no moments"):
        find_start(Init(optimizer=path), opened)
    with pytest.raises(FileError, match="No such file"):
        find_start(Init(optimizer=str(tmp_path / "none.safetensors")), opened)


def test_moments_are_read_from_an_address(source, tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    opened = source()
    here = moments(opened.path, {"step": torch.tensor(5)})
    local = find_start(Init(), opened).moments
    shutil.copy(here, tmp_path / FILE)
    with web(tmp_path) as url:
        found = find_start(Init(optimizer=f"{url}/{FILE}"), opened).moments
        assert (found.step, found.parts.keys()) == (5, local.parts.keys())
        for kind, parts in found.parts.items():
            assert all(torch.equal(parts[n].full(), moment.full()) for n, moment in local.parts[kind].items())


def test_frozen_parameters_need_no_moments(tiny_hf, tmp_path):
    shutil.copytree(tiny_hf("llama"), tmp_path / "m")
    opened = open_checkpoint(tmp_path / "m")
    found = find_start(Init(optimizer=str(moments(tmp_path / "m")), optimizer_step=2), opened).moments
    model = tiny.model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = adamw(grouped(model, DECAYS["llama"], 0.1), (0.9, 0.95), 1e-8)
    put_moments(found, optimizer, model, opened, World())
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "export"), [("llama", {"to": "megatron", "tp": 2}), ("olmoe", {"to": "hf"})])
def test_a_second_run_from_what_the_first_exported_goes_on_as_one_run_would(family, export, tmp_path):
    """Rate and moments are inherited, whatever the format: the numbers are those of one run over all batches."""
    tiny.save(family, tmp_path / "model", l=2, h=48, f=40, m=16, v=512)  # which Megatron pads no more
    whole = record(tmp_path / "whole.npz", masked=True, packed=True)
    for name, part in (("a", slice(0, 8)), ("b", slice(8, 20))):
        with np.load(whole) as arrays:
            np.savez(tmp_path / f"{name}.npz", **{key: values[part] for key, values in arrays.items()})

    def go(name: str, model: Path, batches: str, **more: object) -> list[dict[str, float]]:
        value = settings(model, tmp_path / f"{batches}.npz", tmp_path / name, skip_step=None)
        value["train"]["schedule"] = {"name": "constant", "start_lr": more.pop("rate", "inherit")}
        midtrain(make_run({**value, "export": [], "skip_self_tests": [*TESTS, MOVED], **more}))
        return [{k: m[k] for k in ("loss", "ce", "grad_norm", "lr")} for m in read_folder(tmp_path / name).metrics]

    once = go("once", tmp_path / "model", "whole", rate=1e-3)
    go("first", tmp_path / "model", "a", rate=1e-3, export={**export, "dtype": "fp32"})
    exported = tmp_path / "first" / "export" / f"step000000008-{export['to']}"
    second = go("second", exported, "b")
    assert second == once[8:]
    anew = go("anew", exported, "b", init={"optimizer": "fresh"})
    assert anew[0] == second[0] and anew[1:] != second[1:]
    saved = str(tmp_path / "first" / "checkpoints" / "step000000008")
    opened = open_checkpoint(exported)
    assert find_start(Init(optimizer=saved), opened).note == "Adam's moments are those of step000000008, after 8 steps"
    larger = replace(opened, spec=replace(opened.spec, vocab=640))
    note = find_start(Init(), larger).note
    assert "start at zero, as those of step000000008 are not read: " in note and "do not fit" in note
    with pytest.raises(LayoutError):
        find_start(Init(optimizer=saved), larger)
    shutil.rmtree(saved)
    assert find_start(Init(), opened).note.startswith("Adam's moments start at zero: there is no")
