"""Runs of other trainers, repeated by the loop through its settings: every step's numbers, and the last weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.replay import replay

GOLDEN = Path(__file__).parent / "golden" / "training"
CASES = sorted(p.parent.name for p in GOLDEN.glob("*/case.json"))
RELATIVE = {"lr": 1e-9, "grad_norm": 2e-5}
ABSOLUTE = {"ce": 5e-6, "z": 1e-7}
TRL = {"loss": 5e-6, "rewards/chosen": 5e-6, "rewards/rejected": 5e-6, "aux_loss": 5e-6}  # of fine-tuning besides
WEIGHTS = 1e-4  # 1e-6 to 1e-5, by processor: AdamW makes steps of full size of gradients that are little but rounding


def apart(case: Path, out: Path) -> dict[str, float]:
    """By how much what was repeated is beyond its tolerance (1: at it)."""
    wanted, found = ([json.loads(x) for x in (p / "curve.jsonl").read_text().splitlines()] for p in (case, out))
    assert [x["step"] for x in found] == [x["step"] for x in wanted]
    far: dict[str, float] = {}
    limits = RELATIVE | ABSOLUTE | (TRL if case.name.startswith("trl_") else {})
    for a, b in zip(found, wanted, strict=True):
        for name, limit in limits.items():
            if name in b:
                scale = abs(b[name]) if name in RELATIVE and b[name] else 1.0
                far[name] = max(far.get(name, 0.0), abs(a[name] - b[name]) / scale / limit)
    ours, theirs = load_file(out / "model.safetensors"), load_file(case / "final.safetensors")
    assert ours.keys() == theirs.keys()
    far["weights"] = max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) / WEIGHTS
    return far


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_repeated_number_for_number(name, tmp_path):
    replay(GOLDEN / name, tmp_path)
    assert {k: v for k, v in apart(GOLDEN / name, tmp_path).items() if not v < 1} == {}


def changed(case: Path, to: Path, key: str, value: object) -> Path:
    """A case in which one thing is told differently."""
    shutil.copytree(case, to)
    told = json.loads((to / "case.json").read_text())
    *path, leaf = key.split(".")
    inner = told
    for step in path:
        inner = inner[step]
    inner[leaf] = value
    (to / "case.json").write_text(json.dumps(told))
    return to


@pytest.mark.parametrize(("name", "key", "value", "seen"), [
    ("olmo_linear_masks_accum", "program", "olmo_core Trainer", "ce"),  # another divisor
    ("olmo_linear_masks_accum", "z_loss", 0.0, "z"),
    ("olmo_linear_masks_accum", "schedule.warmup_min_lr", 0.0, "lr"),
    ("olmo_linear_masks_accum", "clip", None, "weights"),
    ("olmo_linear_masks_accum", "optimizer.no_decay", [], "weights"),
    ("core_olmoe_dropless_accum", "loss.router_z_coef", 0.0, "grad_norm"),
    ("core_olmo2_anneal_inherit", "optimizer.initial_step", 1, "weights"),
    ("hf_mixtral_packed_accum_aux", "isolate_documents", False, "ce"),
    ("hf_mixtral_packed_accum_aux", "loss.aux_coef", 0.1, "grad_norm"),
])  # fmt: skip
def test_what_is_told_differently_is_seen(name, key, value, seen, tmp_path):
    case = changed(GOLDEN / name, tmp_path / "case", key, value)
    replay(case, tmp_path / "out")
    assert apart(GOLDEN / name, tmp_path / "out")[seen] > 1
