"""Read a run's YAML, change it by --set, explain it, write it down.

    run, origins = read_run("run.yaml", ["train.micro_batch=4"])
    for line in explained(run, origins):
        print(line.key, line.value, line.origin, line.meaning)

Paths in the file are relative to its folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from surgery.containers.text import YAML_LIMIT
from surgery.containers.yaml_loader import parse_yaml, yaml_lines
from surgery.data.strict import validated
from surgery.errors import ConfigError, UsageError, show
from surgery.midtraining.conventions import preset, put
from surgery.midtraining.settings import Run
from surgery.tensors.files import read_small

PATHS = ("model.path", "data.plan", "data.mixture", "data.recorded", "evaluation.task_data")


@dataclass(frozen=True)
class Line:
    """A key of a run: its value, who said so ("" for a default), and what it means.  A section has no value."""

    key: str
    value: Any
    origin: str
    meaning: str
    section: bool = False


def read_run(path: str | os.PathLike[str], sets: Sequence[str] = ()) -> tuple[Run, dict[str, str]]:
    """The run that a YAML file and --set say, and where each key that is no default comes from.

    Raises FileError if the file is no YAML, UsageError for a --set that is none, ConfigError with every key that is
    wrong.
    """
    data = read_small(path, YAML_LIMIT, "run")
    value = parse_yaml(data, os.fspath(path), "run")
    if not isinstance(value, dict):
        raise ConfigError(f"the run holds {show(value)}, not keys and values", file=path)
    changed = [apply_set(value, text) for text in sets]
    full, origins = preset(value)
    origins = {key: f"convention {name}" for key, name in origins.items()}
    origins |= {key: os.path.basename(path) for key in _leaves(value)} | dict.fromkeys(changed, "--set")
    run = validated(full, Run, file=path, lines=yaml_lines(data))
    return located(run, Path(path).resolve().parent), origins


def make_run(value: Mapping[str, Any], root: Path = Path()) -> Run:
    """The run that a mapping says, as a YAML file in `root` would.  Raises ConfigError."""
    return located(validated(preset(value)[0], Run), root.resolve())


def apply_set(value: dict[str, Any], text: str) -> str:
    """Do what `--set a.b=c` says and return the key.  Raises UsageError."""
    key, equals, given = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {show(text)}: write --set train.micro_batch=4")
    if not put(value, key, parse_yaml(given.encode(), "--set", "value")):
        raise UsageError(f"--set {key}: {key.rpartition('.')[0]} is no section")
    return key


def located(run: Run, root: Path) -> Run:
    """The run with absolute paths; an optimizer that is a file, too."""
    sections = {}
    for name in ("model", "data", "evaluation", "init"):
        section = getattr(run, name)
        fields = {k.partition(".")[2] for k in PATHS if k.startswith(name + ".")}
        if name == "init" and run.init.optimizer not in ("auto", "fresh"):
            fields = {"optimizer"}
        given = {f: str(root / getattr(section, f)) for f in fields if getattr(section, f)}
        sections[name] = section.model_copy(update=given)
    return run.model_copy(update={**sections, "output": str(root / run.output)})


def explained(run: Run, origins: Mapping[str, str]) -> Iterator[Line]:
    """Every key of a run in its order."""
    yield from _explained(run, "", origins)


def _explained(section: BaseModel, prefix: str, origins: Mapping[str, str]) -> Iterator[Line]:
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        key, value = prefix + name, getattr(section, name)
        if isinstance(value, BaseModel):
            yield Line(key, None, "", field.description or "", section=True)
            yield from _explained(value, key + ".", origins)
        else:
            origin = next((o for k, o in origins.items() if k == key or k.startswith(key + ".")), "")
            yield Line(key, plain[name], origin, field.description or "")


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
