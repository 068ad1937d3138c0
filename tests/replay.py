"""Repeat a run of another trainer, `python -m tests.replay CASE OUT`: the case becomes a run's settings, and no more.

CASE holds case.json (what the trainer was told), init/ (a Hugging Face folder), batches.npz, and perhaps
init_optimizer.safetensors; OUT gets curve.jsonl (every number
of a step: lr, ce, z, grad_norm, aux, loss, rewards of preferences) and model.safetensors.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.midtraining.export import export
from surgery.midtraining.loop import Job, fresh_state, prepare, train
from surgery.midtraining.reference import with_reference
from surgery.midtraining.run_file import make_run

CONVENTIONS = {
    "transformers": "hf",
    "trl": "hf",
    "olmo_core": "olmo_core",
    "olmo": "olmo",
}  # by the program's first word
NAMES = {"LinearWithWarmup": "linear", "CosWithWarmup": "cosine", "WSD": "wsd", "linear": "linear", "cosine": "cosine",
         "constant": "constant", "constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}  # fmt: skip
SHAPES = {"linear": "linear", "cosine": "cosine", "1-sqrt": "sqrt"}


def settings(case: Path, out: Path) -> dict[str, Any]:
    """The run that a case describes, as its YAML would say it."""
    told = json.loads((case / "case.json").read_text())
    optimizer, loss = told["optimizer"], told["loss"]
    tied = json.loads((case / "init" / "config.json").read_text()).get("tie_word_embeddings")
    moments = case / "init_optimizer.safetensors"
    return {
        "model": {"path": str(case / "init"), "experts": "loop"},
        "data": {
            "recorded": str(batches(case, told, out)),
            "attend_across_documents": not told.get("isolate_documents", True),
        },
        "output": str(out),
        "init": {"optimizer": str(moments), "optimizer_step": optimizer["initial_step"]}
        if optimizer.get("initial_step")
        else {"optimizer": "fresh"},
        "train": {
            "convention": CONVENTIONS[told["program"].replace(".", " ").split()[0]],
            "micro_batch": told["micro_batch"] if "micro_batch" in told else 2 * told["batch"],
            "schedule": schedule(told["schedule"], told["steps"]),
            "optimizer": {
                "betas": optimizer["betas"],
                "eps": optimizer["eps"],
                "weight_decay": optimizer["weight_decay"],
                "decay": "all",
                "no_decay": [n for n in optimizer.get("no_decay", []) if not (tied and n == "lm_head.weight")],
            },
            "clip_norm": told["clip"] or None,
            "z_loss": told.get("z_loss", 0.0),
            "precision": "fp32",
        },
        "objective": {"name": "dpo", "beta": told["beta"]} if told.get("kind") == "dpo" else "tokens",
        "moe": {"balance": loss.get("aux_coef") or 0.0, "router_z": loss.get("router_z_coef") or 0.0},
        "device": "cpu",
    }


def batches(case: Path, told: Mapping[str, Any], out: Path) -> Path:
    """The case's batches; with positions that begin anew behind every EOS, where it isolates documents without them."""
    path = case / "batches.npz"
    with np.load(path) as arrays:
        if not told.get("isolate_documents") or "position_ids" in arrays:
            return path
        ids = arrays["input_ids"]
        begun = np.zeros(ids.shape, np.int64)
        begun[..., 1:] = np.where(ids[..., :-1] == told["eos"], np.arange(1, ids.shape[-1]), 0)
        positions = np.arange(ids.shape[-1]) - np.maximum.accumulate(begun, axis=-1)
        np.savez(out / "batches.npz", **arrays, position_ids=positions)
    return out / "batches.npz"


def schedule(told: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The learning rates; floors are shares of the peak in OLMo, and so in a cosine of transformers' WSD."""
    peak, extra = told["peak"], told.get("kwargs", {})
    found = {"name": NAMES[told["name"]], "start_lr": peak, "warmup": told.get("warmup", 0)}
    if told["total"] != steps:
        found["length"] = told["total"]
    if "warmup_min_lr" in told:
        found["warmup_from"] = told["warmup_min_lr"]
    if found["name"] == "wsd":
        found["decay"] = told.get("decay", extra.get("num_decay_steps"))
        found["final_lr"] = told.get("decay_min_lr", peak * extra.get("min_lr_ratio", 0.0))
        found |= {"decay_shape": SHAPES[extra["decay_type"]]} if "decay_type" in extra else {}
        found |= {"warmup_from": found["final_lr"]} if "min_lr_ratio" in extra else {}
    elif told["name"].endswith("WithWarmup"):
        found["final_lr"] = peak * told.get("alpha_f", 0.1)
    return found


class Curve:
    """A log that writes the lines of curve.jsonl."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("w")

    def step(self, metrics: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        kept = {key: value for key, value in metrics.items() if type(value) in (int, float)}
        aux = metrics.get("balance", 0.0)
        self.file.write(json.dumps({**kept, "aux": aux, "aux_loss": aux}) + "\n")

    def routing(self, step: int, kind: str, reading: Mapping[str, Any]) -> None:
        """Not in the curve."""

    def event(self, step: int, level: str, text: str) -> None:
        print(f"{level}: {text}")


def replay(case: Path, out: Path, more: Mapping[str, Any] | None = None) -> Job:
    """Run the loop on a case, with `more` sections in place of its own."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    job = with_reference(prepare(make_run({**settings(case, out), **(more or {})})))
    curve = Curve(out / "curve.jsonl")
    train(job, fresh_state(job), curve)
    curve.file.close()
    export(job, job.run.export[0], out / "export")
    shutil.move(out / "export" / "model.safetensors", out / "model.safetensors")
    return job


if __name__ == "__main__":
    replay(Path(sys.argv[1]), Path(sys.argv[2]))
