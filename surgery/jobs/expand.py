"""From the YAML of a recipe to what its names mean: variables, inputs, the runs of each step and what they make.

runs_of("train", spec, scope, root)         # [Run("train-42", {"seed": 42}, ...), Run("train-666", ...)]
makers(runs)["train"]                       # Several: what `$train` means where no seed is said
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import ConfigError, show
from surgery.jobs import names as refs
from surgery.jobs.names import Names, Several, Thing, Where
from surgery.jobs.recipe import Recipe
from surgery.jobs.spec import Input, StepSpec
from surgery.jobs.step import absolute
from surgery.storage.address import is_address
from surgery.storage.listing import matching
from surgery.storage.store import Entry
from surgery.tensors.files import check_local

FOLDER = "steps"  # of a run's folder: records, logs, configs and batch scripts of its steps
OUT = "out"
ID = re.compile(r"[\w.-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class Run:
    """One run of a step, and what it makes."""

    id: str
    name: str
    where: Where
    spec: StepSpec
    outputs: dict[str, Thing]


def variables(recipe: Recipe) -> dict[str, Any]:
    """Variables, which may mention those before them, and the run's folder."""
    scope: dict[str, Any] = {"folder": Thing("folder", Path(recipe.folder))}
    for name, template in recipe.vars.items():
        scope[name] = refs.value(template, scope, absolute)
    return scope


def input_of(name: str, one: Input) -> Thing | Several:
    """A file or folder, or the files of a pattern.  That one is missing is seen when its step is to run."""
    path = Path(one.path)
    if not set(path.name) & set("*?["):
        return Thing(name, path, check=one.check)
    found: Mapping[str, Entry | None]
    found = matching(one.path) if is_address(one.path) else dict.fromkeys(sorted(glob.glob(one.path)))
    if not found:
        raise ConfigError(f"no file fits {one.path}")
    things = [Thing(f"{name}/{Path(p).name}", Path(p), check=one.check, entry=entry) for p, entry in found.items()]
    return Several(tuple(({f"#{name}": i}, thing) for i, thing in enumerate(things)))


def runs_of(name: str, spec: StepSpec, scope: Names, root: Path) -> list[Run]:
    """The runs of a step: one for every combination of the values of its matrix."""
    values = {key: refs.value(template, scope, absolute) for key, template in spec.matrix.items()}
    for key, several in values.items():
        if not isinstance(several, list) or not several or any(isinstance(v, list | dict) for v in several):
            raise ConfigError(f"matrix: {key} is {show(several)}, not a list of values")
        if key in scope:
            raise ConfigError(f"matrix: {key} is the name of something else, too")
    combinations = itertools.product(*values.values())
    return [_run(name, dict(zip(values, chosen, strict=True)), spec, scope, root) for chosen in combinations]


def _run(name: str, where: Where, spec: StepSpec, scope: Names, root: Path) -> Run:
    label = "-".join([name, *map(refs.as_text, where.values())])
    if not ID.fullmatch(label):
        raise ConfigError(f"matrix: {show(label)} cannot be the name of a run: letters, digits, '.', '_' and '-'")
    own = {**refs.bound(scope, where), "step": label}
    outputs = {}
    for out, template in _paths(spec).items():
        text = refs.text(template, own, absolute)
        check_local(text)
        path = Path(os.path.normpath(root / text))
        if root not in path.parents or path.is_relative_to(root / FOLDER):
            raise ConfigError(f"output {out}: {path} does not lie in the run's folder {root}, outside of {FOLDER}/")
        outputs[out] = Thing(label if out == OUT else f"{label}.{out}", path, maker=label)
    return Run(label, name, where, spec, outputs)


def _paths(spec: StepSpec) -> dict[str, str]:
    """The outputs, as their paths are written; `out` is there if it is mentioned, or is what the command prints."""
    if spec.stdout is not None:
        return {OUT: spec.stdout, **spec.outputs}
    mentions_out = OUT in refs.mentioned(list(spec.templates))
    return {OUT: "$step", **spec.outputs} if mentions_out else dict(spec.outputs)


def makers(runs: Sequence[Run]) -> dict[str, Any]:
    """What `$train`, `${train.hf}`, `${train-42}` and `${train-42.hf}` mean, for the runs of one step.

    An output that is the only one needs no name.
    """
    scope: dict[str, Any] = {}
    for out in {out: None for run in runs for out in run.outputs}:
        endings = {f".{out}", *([""] if out == OUT or len(runs[0].outputs) == 1 else [])}
        for ending in endings:
            scope |= {f"{run.id}{ending}": run.outputs[out] for run in runs}
            scope[f"{runs[0].name}{ending}"] = Several(tuple((run.where, run.outputs[out]) for run in runs)).at({})
    return scope
