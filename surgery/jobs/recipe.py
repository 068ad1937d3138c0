"""A recipe: a whole run as one strict YAML, whose steps are commands with named inputs and outputs.

inputs: {model: SmolLM2-135M}                           # files and folders from elsewhere, relative to the recipe,
                                                        # or addresses
vars:   {tp: 3}
steps:
  meta: {surgery: convert $model $out --to meta --tp $tp}
  back: {surgery: convert $meta $out --to hf}           # $meta is what the step `meta` makes
  same: {surgery: verify $model $back}
small:  {inputs: {model: tiny}, vars: {tp: 1}}          # what --small changes

recipe = read_recipe("recipe.yaml", sets=["tp=2"])      # ConfigError with every key that is wrong
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.containers import hub
from surgery.containers.text import YAML_LIMIT
from surgery.containers.yaml_loader import parse_yaml, yaml_lines
from surgery.errors import ConfigError, FileError, UsageError, show, suggest
from surgery.jobs.problems import Problems
from surgery.jobs.spec import Input, StepSpec, check_name, mapping, named, read_input, read_step
from surgery.settings import Checked, keywords, make, setting
from surgery.storage.address import is_address
from surgery.tensors.files import check_local, read_small

SNAPSHOT = "steps/recipe.yaml"  # in a run's folder: the recipe as it was launched
Lines = Mapping[tuple[str | int, ...], int]


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """All of a recipe, without `small`; paths of inputs and scripts are absolute, and so is the folder."""

    about: str = setting("", "What it is, in a few sentences.")
    folder: str = setting("", "Where outputs go. [default: runs/NAME]")
    inputs: Mapping[str, Input] = named("Files and folders from elsewhere: {NAME: PATH}.")
    vars: Mapping[str, Any] = named("Values, which may mention those before them: {NAME: VALUE}.")
    resources: Mapping[str, Any] = named("What the job of every step asks of a cluster.")
    steps: Mapping[str, StepSpec] = named("{NAME: STEP}.")


def read_recipe(
    path: str | os.PathLike[str], *, sets: Sequence[str] = (), small: bool = False, folder: str | None = None
) -> Recipe:
    """The recipe in a file, changed by `small` and by --set, with its paths found.

    folder   of the run; else the recipe's `folder`, else runs/NAME, with -small if it is: below the working folder

    `path` may be the folder of a run that was launched: the recipe is then as it was.  Raises FileError if the file is
    no YAML, UsageError for a --set that is none and a folder at an address, ConfigError with everything that is wrong.
    """
    path = Path(path)
    path = path / SNAPSHOT if path.is_dir() else path
    data = read_small(path, YAML_LIMIT, "recipe")
    value = parse_yaml(data, os.fspath(path), "recipe")
    if not isinstance(value, dict):
        raise ConfigError(f"the recipe holds {show(value)}, not keys and values", file=path)
    value = _on_its_base(value, path)
    over = value.pop("small", None)
    if not isinstance(over, dict | None):
        raise ConfigError(f"small is {show(over)}, not keys and values", file=path)
    if small and over is None:
        raise UsageError(f"{path} has no small twin", hint="leave out --small, or write what it changes under `small:`")
    merged = laid_over(value, over or {}) if small else value
    recipe = with_sets(located(parsed(merged, path, yaml_lines(data)), path.resolve().parent), sets)
    given = folder or recipe.folder or os.path.join("runs", path.stem)
    check_local(given)
    return replace(recipe, folder=os.path.abspath(given + ("-small" if small and not folder else "")))


def _on_its_base(value: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A recipe laid over the one that it names as its `base`, which lies in the same folder and has none itself."""
    own = dict(value)
    name = own.pop("base", None)
    if name is None:
        return own
    if not isinstance(name, str) or os.path.basename(name) != name:
        raise ConfigError(f"base is {show(name)}, not the name of a recipe in the same folder", file=path)
    file = path.with_name(name)
    below = parse_yaml(read_small(file, YAML_LIMIT, "recipe"), os.fspath(file), "recipe")
    if not isinstance(below, dict) or "base" in below:
        raise ConfigError("cannot be the base of a recipe: it has a base itself, or no keys", file=file)
    return laid_over(below, own)


