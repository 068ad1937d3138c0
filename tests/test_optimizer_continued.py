"""What Megatron's optimizers make of a written state: which rate they take, and who counts the updates.

What upstream does is written out here (`OptimizerParamScheduler.get_lr`, the identifiers of groups in core 0.19) and in
`tests/upstream/fused_adam.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import UsageError
from tests.oracle import GOLDEN
from tests.test_optimizer import MODEL, steps, trees
from tests.upstream.fused_adam import FusedAdam

SOURCE = GOLDEN / "optimizer" / "megatron-plain"
FORMS = ("megatron", "megatron-dist")
KEYS = ("max_lr", "min_lr", "start_wd", "end_wd", "wd_mult", "optimizer", "lr_mult", "is_expert_parallel",
        "is_decoupled_lr")  # fmt: skip


def written(folder: Path, to: str, **options: str) -> tuple[dict[str, Any], surgery.conversion.report.Report]:
    """The entry `optimizer` of what is written, and the report."""
    report = surgery.convert(SOURCE, folder / "out", to=to, optimizer=True, options=options)
    path = folder / "out" / MODEL if to == "megatron" else next((folder / "out").rglob("common.pt"))
    return trees(path)["optimizer"], report


@pytest.mark.parametrize("to", FORMS)
def test_a_runs_own_arguments_say_the_rate(to, tmp_path):
    """The scheduler takes a group's `max_lr` and `min_lr` before those of the arguments."""
    groups = written(tmp_path, to)[0]["optimizer"]["param_groups"]
    assert [(g.get("max_lr", 3e-4), g.get("min_lr", 3e-5)) for g in groups] == [(3e-4, 3e-5)] * 2
    assert all(g.get("default_config", False) for g in groups)  # or Megatron logs no rate


@pytest.mark.parametrize("to", FORMS)
def test_core_0_19_finds_its_groups_by_their_rates(to, tmp_path):
    entry, report = written(tmp_path, to, max_lr="3e-4", min_lr="3e-5")
    current = [{"wd_mult": decay, "lr_mult": 1.0, "is_decoupled_lr": False, "max_lr": 3e-4, "min_lr": 3e-5,
                "is_expert_parallel": False} for decay in (1.0, 0.0)]  # fmt: skip
    stored = [tuple(g.get(key) for key in KEYS) for g in entry["optimizer"]["param_groups"]]
    assert stored == [tuple(g.get(key) for key in KEYS) for g in current]
    assert not any("max_lr" in note for note in report.notes)
    assert any("-O max_lr" in note for note in written(tmp_path / "plain", to)[1].notes)
    with pytest.raises(UsageError, match="min_lr goes with"):
        written(tmp_path / "half", to, min_lr="3e-5")


def test_fused_adam_goes_on_as_the_source_would(tmp_path):
    """Updates are not counted anew, which would multiply the next ones: by 2.2 at betas of 0.9 and 0.95."""
    theirs, ours = (written(tmp_path / adam, "megatron", adam=adam)[0] for adam in ("torch", "fused"))
    results = []
    for tree, kind in ((theirs, torch.optim.AdamW), (ours, FusedAdam)):
        masters = [[torch.nn.Parameter(t.data.clone()) for t in group] for group in tree["fp32_from_fp16_params"]]
        optimizer = kind([{"params": group} for group in masters], lr=1.0)
        optimizer.load_state_dict(tree["optimizer"])
        results.append(steps([p for group in masters for p in group], optimizer))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_who_counts(tmp_path):
    """By default as the names of norms say; torch_dist says it once, for both, in a whole number."""
    for spec, counted in (("te", False), ("local", True)):
        entry, _ = written(tmp_path / spec, "megatron", spec=spec)
        assert all(("step" in state) == counted for state in entry["optimizer"]["state"].values())
        assert [g["step"] for g in entry["optimizer"]["param_groups"]] == [2, 2]
    found = [g["step"] for g in written(tmp_path, "megatron-dist")[0]["optimizer"]["param_groups"]]
    assert found == [2, 2] and all(type(step) is int for step in found)
