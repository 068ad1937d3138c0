"""Preferences: losses by hand, a frozen reference on disk, and routers that are balanced meanwhile.

Whole runs of trl are repeated in test_midtrain_replay.py.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from surgery.data.trainers.recorded import RecordedBatches
from surgery.errors import ConfigError, FileError
from surgery.midtraining.batching import micro_batches, rows_of
from surgery.midtraining.loop import fresh_state, prepare, train
from surgery.midtraining.preference import FIGURES, Preference, completion_logps
from surgery.midtraining.reference import FILE, with_reference
from surgery.midtraining.run import midtrain
from surgery.midtraining.run_file import make_run
from surgery.midtraining.run_folder import METRICS
from surgery.midtraining.step import gradients
from tests.test_midtrain_loop import Kept

CASE = Path(__file__).parent / "golden" / "training" / "trl_dpo_mixtral"


def settings(out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(CASE / "init"), "experts": "loop"},
        "data": {"recorded": str(CASE / "batches.npz")},
        "output": str(out),
        "objective": more.pop("objective", "dpo"),
        "moe": {"balance": more.pop("balance", 0.05), "router_z": 0.0},
        "device": "cpu",
        "train": {"precision": "fp32", "schedule": {"start_lr": 3e-3}, **more},
    }


@pytest.mark.parametrize(
    ("loss", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, lambda m, n: -math.log(1 / (1 + math.exp(-0.3 * m)))),
        ("sigmoid", 0.2, lambda m, n: 0.8 * math.log1p(math.exp(-0.3 * m)) + 0.2 * math.log1p(math.exp(0.3 * m))),
        ("hinge", 0.0, lambda m, n: max(0.0, 1 - 0.3 * m)),
        ("ipo", 0.0, lambda m, n: (n - 1 / 0.6) ** 2),
    ],
)
def test_losses_by_hand(loss, smoothing, expected):
    logps, reference = [-5.0, -9.0, -2.0, -1.0], [-6.0, -8.0, -2.5, -1.5]
    tokens = [4, 2, 5, 8]
    found, figures = Preference(loss, 0.3, smoothing).terms(*(torch.tensor(x) for x in (logps, reference, tokens)))
    gained = [a - b for a, b in zip(logps, reference, strict=True)]
    per_token = [g / n for g, n in zip(gained, tokens, strict=True)]
    wanted = sum(expected(gained[i] - gained[i + 1], per_token[i] - per_token[i + 1]) for i in (0, 2))
    assert float(found) == pytest.approx(wanted, rel=1e-6)
    said = dict(zip(FIGURES, figures.tolist(), strict=True))
    if loss == "sigmoid":
        assert said["rewards/margin"] == pytest.approx(0.3 * (gained[0] - gained[1] + gained[2] - gained[3]))
    assert said["rewards/accuracy"] == (2 if loss == "ipo" else 1)
    assert (said["length/chosen"], said["length/rejected"]) == (9, 10)
    assert said["kl"] == pytest.approx(-sum(per_token) / 2)


def test_log_probabilities_and_their_gradients_in_any_chunks():
    gen = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(3, 7, 5, generator=gen), torch.randn(11, 5, generator=gen)
    labels = torch.randint(0, 11, (3, 7), generator=gen)
    labels[1, 2:], labels[2] = -100, -100
    hidden.requires_grad_(), weight.requires_grad_()
    by = torch.tensor([0.3, -2.0, 1.0])
    plain = (hidden @ weight.T).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    wanted = (plain * (labels != -100)).sum(1)
    for chunk in (1, 4, None):
        found, lengths = completion_logps(hidden, weight, labels, chunk)
        assert torch.allclose(found, wanted, atol=1e-5) and lengths.tolist() == [7, 2, 1]
        for a, b in zip(*(torch.autograd.grad((x * by).sum(), (hidden, weight), retain_graph=True)
                          for x in (found, wanted)), strict=True):  # fmt: skip
            assert torch.allclose(a, b, atol=1e-5)


def test_pairs_stay_together_on_any_number_of_ranks_and_in_any_micro_batch():
    batches = RecordedBatches(CASE / "batches.npz")
    with np.load(CASE / "batches.npz") as arrays:
        ids = arrays["input_ids"]
    whole = batches.rows(3).tokens
    assert np.array_equal(whole[0::2], ids[3, :3]) and np.array_equal(whole[1::2], ids[3, 3:])
    shares = [batches.rows(3, rank, 3) for rank in range(3)]
    assert all(np.array_equal(s.tokens, ids[3, [r, r + 3]]) for r, s in enumerate(shares))
    with pytest.raises(ConfigError, match="pairs stay together"):
        prepare(make_run(settings(Path("none"), micro_batch=3)))
    with pytest.raises(ConfigError, match="the data are pairs"):
        prepare(make_run(settings(Path("none"), objective="tokens")))
    with pytest.raises(ConfigError, match="goes with loss: sigmoid"):
        make_run(settings(Path("none"), objective={"name": "dpo", "loss": "ipo", "label_smoothing": 0.1}))


@pytest.mark.parametrize("micro", [2, 6])
def test_micro_batches_change_nothing(micro, tmp_path):
    """But the balance loss, which is one of micro-batches."""
    told = {}
    for size in (6, micro):
        job = with_reference(prepare(make_run(settings(tmp_path / str(size), micro_batch=size, balance=0.0, length=3))))
        kept = Kept()
        train(job, fresh_state(job), kept)
        told[size] = kept.steps[-1]
    for name in ("loss", "dpo", "grad_norm", *FIGURES):
        assert told[micro][name] == pytest.approx(told[6][name], rel=2e-5, abs=1e-7), name


def test_routers_learn_from_the_balance_loss(tmp_path):
    """With it, without it, and from it alone: a router's gradient is the sum of the two, and padding has no part."""

    def router(balance: float, weight: float = 1.0, pad: int = 1) -> torch.Tensor:
        job = prepare(make_run(settings(tmp_path / "run", balance=balance)))
        rows = rows_of(job.batches, job.course.layout, 0)
        rows.tokens[rows.padding] = pad
        [part] = micro_batches(rows, 6, "cpu")
        beta = replace(job.objective.preference, beta=0.1 * weight)
        gradients(job.model, [part], replace(job.objective, preference=beta), job.world)
        return job.objective.routers.mixtures[0].weight.grad.clone()

    both, without, alone = router(0.05), router(0.0), router(0.05, weight=0.0)
    assert alone.norm() > 1e-4 and not torch.allclose(both, without, rtol=1e-3)
    assert torch.allclose(both, without + alone, atol=1e-7)
    assert torch.equal(both, router(0.05, pad=17))


