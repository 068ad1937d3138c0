"""YAML files as pydantic models: whatever is unknown, misspelt or impossible is named with its line, all at once.

class Settings(Strict):
    steps: int

read_model("run.yaml", Settings, "settings")
# ConfigError: run.yaml: line 3: key 'stpes' is not known; did you mean 'steps'?
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from surgery import units
from surgery.containers.text import YAML_LIMIT
from surgery.containers.yaml_loader import parse_yaml, yaml_lines
from surgery.errors import ConfigError, UsageError, show
from surgery.tensors.files import read_small

Model = TypeVar("Model", bound="Strict")
Place = tuple[str | int, ...]
_BRANCH = re.compile(r"[\w-]+\[")  # of a union that was tried: pydantic names it like a key


class Strict(BaseModel):
    """No unknown keys, no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def parse_count(value: Any) -> Any:
    """5_000, 50e9, "50B": a whole number."""
    if isinstance(value, str):
        try:
            return units.parse_count(value)
        except UsageError as error:
            raise ValueError(f"{error.what}: {error.hint}") from None
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(parse_count)]
Real = Annotated[float, BeforeValidator(lambda value: float(value) if type(value) is int else value)]


def read_model(path: str | os.PathLike[str], model: type[Model], what: str) -> Model:
    """The content of a YAML file.  Raises FileError if it is no YAML, ConfigError with every key that is wrong."""
    data = read_small(path, YAML_LIMIT, what)
    value = parse_yaml(data, os.fspath(path), what)
    if not isinstance(value, dict):
        raise ConfigError(f"{what} holds {show(value)}, not keys and values", file=path)
    return validated(value, model, file=path, lines=yaml_lines(data))


def validated(
    value: dict[str, Any],
    model: type[Model],
    *,
    file: str | os.PathLike[str] | None = None,
    lines: Mapping[Place, int] | None = None,
) -> Model:
    """The model that keys and values say; `lines` are where they stand.  Raises ConfigError with all that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        problems = dict.fromkeys(_problem(e, model, lines or {}) for e in found)
        raise ConfigError("\n  ".join(problems), file=file) from None


def _problem(error: Any, model: type[BaseModel], lines: Mapping[Place, int]) -> str:
    path: Place = tuple(error["loc"])
    while path and path not in lines:
        path = path[:-1]
    where = ".".join(str(step) for step in error["loc"] if not _BRANCH.match(str(step))) or "the file"
    if error["type"] == "extra_forbidden":
        key = error["loc"][-1]
        near = difflib.get_close_matches(str(key), _keys(model, error["loc"][:-1]), 1)
        says = f"key {show(key)} is not known" + (f"; did you mean {near[0]!r}?" if near else "")
    elif error["type"] == "missing":
        says = f"{where} is missing"
    elif error["type"] == "value_error":
        says = f"{where}: {error['msg'].removeprefix('Value error, ')}"
    else:
        message = error["msg"].replace("valid tuple", "list").replace("valid dictionary", "mapping of keys to values")
        says = f"{where} is {show(error['input'])}: {message[0].lower()}{message[1:]}"
    return f"line {lines[path]}: {says}" if path in lines else says


def _keys(model: type[BaseModel], path: Place) -> list[str]:
    """The keys that the model at a path knows."""
    for step in path:
        if isinstance(step, str) and step in model.model_fields:
            inner = [t for t in _types(model.model_fields[step].annotation) if isinstance(t, type)]
            models = [t for t in inner if issubclass(t, BaseModel)]
            if not models:
                return []
            model = models[0]
    return list(model.model_fields)


def _types(annotation: Any) -> list[Any]:
    args = getattr(annotation, "__args__", ())
    return [annotation] if not args else [t for a in args for t in _types(a)]
