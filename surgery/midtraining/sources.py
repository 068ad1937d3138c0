"""Where the rows of a run come from: a plan, a mixture that is planned now, or another trainer's record.

batches = open_batches(run)          # offers what data/rows.py calls a RowSource
"""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

from surgery.data.plans.batches import Batches
from surgery.data.plans.draft import draft_of
from surgery.data.plans.mixture import Mixture, read_mixture
from surgery.data.plans.plan import Plan, open_plan, write_plan
from surgery.data.rows import RowSource
from surgery.data.tokenizing.sources import is_url
from surgery.data.trainers.recorded import RecordedBatches
from surgery.errors import ConfigError
from surgery.midtraining.course import rows_per_unit
from surgery.midtraining.dialogue import NOTES, mixture_of, pairs_of, still_holds
from surgery.midtraining.settings import Run
from surgery.storage.address import is_address
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
        found: list[str] = json.loads((Path(run.output) / NOTES).read_text())["notes"]
        return found
    return list(batches.plan.file.notes) if run.data.kind == "sft" and isinstance(batches, Batches) else []


def _of_plan(run: Run) -> RowSource:
    plan = open_plan(run.data.plan) if run.data.plan else _planned(run)
    return Batches(plan, rows_per_unit(run.train, plan.mixture.sequence_length))


def _planned(run: Run) -> Plan:
    """The plan of the mixture, made the first time and found again by a run that goes on.

    Raises ConfigError if the mixture is another one now, and the run has checkpoints.
    """
    place = Path(run.output) / PLAN
    if place.is_dir() and _gone(run):
        return open_plan(place)
    mixture, root = _mixture(run)
    if place.is_dir():
        plan = open_plan(place)
        if still_holds(run, plan.mixture.model_dump(mode="json"), mixture.model_dump(mode="json"), "the mixture"):
            return plan
    return write_plan(draft_of(mixture, root), place, force=True)


def _gone(run: Run) -> bool:
    """Whether a file is missing by which a plan was made: one that is there then goes unquestioned."""
    named = [run.data.mixture] if run.data.mixture else [path for source in run.data.sources for path in source.paths]
    return not all(is_address(path) or is_url(path) or os.path.exists(path) or glob.glob(path) for path in named)


def _mixture(run: Run) -> tuple[Mixture, Path]:
    """What is to be planned, and the folder that its paths start from."""
    if run.data.kind == "sft":
        return mixture_of(run), Path(run.output).parent
    assert run.data.mixture
    mixture = read_mixture(run.data.mixture)
    seed = mixture.seed if run.data.seed is None else run.data.seed
    return mixture.model_copy(update={"seed": seed}), Path(os.path.abspath(run.data.mixture)).parent


def _recorded(run: Run, path: str | Path) -> RowSource:
    batches = RecordedBatches(here(path))
    unit = batches.rows_per_step * batches.sequence_length
    if odd := [n for n in (run.train.batch_tokens or {}).values() if n % unit]:
        raise ConfigError(f"train.batch_tokens: {odd[0]:,}, but a recorded batch has {unit:,} tokens")
    return batches
