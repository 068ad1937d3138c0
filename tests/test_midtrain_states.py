"""Runs that begin with the state of another trainer's optimizer, in its own files: they go on as that trainer does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import FileError, LayoutError, NoStateError
from surgery.formats.hf.order import in_order, spared
from surgery.formats.optimizer import MASTER, MOMENTS
from surgery.formats.registry import open_checkpoint
from surgery.midtraining.loop import fresh_state, prepare, train
from surgery.midtraining.run_file import make_run
from surgery.midtraining.run_folder import RUN
from surgery.midtraining.settings import Init
from surgery.midtraining.start import find_start
from tests.oracle import same_bits
from tests.replay import Curve, replay
from tests.test_midtrain_loop import record, settings
from tests.test_midtrain_replay import GOLDEN as CURVES
from tests.test_midtrain_replay import apart
from tests.test_optimizer import FLAT, GOLDEN, OPTIONS, RANK, copied, trees

CORE = CURVES / "core_olmo2_anneal_inherit"


def as_of_a_trainer(folder: Path) -> Path:
    """The model of OLMo-core's run and the state that it went on with, in torch's numbers."""
    shutil.copytree(CORE / "init", folder)
    given = load_file(CORE / "init_optimizer.safetensors")
    names = in_order("olmo2", [n.removeprefix("exp_avg.") for n in given if n.startswith("exp_avg.")])
    both = [[n for n in names if spared(n) == kind] for kind in (False, True)]
    state = {i: {"step": torch.tensor(15.0), **{role: given[f"{role}.{n}"] for role in MOMENTS}}
             for i, n in enumerate([*both[0], *both[1]])}  # fmt: skip
    at, groups = 0, []
    for owned, decay in zip(both, (0.1, 0.0), strict=True):
        groups.append({"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay,
                       "params": list(range(at, at + len(owned)))})  # fmt: skip
        at += len(owned)
    torch.save({"state": state, "param_groups": groups}, folder / "optimizer.pt")
    return folder


@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=pytest.mark.slow if to == "olmo-core" else pytest.mark.thorough)
           for to in ("olmo-core", "olmo", "hf")]
)  # fmt: skip
def test_olmo_cores_own_run_goes_on_from_any_format(to, tmp_path):
    """OLMo-core's trainer went on from this state for 20 steps: so does a run from it, in the files of any format."""
    surgery.convert(as_of_a_trainer(tmp_path / "hf"), tmp_path / "from", to=to, optimizer=True)
    model = {"path": str(tmp_path / "from"), "experts": "loop"}
    job = replay(CORE, tmp_path / "out", {"model": model, "init": {"optimizer": "auto"}})
    assert "Adam's moments are those of from, after 15 steps with betas 0.9 and 0.95, eps 1e-08" in job.start.note
    assert {k: v for k, v in apart(CORE, tmp_path / "out").items() if not v < 1} == {}


@pytest.mark.slow
def test_a_trainers_own_run_goes_on(tmp_path):
    """transformers' Trainer resumes from its checkpoint, and a run from the same files: the same three updates."""
    pytest.importorskip("accelerate")
    from tests.upstream.make_trainer_goldens import Rows
    from tests.upstream.make_trainer_goldens import train as trained

    seen: list[torch.Tensor] = []

    class Watched(Rows):
        def __getitem__(self, i):
            seen.append(super().__getitem__(i)["input_ids"])
            return super().__getitem__(i)

    theirs = trained("llama", tmp_path / "theirs", GOLDEN / "hf-llama", Watched())
    rows = torch.stack(seen[-12:]).reshape(3, 1, 4, 12).numpy()
    np.savez(tmp_path / "batches.npz", input_ids=rows)
    run = {
        "model": {"path": str(GOLDEN / "hf-llama")}, "data": {"recorded": str(tmp_path / "batches.npz")},
        "output": str(tmp_path / "ours"), "device": "cpu",
        "train": {"convention": "hf", "precision": "fp32", "clip_norm": 1.0, "micro_batch": 4,
                  "optimizer": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "decay": "hf"},
                  "schedule": {"name": "cosine", "start_lr": 1e-3, "warmup": 1, "length": 5, "offset": 2}},
    }  # fmt: skip
    job = prepare(make_run(run))
    assert "those of hf-llama, after 2 steps" in job.start.note
    train(job, fresh_state(job), Curve(tmp_path / "curve.jsonl"))
    ours = job.weights()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-6
    fresh = prepare(make_run({**run, "init": {"optimizer": "fresh"}}))
    train(fresh, fresh_state(fresh), Curve(tmp_path / "curve.jsonl"))
    assert max(float((fresh.weights()[n] - theirs[n]).abs().max()) for n in theirs) > 1e-4


@pytest.mark.parametrize(("case", "options"), [
    ("olmo-core", {}), ("megatron-plain", {}), ("neox-zero1", {"release": "2024-11"}), ("hf-qwen3_moe", {}),
])  # fmt: skip
def test_states_in_the_files_of_every_program_are_taken(case, options, tmp_path):
    """Programs' own files: moments and steps in the optimizer, masters in place of rounded weights, the last rate."""
    opened = open_checkpoint(GOLDEN / case, options=options, optimizer=True)
    start = find_start(Init(), replace(opened, optimizer=None), options)
    assert start.moments and start.moments.step == 2 and start.lr == opened.optimizer.lr
    assert all(same_bits(start.moments.parts[role][n].full(), t.full())
               for role in MOMENTS for n, t in opened.optimizer.roles[role].items())  # fmt: skip
    begun = start.begun(opened)
    assert bool(start.masters) == opened.optimizer.kept == ("masters" in start.note)
    if start.masters:
        assert all(same_bits(begun.parts[n].full(), t.full()) for n, t in opened.optimizer.roles[MASTER].items())
        assert {p.dtype for p in begun.parts.values()} == {"float32"}


