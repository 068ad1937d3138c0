"""Read a run's YAML, change it by --set, explain it, write it down.

    run, origins = read_run("run.yaml", ["train.micro_batch=4"])
    for line in explained(run, origins):
        print(line.key, line.value, line.origin, line.meaning)

Paths in the file are relative to its folder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from surgery.containers.text import YAML_LIMIT
from surgery.containers.yaml_loader import parse_yaml, yaml_lines
from surgery.data.strict import validated
from surgery.data.tokenizing.sources import is_url
from surgery.errors import ConfigError, UsageError, show
from surgery.midtraining.conventions import preset, put
from surgery.midtraining.settings import Run
from surgery.storage.address import is_address
from surgery.tensors.files import check_local, read_small

PATHS = ("model.path", "data.plan", "data.mixture", "data.recorded", "data.chat_template", "evaluation.task_data")


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
    full, origins = _completed(value, sets, os.path.basename(path))
    run = validated(full, Run, file=path, lines=yaml_lines(data))
    return located(run, Path(path).resolve().parent), origins


def default_run(sets: Sequence[str] = ()) -> tuple[Run, dict[str, str]]:
    """A run that says nothing but what has no default, by words in capitals; and where each other key comes from."""
    value = {"model": {"path": "MODEL"}, "data": {"plan": "PLAN"}, "output": "FOLDER"}
    full, origins = _completed(value, sets, "to be given")
    return validated(full, Run), origins


def _completed(value: dict[str, Any], sets: Sequence[str], who: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What a YAML says, changed by --set, over its convention; and who said each key."""
    said = dict.fromkeys(_leaves(value), who)
    for text in sets:
        key, given = apply_set(value, text)
        said |= dict.fromkeys(_leaves(given, key), "--set")
    full, origins = preset(value)
    return full, {key: f"convention {name}" for key, name in origins.items()} | said


def make_run(value: Mapping[str, Any], root: Path = Path()) -> Run:
    """The run that a mapping says, as a YAML file in `root` would.  Raises ConfigError."""
    return located(validated(preset(value)[0], Run), root.resolve())


def apply_set(value: dict[str, Any], text: str) -> tuple[str, Any]:
    """Do what `--set a.b=c` says; returns the key and its value.  Raises UsageError."""
    key, equals, given = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {show(text)}: write --set train.micro_batch=4")
    said = parse_yaml(given.encode(), "--set", "value")
    if not put(value, key, said):
        raise UsageError(f"--set {key}: {key.rpartition('.')[0]} is no section")
    return key, said


def located(run: Run, root: Path) -> Run:
    """The run with absolute paths; an optimizer that is a file, too.  Raises UsageError for an output at an address."""
    check_local(run.output)
    sections = {}
    for name in ("model", "data", "evaluation", "init"):
        section = getattr(run, name)
        fields = {k.partition(".")[2] for k in PATHS if k.startswith(name + ".")}
        if name == "init" and run.init.optimizer not in ("auto", "fresh"):
            fields = {"optimizer"}
        given = {f: _below(getattr(section, f), root) for f in fields if getattr(section, f)}
        sections[name] = section.model_copy(update=given)
    data, beside = sections["data"], root / (run.data.tokenizer or "")
    paths = [{"paths": tuple(_located(p, root) for p in source.paths)} for source in data.sources]
    sources = tuple(s.model_copy(update=given) for s, given in zip(data.sources, paths, strict=True))
    tokenizer = str(beside) if data.tokenizer and beside.exists() else data.tokenizer
    sections["data"] = data.model_copy(update={"sources": sources, "tokenizer": tokenizer})
    return run.model_copy(update={**sections, "output": str(root / run.output)})


def _below(path: str, root: Path) -> str:
    return path if is_address(path) else str(root / path)


def _located(path: str, root: Path) -> str:
    return path if is_url(path) else str(root / os.path.expanduser(path))


def explained(run: Run, origins: Mapping[str, str]) -> Iterator[Line]:
    """Every key of a run in its order; of a list of sections by number, from 0: export.0.to."""
    yield from _explained(run, "", origins)


def _explained(section: BaseModel, prefix: str, origins: Mapping[str, str]) -> Iterator[Line]:
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        key, value, meaning = prefix + name, getattr(section, name), field.description or ""
        sections = value if isinstance(value, tuple) and value and isinstance(value[0], BaseModel) else ()
        if isinstance(value, BaseModel) or sections:
            yield Line(key, None, "", meaning, section=True)
            for inner, place in [(value, key)] if not sections else zip(sections, _numbered(key), strict=False):
                yield from _explained(inner, f"{place}.", origins)
        else:
            among = {key, key.replace(".0.", ".")}  # a single section need not be a list
            origin = next((o for k, o in origins.items() if k in among or k.startswith(f"{key}.")), "")
            yield Line(key, plain[name], origin, meaning)


def _numbered(key: str) -> Iterator[str]:
    return (f"{key}.{number}" for number in itertools.count())


def _leaves(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all that is no mapping, and no list of mappings."""
    inner = value if isinstance(value, dict) else {}
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        inner = dict(enumerate(value))
    for name, each in inner.items():
        yield from _leaves(each, f"{prefix}.{name}" if prefix else str(name))
    if not inner:
        yield prefix
