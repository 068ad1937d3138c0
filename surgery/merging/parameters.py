"""Parameters of a merge: scalars, gradients over layers, filters by tensor name; resolved as mergekit resolves them.

    value = evaluate([0.0, 0.5, 1.0], "model.layers.3.mlp.up_proj.weight", 0.5, Parameter("t", "float"))     # 0.5

A list of numbers is interpolated over the layers of a slice (t from 0 to 1), other lists are steps; a list of
{filter, value} takes the first whose filter is part of the tensor's name.  The nearest scope wins: source, slice,
module, whole merge (mergekit 0.1.5, `config.py` and `parameter_resolver.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.errors import ConfigError, show
from surgery.merging.contract import Parameter
from surgery.merging.methods.registry import PARAMETERS
from surgery.merging.reader import Reader

Settings = Mapping[str, Any]
_TRUE = ("1", "true", "t", "yes", "y", "on")
_FALSE = ("0", "false", "f", "no", "n", "off")


def read_settings(value: Any, known: Iterable[str], r: Reader, at: str) -> Settings:
    """`parameters` with known names, every filter and gradient of a right form; those of other methods are noted."""
    if value is None:
        return {}
    given = r.mapping(value, at, known, PARAMETERS)
    for name, setting in given.items():
        _check(setting, r, f"{at}.{name}", 0)
    return dict(given)


def _check(setting: Any, r: Reader, at: str, depth: int) -> None:
    if setting is None or isinstance(setting, (bool, int, float, str)):
        return
    entries = setting if isinstance(setting, list) else [setting]
    conditional = [isinstance(e, dict) for e in entries]
    if not entries:
        raise r.fail(at, "is an empty list")
    if not any(conditional):
        if any(not isinstance(e, (bool, int, float, str)) for e in entries):
            raise r.fail(at, "is no list of numbers")
        return
    if depth or not all(conditional):
        raise r.fail(at, "mixes numbers and filters")
    for i, entry in enumerate(entries):
        keys = r.mapping(entry, f"{at}[{i}]", ("filter", "value"))
        if keys.get("value") is None:
            raise r.fail(f"{at}[{i}]", "value is missing")
        if keys.get("filter") is not None and not isinstance(keys["filter"], str):
            raise r.fail(f"{at}[{i}].filter", f"is {show(keys['filter'])}, not a part of a tensor's name")
        _check(keys["value"], r, f"{at}[{i}].value", depth + 1)


def filters(settings: Settings) -> set[str]:
    """All filters in these settings."""
    entries = [e for s in settings.values() for e in (s if isinstance(s, list) else [s]) if isinstance(e, dict)]
    return {e["filter"] for e in entries if e.get("filter")}


def evaluate(setting: Any, tensor: str, t: float, parameter: Parameter) -> Any:
    """The value for one tensor at place t (0 to 1) of its slice; None if no filter fits."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return convert(setting, parameter)
    if all(not isinstance(e, dict) for e in setting):
        values = [convert(e, parameter) for e in setting]
        if parameter.kind == "bool":
            return values[int(t * (len(values) - 1))]
        scaled = t * (len(values) - 1)
        low = int(scaled)
        high, share = min(len(values) - 1, low + 1), scaled - low
        return convert((1 - share) * values[low] + share * values[high], parameter)
    for entry in setting:
        rule = entry.get("filter")
        if rule is None or rule == "*" or rule in tensor:
            return evaluate(entry["value"], tensor, t, parameter)
    return None


def resolve(parameter: Parameter, scopes: Iterable[Settings], tensor: str, t: float, model: str = "") -> Any:
    """The value of a parameter from the nearest scope that gives one, else its default."""
    for scope in scopes:
        if scope.get(parameter.name) is not None:
            value = evaluate(scope[parameter.name], tensor, t, parameter)
            if value is not None:
                return value
    if parameter.required:
        where = f" of {show(model)}" if model else ""
        hint = f"set parameters: {{{parameter.name}: ...}}, or add an entry without a filter"
        raise ConfigError(f"{parameter.name}{where} is not given for {tensor}", hint=hint)
    return parameter.default


def convert(value: Any, parameter: Parameter) -> Any:
    """A scalar of the YAML as the parameter's kind.  Raises ConfigError."""
    text = value.strip().lower() if isinstance(value, str) else value
    if parameter.kind == "bool":
        if isinstance(text, str) and text in _TRUE + _FALSE:
            return text in _TRUE
        if text in (0, 1):
            return bool(text)
    else:
        try:
            number = float(text)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number) and (parameter.kind == "float" or number == int(number)):
            return number if parameter.kind == "float" else int(number)
    raise ConfigError(f"{parameter.name} is {show(value)}, not a {parameter.kind}")
