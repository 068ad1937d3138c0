"""Runs that differ only in the order of their data, and their soup: is it better than the best of them?

    for seed in (42, 666, 42069):
        midtrain(seeded(run, seed))                    # run.output/seed-42, ...
    found = make_soup(run, (42, 666, 42069))           # run.output/soup, a model; run.output/soup.json
    found.kept, found.path                             # "soup", or the name of the ingredient that is better

All are compared on the held-out rows of the first run's plan, by the mean of the domains' losses; sources hold out the
same rows whatever the seed.  The link `kept` leads to the better model; the other one stays where it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import ConfigError, UsageError
from surgery.formats.topology import Topology
from surgery.merging.run import soup
from surgery.midtraining.evaluation.opened import open_for_evaluation
from surgery.midtraining.evaluation.run import Wanted, evaluate
from surgery.midtraining.run_folder import EXPORT, SOUP, read_folder
from surgery.midtraining.settings import Export, Run
from surgery.midtraining.sources import PLAN
from surgery.writing.atomic import write_json

KEPT, BLEND = "kept", "soup"
Losses = Mapping[str, Mapping[str, Any]]  # of each domain: loss, bpb, tokens, bytes


@dataclass(frozen=True)
class Found:
    """Losses of each ingredient and of the soup; `kept` is the name of the better, and `path` its folder."""

    ingredients: Mapping[str, Losses]
    soup: Losses
    kept: str
    path: Path

    def to_json(self) -> dict[str, Any]:
        """As `run_folder.py` describes soup.json."""
        told = [{"name": name, "heldout": losses} for name, losses in self.ingredients.items()]
        return {"ingredients": told, "soup": {"heldout": self.soup}, "kept": self.kept}


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "42,666" -> (42, 666).  Raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 19 for word in words) or len(set(words)) < len(words):
        raise UsageError(f"--seeds {text}: give different whole numbers, as 42,666,42069")
    return tuple(int(word) for word in words)


def sets_of(run: Run, seed: int) -> list[str]:
    """What --set says to make a run one of the ingredients.  Raises UsageError if its data have no seed."""
    if not run.data.mixture:
        what = "--seeds: the order of a plan or of a record is what it is"
        raise UsageError(what, hint="data: {mixture: mix.yaml}, of which each run makes its own plan")
    return [f"data.seed={seed}", f"output={_ingredient(run, seed)}"]


def _ingredient(run: Run, seed: int) -> Path:
    return Path(run.output) / f"seed-{seed}"


def make_soup(run: Run, seeds: Sequence[int], command: Sequence[str] = ()) -> Found:
    """Merge what the ingredients exported at their ends, and compare.

    Raises ConfigError if nothing was exported or held out, SurgeryError if the models cannot be merged.
    """
    folder, wanted = Path(run.output), _wanted(run)
    models = {place.name: _exported(place, wanted) for place in (_ingredient(run, seed) for seed in seeds)}
    recipe = {"merge_method": "linear",
              "models": [{"model": str(path), "parameters": {"weight": 1}} for path in models.values()]}  # fmt: skip
    sizes = Topology(tp=wanted.tp, pp=wanted.pp, ep=wanted.ep)
    soup(recipe, folder / BLEND, to=wanted.to, topology=sizes, options=wanted.options, command=command, force=True)
    plan = str(_ingredient(run, seeds[0]) / PLAN)
    losses = {name: _losses(path, plan, run) for name, path in {**models, BLEND: folder / BLEND}.items()}
    best = min(losses, key=lambda name: (mean(losses[name]), name != BLEND))
    blend = losses.pop(BLEND)
    found = Found(losses, blend, best, folder / BLEND if best == BLEND else models[best])
    write_json(folder / SOUP, found.to_json())
    _point(folder / KEPT, found.path)
    return found


def _wanted(run: Run) -> Export:
    """The export whose models are merged: of Hugging Face's format, if there is one."""
    if not run.export:
        raise ConfigError("export: a soup is made of what the runs export, and they export nothing", hint="export: hf")
    return next((each for each in run.export if each.to == "hf"), run.export[0])


def _exported(place: Path, wanted: Export) -> Path:
    done = read_folder(place)
    path = place / EXPORT / f"step{done.step:09d}-{wanted.to}"
    if done.status != "finished" or not path.is_dir():
        raise ConfigError(f"is {done.status}, and has exported no {path.name}", file=place)
    return path


def _losses(model: Path, plan: str, run: Run) -> Losses:
    """On the held-out rows.  Raises ConfigError if there are none."""
    if not run.evaluation.rows:
        raise ConfigError("evaluation.rows: 0 leaves nothing to compare a soup on", hint="evaluation: {rows: 64}")
    device = None if run.device == "auto" else run.device
    opened = open_for_evaluation(model, device=device)
    found: Losses = evaluate(opened, Wanted(data=[plan], limit=run.evaluation.rows))[0]["heldout"]
    return found


def mean(losses: Losses) -> float:
    """Nats per token, of the domains alike."""
    return float(sum(each["loss"] for each in losses.values())) / len(losses)


def _point(link: Path, path: Path) -> None:
    """Let the link lead there, in one step."""
    fresh = link.with_name(f".{link.name}.partial")
    with suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(os.path.relpath(path, link.parent))
    os.replace(fresh, link)