def parsed(value: Mapping[str, Any], file: str | os.PathLike[str] | None = None, lines: Lines | None = None) -> Recipe:
    """The recipe that keys and values say.  Raises ConfigError with everything that is wrong, and its lines."""
    problems, at = Problems(file), lines or {}
    given: dict[str, Any] = {}
    for key, one in value.items():
        with problems.at("", at.get((key,))):
            given |= keywords(Recipe, {key: one})
    read: dict[str, Callable[[Any], Any]] = {"inputs": read_input, "steps": read_step, "vars": lambda one: one}
    for part, reader in read.items():
        found: dict[str, Any] = {}
        with problems.at("", at.get((part,))):
            found = mapping(part, given.get(part) or {})
        made = {}
        for name, one in found.items():
            with problems.at(f"{part.removesuffix('s')} {name}", at.get((part, name))):
                made[check_name(name)] = reader(one)
        given[part] = made
    with problems.at("resources", at.get(("resources",))):
        given["resources"] = mapping("resources", given.get("resources") or {})
    problems.check()
    with problems.at(""):
        _each_name_once(given)
    problems.check()
    return make(Recipe, given)


def _each_name_once(given: Mapping[str, Any]) -> None:
    if not given["steps"]:
        raise ConfigError("there are no steps")
    seen: dict[str, str] = {}
    for kind, part in (("an input", "inputs"), ("a variable", "vars"), ("a step", "steps")):
        for name in given[part]:
            if name in seen:
                raise ConfigError(f"{name} is both {seen[name]} and {kind}")
            seen[name] = kind


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `over` changes: mappings are merged, null removes a key, everything else replaces it."""
    out = dict(base)
    for key, value in over.items():
        before = out.get(key)
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(before, dict):
            out[key] = laid_over(before, value)
        else:
            out[key] = value
    return out


def located(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with absolute paths of all inputs and scripts, which are relative to its folder."""
    steps = {}
    for name, step in recipe.steps.items():
        python = (str(root / step.python[0]), *step.python[1:]) if step.python else None
        steps[name] = replace(step, inputs=_found(step.inputs, root), python=python)
    return replace(recipe, inputs=_found(recipe.inputs, root), steps=steps)


def _found(inputs: Mapping[str, Input], root: Path) -> dict[str, Input]:
    return {name: replace(one, path=_path(one.path, root)) for name, one in inputs.items()}


def _path(text: str, root: Path) -> str:
    """A path as it is meant; a name on the hub that is in the local cache is a path there, an address is none."""
    if is_address(text):
        return text
    path = os.path.normpath(root / os.path.expanduser(text))
    if not os.path.exists(path) and hub.is_name(text):
        with suppress(FileError):
            return str(hub.cached(text))
    return path


def with_sets(recipe: Recipe, sets: Sequence[str]) -> Recipe:
    """Do what `--set NAME=VALUE` says: of a variable, of an input, or of a step, whose output is then taken from there.

    Paths are relative to the working folder.  Raises UsageError.
    """
    inputs, values, steps = dict(recipe.inputs), dict(recipe.vars), dict(recipe.steps)
    for text in sets:
        name, equals, given = text.partition("=")
        if not equals:
            raise UsageError(f"--set {show(text)}: write --set NAME=VALUE")
        if name in values:
            values[name] = parse_yaml(given.encode(), "--set", "value")
        elif name in inputs or name in steps:
            steps.pop(name, None)
            inputs[name] = Input(path=_path(given, Path.cwd()))
        else:
            known = [*values, *inputs, *steps]
            raise UsageError(f"--set {name}: the recipe has no such name", hint=suggest(name, known, "it has"))
    if not steps:
        raise UsageError("--set leaves no step to run")
    return replace(recipe, inputs=inputs, vars=values, steps=steps)
