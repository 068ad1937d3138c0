"""The loop against a naive one: transformers' model, whole logits, torch's AdamW, 20 steps, everything by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from surgery.errors import SurgeryError
from surgery.midtraining.compiling import compiled
from surgery.midtraining.loop import fresh_state, prepare, train
from surgery.midtraining.run_file import make_run
from tests import tiny

STEPS, ROWS, LENGTH, VOCAB = 20, 6, 24, 264
PEAK, WARMUP, CLIP, DECAY = 3e-3, 4, 0.7, 0.1


class Kept:
    """A log that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.events: list[str] = []

    def step(self, metrics, times):
        self.steps.append(dict(metrics))

    def event(self, step, level, text):
        self.events.append(text)

    def routing(self, step, kind, reading):
        pass


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two layers of each family."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            layers = 3 if family == "glm4_moe" else 2  # whose first two are dense
            made[family] = tiny.save(family, tmp_path_factory.mktemp("small") / family, l=layers, h=48, f=40, m=16)
        return made[family]

    return get


def record(path: Path, masked: bool, packed: bool, steps: int = STEPS, rows: int = ROWS) -> Path:
    """Batches with structure, so that there is something to learn."""
    rng = np.random.default_rng(7)
    ids = np.cumsum(rng.integers(1, 4, (steps, rows, LENGTH)), -1) % VOCAB
    arrays = {"input_ids": ids.astype(np.uint16)}
    if masked:
        arrays["label_mask"] = (rng.random(ids.shape) < rng.random((steps, rows, 1))).astype(np.uint8)
    if packed:
        cut = rng.integers(5, LENGTH - 5, (steps, rows, 1))
        place = np.arange(LENGTH)
        arrays["position_ids"] = np.where(place < cut, place, place - cut).astype(np.uint8)
    np.savez(path, **arrays)
    return path


def settings(model: Path, batches: Path, out: Path, **train: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "experts": train.pop("experts", "loop")},
        "data": {"recorded": str(batches)},
        "output": str(out),
        "moe": train.pop("moe", {"balance": 0.02, "router_z": 0.01}),
        "device": "cpu",
        "train": {
            "schedule": {"name": "cosine", "start_lr": PEAK, "warmup": WARMUP, "final_lr": "10%"},
            "optimizer": {"weight_decay": DECAY, "decay": "megatron"},
            "clip_norm": CLIP,
            "precision": "fp32",
            **train,
        },
    }


def run(value: dict[str, Any]) -> tuple[Kept, dict[str, torch.Tensor]]:
    job = prepare(make_run(value))
    log = Kept()
    train(job, fresh_state(job), log)
    return log, job.weights()


