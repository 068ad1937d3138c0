"""The steps of a recipe in an order in which they can be run.

    for step in graph_of(recipe):
        print(step.id, step.needs, shlex.join(step.command(near)))

What a step reads, and so which steps come before it, follows from the names in its command and its config.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.errors import ConfigError, some, suggest
from surgery.jobs import expand
from surgery.jobs import names as refs
from surgery.jobs.expand import FOLDER, Run
from surgery.jobs.names import Names, Thing
from surgery.jobs.problems import Problems
from surgery.jobs.recipe import Recipe
from surgery.jobs.spec import read_resources
from surgery.jobs.step import Step, absolute


def graph_of(recipe: Recipe, file: str | None = None) -> tuple[Step, ...]:
    """Every run of every step.  Raises ConfigError with everything that is wrong."""
    problems, root = Problems(file), Path(recipe.folder)
    scope: dict[str, Any] = {}
    with problems.at("vars"):
        scope |= expand.variables(recipe)
    for name, one in recipe.inputs.items():
        with problems.at(f"input {name}"):
            scope[name] = expand.input_of(name, one)
    problems.check()
    runs: list[Run] = []
    for name, spec in recipe.steps.items():
        with problems.at(f"step {name}"):
            runs += expand.runs_of(name, spec, scope, root)
    problems.check()
    for name in recipe.steps:
        scope |= expand.makers([run for run in runs if run.name == name])
    steps = []
    inputs: dict[str, Names] = {}  # of each step, looked for once for all its runs
    for run in runs:
        with problems.at(f"step {run.name}"):
            if run.name not in inputs:
                inputs[run.name] = {name: expand.input_of(name, one) for name, one in run.spec.inputs.items()}
            steps.append(_step(run, runs, inputs[run.name], recipe, scope))
    problems.check()
    with problems.at("outputs"):
        _check_outputs(steps)
    problems.check()
    return in_order(steps)


def _step(run: Run, runs: Sequence[Run], inputs: Names, recipe: Recipe, scope: Names) -> Step:
    files, spec, extra = Path(recipe.folder) / FOLDER, run.spec, dict(inputs)
    if spec.config is not None:
        extra["config"] = Thing("config", files / f"{run.id}.yaml", maker=run.id)
    if spec.python:
        script = Path(spec.python[0])
        extra["script"] = Thing(script.name, script)
    outside = refs.bound(scope, run.where)
    if twice := sorted({*extra, *run.outputs} & {*outside}):
        raise ConfigError(f"{some(twice)} is the name of something else, too")
    own = {**outside, **extra, **run.outputs, "step": run.id}
    resources = read_resources(refs.value({**recipe.resources, **spec.resources}, own, absolute))
    env = {name: refs.text(refs.as_text(value), own, absolute) for name, value in spec.env.items()}
    step = Step(run.id, run.name, run.where, spec, own, (), run.outputs, (), resources, files, env)
    reads = _read(step, extra)
    before = [t.maker for t in reads if t.maker] + [r.id for r in _after(run, runs)]
    _check_words(step)
    return replace(step, inputs=reads, needs=tuple(dict.fromkeys(before)))


def _read(step: Step, extra: Mapping[str, Any]) -> tuple[Thing, ...]:
    """All that is mentioned in a step and that it does not make."""
    found: dict[str, Thing] = {}

    def note(thing: Thing) -> str:
        found.setdefault(thing.label, thing)
        return absolute(thing)

    step.command(note)
    step.config(note)
    refs.words([*(f"${name}" for name in extra), *map(refs.as_text, step.spec.env.values())], step.names, note)
    refs.text(step.spec.about, step.names, note)
    return tuple(t for t in found.values() if t.maker != step.id and t.label != "folder")


def _after(run: Run, runs: Sequence[Run]) -> Iterator[Run]:
    """The runs of the steps that `after` names which have the same values, where both have a variable."""
    for name in run.spec.after:
        if name not in {other.name for other in runs}:
            raise ConfigError(f"after: there is no step {name}", hint=suggest(name, {r.name for r in runs}, "steps"))
        for other in runs:
            if other.name == name and all(run.where[k] == v for k, v in other.where.items() if k in run.where):
                yield other


def _check_words(step: Step) -> None:
    """Raise ConfigError if a command names a file that is no input: its changes would not be seen."""
    for word in (word.partition("=")[2] or word for word in step.spec.line):
        if "$" not in word and ("/" in word or "." in word) and os.path.exists(word):
            what = f"{word} is a file and no input, so its changes would not be seen"
            raise ConfigError(what, hint=f"name it, `inputs: {{NAME: {word}}}`, and write $NAME")


def _check_outputs(steps: Sequence[Step]) -> None:
    """Raise ConfigError if two steps would write the same, or one into the other."""
    owners = {thing.path: step.id for step in steps for thing in step.outputs.values()}
    count = Counter(thing.path for step in steps for thing in step.outputs.values())
    if twice := [path for path, n in count.items() if n > 1]:
        both = sorted({s.id for s in steps for t in s.outputs.values() if t.path == twice[0]})
        raise ConfigError(f"{twice[0]} would be made by {some(both)}", hint="let its path mention $step")
    for path, owner in owners.items():
        if inside := next((p for p in path.parents if p in owners), None):
            raise ConfigError(f"what {owner} makes lies in what {owners[inside]} makes: {path}")


def in_order(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Those that come before others first, otherwise as they are.  Raises ConfigError if they wait for each other."""
    out: dict[str, Step] = {}
    left = {step.id: step for step in steps}
    while left:
        ready = next((s for s in left.values() if all(n in out for n in s.needs)), None)
        if ready is None:
            raise ConfigError(f"these steps wait for each other: {' -> '.join(_cycle(left))}")
        out[ready.id] = left.pop(ready.id)
    return tuple(out.values())


def _cycle(left: Mapping[str, Step]) -> list[str]:
    """Ids of steps each of which needs the next one, and the last the first."""
    path = [next(iter(left))]
    while path.count(path[-1]) < 2:
        path.append(next(n for n in left[path[-1]].needs if n in left))
    return path[path.index(path[-1]) :]