def test_frozen_routers_stay_and_the_run_says_how_it_goes(tmp_path):
    done = midtrain(make_run(settings(tmp_path / "run", freeze=["router"], length=8)))
    steps = [json.loads(line) for line in (done.folder / METRICS).read_text().splitlines()]
    assert {"dpo", *FIGURES} <= steps[-1].keys()
    assert steps[0]["rewards/margin"] == pytest.approx(0, abs=1e-6) and abs(steps[-1]["rewards/margin"]) > 1e-3
    before, after = (load_file(p / "model.safetensors") for p in (CASE / "init", done.exports[0]))
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {name for name in after if name.endswith("gate.weight")} != set()
    assert steps[0]["length/chosen"] > 1


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_same_numbers(tmp_path):
    class Stops:
        def event(self, record: Any) -> None:
            pass

        evaluation = experts = event

        def step(self, metrics: Any, times: Any) -> None:
            if metrics["step"] == 6:
                raise KeyboardInterrupt

        def close(self) -> None:
            pass

    told = {}
    for name in ("whole", "stopped"):
        run = make_run({**settings(tmp_path / name, length=8), "checkpoint": {"every": 4}})
        if name == "stopped":
            with pytest.raises(KeyboardInterrupt):
                midtrain(run, views=lambda job: [Stops()])
        midtrain(run)
        lines = (tmp_path / name / METRICS).read_text().splitlines()
        told[name] = {m["step"]: (m["loss"], m["rewards/margin"], m["grad_norm"]) for m in map(json.loads, lines)}
    assert told["whole"] == told["stopped"] and len(told["whole"]) == 8


def test_the_reference_is_kept_and_belongs_to_its_model(tmp_path):
    job = prepare(make_run(settings(tmp_path / "run", length=4)))
    first = with_reference(job)
    data = (tmp_path / "run" / FILE).read_bytes()
    with torch.no_grad():
        job.model.lm_head.weight.mul_(2.0)
    again = with_reference(replace(job, begun=2))
    assert (tmp_path / "run" / FILE).read_bytes() == data
    assert np.array_equal(first.batches.rows(1).reference, again.batches.rows(1).reference)
    with pytest.raises(FileError, match="of another model"):
        with_reference(replace(job, digest="other"))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileError, match="is missing"):
        with_reference(replace(job, begun=2))