def naive(folder: Path, batches: Path, *, micro: int, z: float, balance: float, router_z: float) -> tuple[list, dict]:
    """(loss, ce, grad_norm) of every step, and the weights in the end."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    two = [p for p in model.parameters() if p.ndim > 1]
    one = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": two, "weight_decay": DECAY}, {"params": one, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    data, told = np.load(batches), []
    for step in range(STEPS):
        ids = torch.from_numpy(data["input_ids"][step].astype(np.int64))
        labels = ids.clone()
        if "label_mask" in data:
            labels[torch.from_numpy(data["label_mask"][step]) == 0] = -100
        count = int((labels[:, 1:] != -100).sum())
        sums = np.zeros(2)
        for part in range(0, ROWS, micro):
            rows = slice(part, part + micro)
            more = {"output_router_logits": True} if balance else {}
            if "position_ids" in data:
                more["position_ids"] = torch.from_numpy(data["position_ids"][step][rows].astype(np.int64))
            out = model(input_ids=ids[rows], use_cache=False, **more)
            logits, wanted = out.logits[:, :-1].reshape(-1, VOCAB), labels[rows, 1:].reshape(-1)
            ce = cross_entropy(logits, wanted, reduction="sum", ignore_index=-100) / count
            loss = ce + z * logits.logsumexp(-1)[wanted != -100].square().sum() / count
            share, routers = micro / ROWS, out.router_logits if balance else ()
            for router in routers:
                chances, (experts, k) = router.softmax(-1), (router.shape[-1], 3)
                chosen = torch.zeros_like(chances).scatter(1, chances.topk(k).indices, 1.0)
                balanced = experts * (chosen.mean(0) / k * chances.mean(0)).sum()
                squares = router.logsumexp(-1).square().mean()
                loss = loss + share * (balance * balanced + router_z * squares) / len(routers)
            loss.backward()
            sums += [float(loss.detach()), float(ce.detach())]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        progress = (step - WARMUP) / (STEPS - WARMUP)
        decayed = PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * (step + 1) / WARMUP if step < WARMUP else decayed
        optimizer.step()
        optimizer.zero_grad()
        told.append((*sums, float(norm)))
    return told, {n: p.detach() for n, p in model.named_parameters()}


CASES = [("llama", 6, False, False, 0.0, 0), ("llama", 2, True, True, 1e-3, 0), ("qwen2", 3, False, True, 0.0, 0),
         ("olmoe", 6, True, False, 1e-3, 0.02), ("mixtral", 2, False, True, 0.0, 0.02),
         ("olmoe", 3, True, True, 1e-3, 0.02), ("mixtral", 6, False, False, 0.0, 0)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "micro", "masked", "packed", "z", "balance"), CASES)
def test_twenty_steps_are_those_of_a_naive_loop(family, micro, masked, packed, z, balance, small, tmp_path):
    batches, moe = record(tmp_path / "b.npz", masked, packed), {"balance": balance, "router_z": balance / 2}
    told, weights = naive(small(family), batches, micro=micro, z=z, **moe)
    log, ours = run(settings(small(family), batches, tmp_path, micro_batch=micro, z_loss=z, moe=moe))
    for mine, (loss, ce, norm) in zip(log.steps, told, strict=True):
        assert (mine["loss"], mine["ce"]) == pytest.approx((loss, ce), abs=5e-6)
        assert mine["grad_norm"] == pytest.approx(norm, rel=2e-5)
    assert ours.keys() == weights.keys()
    assert max(float((ours[n] - w).abs().max()) for n, w in weights.items()) < 5e-5
    assert log.steps[-1]["ce"] < log.steps[0]["ce"] - 0.3  # it does learn


@pytest.mark.slow
def test_backends_checkpointing_and_micro_batches_change_nothing(small, tmp_path):
    batches = record(tmp_path / "b.npz", masked=True, packed=True)
    plain, _ = run(settings(small("olmoe"), batches, tmp_path, micro_batch=3))
    for more in ({"experts": "padded"}, {"experts": "grouped_mm"}, {"activation_checkpointing": True},
                 {"loss_chunk": 5}):  # fmt: skip
        other, _ = run(settings(small("olmoe"), batches, tmp_path, micro_batch=3, **more))
        for a, b in zip(other.steps, plain.steps, strict=True):
            assert a["ce"] == pytest.approx(b["ce"], abs=2e-5), more
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), more


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["autocast", "bf16"])
@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_rounded_products_learn_the_same(precision, family, small, tmp_path):
    """Over fifty steps."""
    batches = record(tmp_path / "b.npz", masked=False, packed=False, steps=50)
    exact, _ = run(settings(small(family), batches, tmp_path))
    rounded, weights = run(settings(small(family), batches, tmp_path, precision=precision))
    assert {w.dtype for w in weights.values()} == {torch.float32}
    gaps = [a["ce"] - b["ce"] for a, b in zip(rounded.steps, exact.steps, strict=True)]
    assert max(map(abs, gaps)) < 0.05 and max(map(abs, gaps)) > 0


def test_a_batch_may_grow_and_rows_may_be_shorter_at_first(small, tmp_path):
    batches = record(tmp_path / "b.npz", masked=False, packed=True)
    step = ROWS * LENGTH
    value = settings(small("llama"), batches, tmp_path, micro_batch=2,
                     batch_tokens={0: step, 4 * step: 2 * step}, sequence_length={0: 8, 2 * step: LENGTH})  # fmt: skip
    job = prepare(make_run(value))
    log = Kept()
    train(job, fresh_state(job), log)
    assert [s["tokens"] // step for s in log.steps] == [1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert [job.course.micro_rows(i) for i in (0, 1, 2)] == [6, 6, 2]
    assert [job.course.accumulation(i) for i in (0, 3, 4)] == [3, 3, 6]
    whole, _ = run(settings(small("llama"), batches, tmp_path, micro_batch=2))
    assert log.steps[0]["ce"] != whole.steps[0]["ce"]  # eight tokens see less before them


def test_spikes_are_left_out_and_what_is_not_finite_ends_a_run_that_leaves_nothing_out(small, tmp_path):
    batches = record(tmp_path / "b.npz", masked=False, packed=False)
    value = settings(small("llama"), batches, tmp_path, skip_step={"sigma": 4, "window": 8, "abort_after": 3})
    job = prepare(make_run(value))
    log, state = Kept(), fresh_state(job)
    before: dict[str, torch.Tensor] = {}

    def spoil(job, state):
        """One gradient of step 11 is huge; its weights are those of step 10."""
        if state["progress"].step == 10:
            before.update({n: w.clone() for n, w in job.weights().items()})
            first = next(iter(job.model.parameters()))
            handle = first.register_hook(lambda g: handle.remove() or g * 1e6)
        if state["progress"].step == 11:
            assert all(torch.equal(w, before[n]) for n, w in job.weights().items())

    train(job, state, log, [spoil])
    assert [s["step"] for s in log.steps if s["skipped"]] == [11]
    assert state["spikes"].skipped == 1 and "step 11 is left out: the gradient norm" in log.events[0]
    job = prepare(make_run(settings(small("llama"), batches, tmp_path, skip_step=None)))
    with torch.no_grad():
        job.model.model.norm.weight[0] = float("nan")
    with pytest.raises(SurgeryError, match="the loss is nan"):
        train(job, fresh_state(job), Kept())


@pytest.mark.slow
def test_all_that_resuming_needs_is_in_the_state(small, tmp_path):
    """Half a run, its state_dicts carried into a new job, the other half: bit for bit the whole run."""
    batches = record(tmp_path / "b.npz", masked=True, packed=True)
    value = settings(small("olmoe"), batches, tmp_path, micro_batch=2, experts="padded")
    whole, weights = run(value)

    class Stop(Exception):
        pass

    def stop(job, state):
        if state["progress"].step == 9:
            raise Stop

    first, log = prepare(make_run(value)), Kept()
    state = fresh_state(first)
    with pytest.raises(Stop):
        train(first, state, log, [stop])
    kept = {name: part.state_dict() for name, part in state.items()}
    second = prepare(make_run(value))
    again = fresh_state(second)
    for name, part in again.items():
        part.load_state_dict(kept[name])
    train(second, again, log)
    assert log.steps == whole.steps
    assert all(torch.equal(w, weights[n]) for n, w in second.weights().items())


def test_routers_are_balanced_by_a_bias_without_a_loss(small, tmp_path):
    batches = record(tmp_path / "b.npz", masked=False, packed=False)
    loads = {}
    for rate in (0.0, 0.05):
        value = settings(small("glm4_moe"), batches, tmp_path, moe={"balance": 0, "router_z": 0, "bias_rate": rate})
        loads[rate] = [s["router"]["max_load"] for s in run(value)[0].steps]
    assert np.mean(loads[0.05][-8:]) < np.mean(loads[0.0][-8:])
    assert loads[0.05][0] == loads[0.0][0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_compiled_layers_learn_the_same(family, small, tmp_path, monkeypatch):
    """Traced and differentiated by torch.compile, but not turned into C++, which takes minutes."""
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: whole(self, backend="aot_eager", **more))
    batches = record(tmp_path / "b.npz", masked=True, packed=False)
    plain, _ = run(settings(small(family), batches, tmp_path, micro_batch=3))
    job = prepare(make_run(settings(small(family), batches, tmp_path, micro_batch=3)))
    said = compiled(job.model, True, device="cpu", seconds=0.0, dense=not job.objective.routers)
    assert said == (
        "torch.compile for layers" if family == "llama" else "torch.compile for the attention of the layers"
    )
    log = Kept()
    train(job, fresh_state(job), log)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for a, b in zip(log.steps, plain.steps, strict=True):
        assert a["ce"] == pytest.approx(b["ce"], abs=2e-5)


def test_compiling_is_for_long_runs_of_dense_models_where_there_is_a_compiler(monkeypatch):
    layer = torch.nn.Linear(2, 2)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++")
    assert compiled(layer, "auto", device="cpu", seconds=3600, dense=True) == "torch.compile for layers"
    assert compiled(layer, "auto", device="cpu", seconds=60, dense=True) == ""
    assert compiled(layer, "auto", device="cpu", seconds=3600, dense=False) == ""
    assert compiled(layer, False, device="cuda", seconds=3600, dense=True) == ""
    assert compiled(layer, "auto", device="cuda", seconds=1, dense=False) != ""
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert compiled(layer, "auto", device="cpu", seconds=3600, dense=True) == ""
