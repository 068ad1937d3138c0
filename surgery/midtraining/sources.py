"""Where the rows of a run come from: a plan, a mixture that is planned now, or another trainer's record.

batches = open_batches(run)          # offers what data/rows.py calls a RowSource
"""

from __future__ import annotations

import json
from pathlib import Path

from surgery.data.plans.batches import Batches
from surgery.data.plans.draft import draft_plan
from surgery.data.plans.plan import Plan, open_plan, write_plan
from surgery.data.rows import RowSource
from surgery.data.trainers.recorded import RecordedBatches
from surgery.errors import ConfigError
from surgery.midtraining.course import rows_per_unit
from surgery.midtraining.dialogue import NOTES, draft_conversations, pairs_of
from surgery.midtraining.settings import Run
from surgery.storage.copies import here

PLAN = "plan"  # in the run's folder


def open_batches(run: Run) -> RowSource:
    """Raises SurgeryError if the data are not what the settings say."""
    record = pairs_of(run) if run.data.kind == "dpo" else run.data.recorded
    batches = _recorded(run, record) if record else _of_plan(run)
    if (getattr(batches, "group", 1) == 2) != (run.objective.name == "dpo"):
        what = "the data are pairs of completions, and" if run.objective.name != "dpo" else "the data are no pairs, but"
        raise ConfigError(f"{what} the objective is {run.objective.name}", hint="objective: dpo goes with pairs")
    return batches


def said_of(run: Run, batches: RowSource) -> list[str]:
    """What was left out of the data of fine-tuning."""
    if run.data.kind == "dpo":
        found: list[str] = json.loads((Path(run.output) / NOTES).read_text())
        return found
    return list(batches.plan.file.notes) if run.data.kind == "sft" and isinstance(batches, Batches) else []


def _of_plan(run: Run) -> RowSource:
    plan = open_plan(run.data.plan) if run.data.plan else _planned(run)
    return Batches(plan, rows_per_unit(run.train, plan.mixture.sequence_length))


def _planned(run: Run) -> Plan:
    """The plan of the mixture, made the first time and found again by a run that goes on."""
    place = Path(run.output) / PLAN
    if place.is_dir():
        return open_plan(place)
    if run.data.kind == "sft":
        return write_plan(draft_conversations(run), place)
    assert run.data.mixture
    return write_plan(draft_plan(run.data.mixture, seed=run.data.seed), place)


def _recorded(run: Run, path: str | Path) -> RowSource:
    batches = RecordedBatches(here(path))
    unit = batches.rows_per_step * batches.sequence_length
    if odd := [n for n in (run.train.batch_tokens or {}).values() if n % unit]:
        raise ConfigError(f"train.batch_tokens: {odd[0]:,}, but a recorded batch has {unit:,} tokens")
    return batches
