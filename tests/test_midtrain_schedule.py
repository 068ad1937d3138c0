"""Learning rates against what other programs used, and the promise that no step of ours is wasted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from surgery.midtraining.schedule import Schedule

GOLDEN = json.loads((Path(__file__).parent / "golden" / "training" / "megatron_lr.json").read_text())
START, LEFT, BATCH = 1_859_665, 6_652, 1_024  # iterations done before, and to go


def megatron(settings: dict, offset: int = 0, increment: int = 1) -> Schedule:
    """What Megatron's arguments are in our words; it counts samples, here they are iterations."""
    style = settings["lr_decay_style"]
    steps, warmup = (settings[k] / increment for k in ("lr_decay_steps", "lr_warmup_steps"))
    shape = {"inverse-square-root": "inverse_sqrt", "WSD": settings.get("lr_wsd_decay_style")}.get(style, style)
    decays = {"WSD": settings.get("wsd_decay_steps"), "inverse-square-root": 0, "constant": 0}
    return Schedule(
        peak=settings["max_lr"], steps=int(steps), warmup=int(warmup), start=settings["init_lr"],
        decay=int(decays.get(style, steps - warmup)), shape=shape.replace("minus_sqrt", "sqrt"),
        final=settings["min_lr"], count_warmup_from=0, count_decay_from=0, offset=offset // increment,
    )  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN["curves"])
def test_rates_are_those_of_megatron(name):
    case = GOLDEN["curves"][name]
    schedule = megatron(case["settings"], case.get("loaded", {}).get("num_steps", 0), case["increment"])
    assert [schedule(i + 1) for i in range(len(case["lr"]))] == pytest.approx(case["lr"], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", [n for n, c in GOLDEN["reload"].items() if "lr" in c])
def test_a_reloaded_counter_does_what_it_does_to_megatron(name):
    case = GOLDEN["reload"][name]
    from_file = case["settings"]["use_checkpoint_opt_param_scheduler"]  # then the file's settings replace the arguments
    told = {**case["settings"], **(case["loaded"] if from_file else {})}
    schedule = megatron(told, case["loaded"]["num_steps"], BATCH)
    assert schedule.offset == START
    assert [schedule(i + 1) for i in case["picks"]] == pytest.approx(case["lr"], rel=1e-9, abs=1e-15)


def test_a_phase_of_ours_counts_from_its_own_start():
    """The settings of a run that annealed nothing, for its counter was loaded: here they anneal."""
    schedule = Schedule(peak=3e-5, steps=LEFT, decay=LEFT)
    assert schedule(1) == 3e-5
    assert schedule(LEFT) == pytest.approx(3e-5 / LEFT)
    assert schedule.idle(LEFT) == []
    assert not schedule.ended
    assert Schedule(peak=3e-5, steps=LEFT, decay=LEFT, offset=START).ended
    assert len(Schedule(peak=3e-5, steps=LEFT, decay=LEFT, offset=START).idle(LEFT)) == LEFT


def test_steps_without_effect_are_those_of_the_conventions():
    wanted = {(1, 0): [], (1, 1): [20], (0, 0): [1]}
    found = {
        (w, d): Schedule(1.0, 20, warmup=4, decay=16, count_warmup_from=w, count_decay_from=d).idle(20)
        for w, d in wanted
    }
    assert found == wanted


@pytest.mark.parametrize(("kind", "more"), [("linear", {}), ("cosine", {}), ("warmup_stable_decay", {"decay": 7}),
                                            ("constant_with_warmup", {"decay": 0}), ("inverse_sqrt", {})])  # fmt: skip
def test_rates_are_those_of_transformers(kind, more):
    from transformers import get_scheduler

    steps, warmup = 31, 5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    special = {"num_decay_steps": 7} if more.get("decay") else None
    theirs = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=special)
    shape = {"cosine": "cosine", "warmup_stable_decay": "cosine", "inverse_sqrt": "inverse_sqrt"}.get(kind, "linear")
    ours = Schedule(0.3, steps, warmup, decay=more.get("decay", steps - warmup), shape=shape, count_warmup_from=0)
    for step in range(1, steps + 1):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15), step
        optimizer.step()
        theirs.step()


def test_a_decay_by_the_square_root():
    schedule = Schedule(peak=1.0, steps=100, decay=25, shape="sqrt", final=0.1, count_decay_from=1)
    assert [schedule(s) for s in (1, 74, 75)] == [1.0, 1.0, 1.0]
    assert [schedule(s) for s in (84, 100)] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(9 / 25)), 0.1])
