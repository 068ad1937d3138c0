"""Folders of runs that were never run: files as `run_folder.py` describes them, with made-up but plausible numbers.

sample(tmp_path / "anneal", steps=220, seed=42)                       # a finished dense run
sample(tmp_path / "moe", steps=90, of=220, experts=8, layers=4)       # one that is going on
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.midtraining.log import RunLog

DOMAINS = {"code": (2.898, 2.68), "math": (4.398, 3.55), "prose": (4.516, 4.23)}  # loss before and after
TASKS = ("arc_easy/rc_0shot", "hellaswag/rc_0shot")


def sample(
    folder: Path,
    *,
    steps: int,
    of: int | None = None,
    seed: int = 42,
    experts: int = 0,
    layers: int = 4,
    gain: float = 0.0,
    **head: Any,
) -> Path:
    """A run of `of` steps that has come to step `steps`; `gain` is taken off all losses at the end."""
    of = of or steps
    chance, batch = random.Random(seed), 2048
    log = RunLog(folder)
    write(folder / "run.json", _head(folder.name, of, of * batch, seed, experts) | head)
    write(folder / "plan.json", _plan())
    write(folder / "selftests.json", _tests(experts))
    (folder / "config.resolved.yaml").write_text(f"train:\n  batch_tokens: {batch}\n  seed: {seed}\n")
    every = max(1, of // 10)
    for step in range(steps + 1):
        done = step / of
        if step:
            log.step(_metrics(step, of, batch, chance, experts), _times(step, batch, chance))
        if step % every == 0 or step == of:
            log.evaluation({"step": step, "tokens": step * batch, "heldout": _heldout(done, gain, chance),
                            "tasks": _tasks(done, chance)})  # fmt: skip
            if experts:
                log.experts(_experts(step, done, experts, layers, chance))
    log.event(1, "note", "experts are computed by grouped_mm: the quickest of 3 here")
    if steps == of:
        log.end("finished", steps)
    else:
        log.event(steps, "alarm", "left out: loss 9.12 is 7.2 standard deviations above the last 128")
        log.close()
    return folder


def soup(folder: Path, runs: Sequence[Path], gain: float) -> None:
    """The soup.json of runs in a folder: `gain` better than the mean of their losses."""
    ends = {run.name: json.loads(run.joinpath("evals.jsonl").read_text().splitlines()[-1])["heldout"] for run in runs}
    merged = {d: losses(sum(e[d]["loss"] for e in ends.values()) / len(ends) - gain) for d in DOMAINS}
    ingredients = [{"name": name, "heldout": heldout} for name, heldout in ends.items()]
    write(folder / "soup.json", {"ingredients": ingredients, "soup": {"heldout": merged}, "kept": "soup"})


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def _head(name: str, steps: int, tokens: int, seed: int, experts: int) -> dict[str, Any]:
    whole, active, family = (4_900_000, 1_650_000, "olmoe") if experts else (1_050_000, 1_050_000, "llama")
    model = {"path": "base", "format": "hf", "family": family, "digest": "5d41402abc4b2a76", "parameters": whole,
             "active_parameters": active}  # fmt: skip
    return {"format": "surgery-run-1", "name": name, "started": "2025-03-01T09:30:00+00:00", "steps": steps,
            "tokens": tokens, "seed": seed, "model": model, "device": {"name": "cpu", "count": 1},
            "command": ["surgery", "midtrain", "run.yaml"], "versions": {"torch": "2.13.0", "surgery": "0.1.0"},
            "parents": ["5d41402abc4b2a76"]}  # fmt: skip


def _plan() -> dict[str, Any]:
    rows = (("code", 12_000, 1_056), ("math", 500, 1_760), ("prose", 9_000, 704))
    sources = [{"name": n, "have": have, "take": take, "heldout": 96, "tokens": have * 128, "documents": have // 3}
               for n, have, take in rows]  # fmt: skip
    return {"sources": sources, "notes": ["math gives 1,760 instances: 3.52 epochs"]}


def _tests(experts: int) -> list[dict[str, Any]]:
    found = [("causality", "the last token changes nothing before it"),
             ("document isolation", "packed and alone: logits differ by at most 1.2e-7"),
             ("first learning rate", "3e-5 at step 1")]  # fmt: skip
    found += [("experts", "grouped_mm against the loop: 3e-7 in values, 5e-7 in gradients")] if experts else []
    return [{"name": name, "passed": True, "detail": detail, "seconds": 0.2} for name, detail in found]


def _metrics(step: int, of: int, batch: int, chance: random.Random, experts: int) -> dict[str, Any]:
    done = step / of
    ce = 3.1 - 0.5 * done + 0.9 * math.exp(-step / (0.02 * of + 1)) + chance.gauss(0, 0.06)
    norm = 0.6 + abs(chance.gauss(0, 0.2))
    found: dict[str, Any] = {"step": step, "tokens": step * batch, "loss": ce + 0.001, "ce": ce, "z": 0.001,
                             "lr": 3e-3 * (1 - done), "grad_norm": norm, "skipped": False}  # fmt: skip
    if experts:
        found |= {"balance": 1.0 + 0.3 * math.exp(-5 * done), "router_z": 2.0 - done}
        found["router"] = {"max_load": 1.2 + 2 * math.exp(-5 * done), "load_entropy": 0.97, "dead": 0.0}
    return found


def _times(step: int, batch: int, chance: random.Random) -> dict[str, Any]:
    seconds = 0.15 * (1 + abs(chance.gauss(0, 0.1)))
    parts = {
        "data": 0.01 * seconds,
        "compute": 0.91 * seconds,
        "optimizer": 0.08 * seconds,
        "elsewhere": 0.03 * seconds,
    }
    return {"seconds": seconds, "tokens_per_second": batch / seconds, "tokens_per_second_mean": batch / 0.16,
            "seconds_mean": 0.16, "tflops": 0.101, "mfu": None, "parts": parts}  # fmt: skip


def _heldout(done: float, gain: float, chance: random.Random) -> dict[str, Any]:
    reached = {name: before + (after - before - gain) * done**0.5 + chance.gauss(0, 0.01)
               for name, (before, after) in DOMAINS.items()}  # fmt: skip
    return {name: {**losses(loss), "tokens": 12_192, "bytes": 49_987} for name, loss in reached.items()}


def losses(loss: float) -> dict[str, float]:
    return {"loss": loss, "bpb": loss / math.log(2) / 4.1}


def _tasks(done: float, chance: random.Random) -> Mapping[str, Any]:
    return {name: {"documents": 200, "acc": 0.25 + 0.1 * done + chance.gauss(0, 0.01), "acc_norm": 0.27 + 0.1 * done,
                   "bpb": 1.4 - 0.3 * done} for name in TASKS}  # fmt: skip


def _experts(step: int, done: float, experts: int, layers: int, chance: random.Random) -> dict[str, Any]:
    """A reading as `router_telemetry.py` gives it."""
    spread = 0.8 * math.exp(-4 * done) + 0.08

    def shares(spread: float) -> list[float]:
        row = [max(0.0, 1 + chance.gauss(0, spread)) for _ in range(experts)]
        return [x / sum(row) for x in row]

    return {
        "step": step,
        "layers": list(range(layers)),
        "load": [shares(spread) for _ in range(layers)],
        "together": [[[1.0 if i == j else x for j, x in enumerate(shares(0.6))] for i in range(experts)]
                     for _ in range(layers)],
        "by_source": {domain: [shares(0.5) for _ in range(layers)] for domain in DOMAINS},
        "weight_drift": [0.1 * done * (i + 1) for i in range(layers)],
        "tokens": 2048,
        "top_k": 2,
    }  # fmt: skip