def test_megatrons_masters_moments_and_rate_are_in_the_model(tmp_path):
    """A whole job, as `init: {optimizer: auto}` and `start_lr: inherit` make it from Megatron's own files."""
    batches = record(tmp_path / "b.npz", masked=False, packed=False)
    value = settings(GOLDEN / "megatron-plain", batches, tmp_path / "run")
    value["train"]["schedule"] = {"name": "constant", "start_lr": "inherit"}
    job = prepare(make_run(value))
    found = open_checkpoint(GOLDEN / "megatron-plain", optimizer=True).optimizer
    assert torch.equal(job.weights()["model.embed_tokens.weight"], found.roles[MASTER]["embed"].full())
    named = {id(p): n for n, p in job.model.named_parameters()}
    states = {named[id(p)]: s for p, s in job.optimizer.state.items()}
    assert torch.equal(states["model.embed_tokens.weight"]["exp_avg"], found.roles["exp_avg"]["embed"].full())
    assert {float(s["step"]) for s in states.values()} == {2.0}
    assert job.source.parts["embed"].dtype == "bfloat16"  # and so will be what is exported


def _eight_bits(path: Path) -> None:
    tree = trees(path)
    tree["state"] = {i: {"step": 2, "state1": torch.zeros(4, dtype=torch.uint8)} for i in tree["state"]}
    torch.save(tree, path)


UNREAD = {  # states that are of another kind, or have been left out on purpose
    "no groups": ("hf-llama", "optimizer.pt", lambda path: torch.save({"state": {}, "param_groups": []}, path)),
    "eight bits": ("hf-llama", "optimizer.pt", _eight_bits),
    "cut from Megatron's files": ("megatron-flat", FLAT, Path.unlink),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_a_state_of_a_kind_that_is_not_read_is_said(kind, tmp_path):
    case, name, change = UNREAD[kind]
    change(copied(case, tmp_path / "run") / name)
    opened = open_checkpoint(tmp_path / "run")
    assert find_start(Init(), opened).note.startswith("Adam's moments start at zero, as those of run are not read: ")
    with pytest.raises(NoStateError):
        find_start(Init(optimizer=str(tmp_path / "run")), opened)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _put(value: float, role: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tree = trees(path)
        tree["state"][3][role].view(-1)[5] = value
        torch.save(tree, path)

    return change


def _other_masters(path: Path) -> None:
    tree = trees(path)
    next(iter(tree[0].values()))["param"][9] += 1
    torch.save(tree, path)


BROKEN = {
    "cut": ("hf-llama", "optimizer.pt", _half, "."),
    "no number": ("hf-llama", "optimizer.pt", _put(float("nan"), "exp_avg"), r"1 values of exp_avg of model\.layers"),
    "no square": ("hf-llama", "optimizer.pt", _put(-1.0, "exp_avg_sq"), "1 values of exp_avg_sq of .* negative"),
    "a rank is missing": ("neox-zero1", RANK.format(0), Path.unlink, "zero_pp_rank_0_mp_rank_00.* is missing"),
    "of another save": ("megatron-flat", FLAT, _other_masters, "does not round to its weight"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_state_stops_the_run_and_says_how_to_go_on(how, tmp_path):
    case, name, change, words = BROKEN[how]
    change(copied(case, tmp_path / "run") / name)
    value = settings(tmp_path / "run", record(tmp_path / "b.npz", masked=False, packed=False), tmp_path / "out")
    value["model"]["options"] = OPTIONS.get(case, {})
    with pytest.raises((FileError, LayoutError), match=words) as error:
        prepare(make_run(value))
    assert "`init: {optimizer: fresh}`" in (error.value.hint or "")
    assert prepare(make_run({**value, "init": {"optimizer": "fresh"}})).start.moments is None


def test_a_damaged_checkpoint_of_the_run_that_exported_a_model_is_refused(tiny_hf, tmp_path):
    export, saved = (tmp_path / "r" / name for name in ("export/step000000003-hf", "checkpoints/step000000003"))
    shutil.copytree(tiny_hf("llama"), export)
    assert find_start(Init(), open_checkpoint(export)).moments is None
    saved.mkdir(parents=True)
    (tmp_path / "r" / RUN).write_text("{}")
    with pytest.raises(FileError, match="MANIFEST") as error:
        find_start(Init(), open_checkpoint(export))
    assert "`init: {optimizer: fresh}`" in error.value.hint


def test_a_state_that_is_named_has_to_be_there_and_to_fit(tmp_path):
    opened = open_checkpoint(copied("hf-llama", tmp_path / "run"))
    other = open_checkpoint(GOLDEN / "hf-qwen3_moe")
    with pytest.raises(LayoutError, match="of another model"):
        find_start(Init(optimizer=str(GOLDEN / "hf-llama")), other)
    (tmp_path / "run" / "optimizer.pt").unlink()
    with pytest.raises(FileError, match="holds no optimizer's state"):
        find_start(Init(optimizer=str(tmp_path / "run")), opened)
    taken = find_start(Init(optimizer=str(GOLDEN / "hf-llama")), opened)
    assert taken.moments.step == 2
