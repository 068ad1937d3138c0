"""Reads what YAML gave, key by key, and says where it is when something is wrong.

    r = Reader("merge.yaml")
    r.mapping({"modle": "a"}, "models[0]", ("model", "parameters"))     # ConfigError: did you mean model?
    str(r.reference("org/name@main+adapter", "models[0]"))              # "org/name@main+adapter"

mergekit 0.1.5 ignores keys that it does not know, so that `wieght: 0.3` merges with the default.  Here a misspelt key
is an error that names the nearest right one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import ConfigError, show, suggest


@dataclass(frozen=True, order=True)
class Place:
    """A folder or hub id, and the revision of the latter."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class Reference:
    """A model as the YAML names it: `path`, `org/name@revision`, `path+adapter`."""

    model: Place
    lora: Place | None = None
    architecture: str | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)


class Reader:
    """Walks the YAML and says where it is when something is wrong."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.notes: list[str] = []

    def fail(self, at: str, what: str, hint: str | None = None) -> ConfigError:
        return ConfigError(f"{at + ': ' if at else ''}{what}", file=self.file, hint=hint)

    def mapping(self, value: Any, at: str, known: Iterable[str], unused: Iterable[str] = ()) -> Mapping[str, Any]:
        """A mapping with known keys only; a wrong one is an error with the nearest right one.

        `unused` are keys that mergekit takes and does not use here: they are left out, and a note says so.
        """
        names, idle = list(known), set(unused)
        if not isinstance(value, dict):
            raise self.fail(at, f"is {show(value)}, not a mapping with {', '.join(names)}")
        for key in value:
            if key not in names and key in idle:
                self.notes.append(f"{at + ': ' if at else ''}{key} has no effect here, as in mergekit")
            elif key not in names:
                raise self.fail(at, f"{show(key)} is no key here", suggest(key, dict.fromkeys([*names, *sorted(idle)])))
        return {key: entry for key, entry in value.items() if key in names}

    def items(self, value: Any, at: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.fail(at, f"is {show(value)}, not a list of at least one")
        return value

    def reference(self, value: Any, at: str) -> Reference:
        if isinstance(value, str) and value:
            if os.path.isdir(value):
                return Reference(Place(value))
            parts = value.split("+")
            if len(parts) > 2:
                raise self.fail(at, f"{show(value)} names more than one adapter", "write MODEL or MODEL+ADAPTER")
            return Reference(self.place(parts[0], at), self.place(parts[1], at) if len(parts) == 2 else None)
        given = self.mapping(value, at, ("model", "lora", "override_architecture"))
        if "model" not in given:
            raise self.fail(at, "model is missing")
        lora = given.get("lora")
        architecture = given.get("override_architecture")
        return Reference(self.place(given["model"], at), None if lora is None else self.place(lora, at), architecture)

    def place(self, value: Any, at: str) -> Place:
        if isinstance(value, dict):
            given = self.mapping(value, at, ("path", "revision"))
            if isinstance(given.get("path"), str):
                return Place(given["path"], given.get("revision"))
        if not isinstance(value, str) or not value:
            raise self.fail(at, f"{show(value)} names no model")
        if os.path.isdir(value) or "@" not in value:
            return Place(value)
        path, _, revision = value.partition("@")
        if "@" in revision or not path or not revision:
            raise self.fail(at, f"{show(value)} is no PATH@REVISION")
        return Place(path, revision)

    def choice(self, value: Any, at: str, choices: Iterable[str]) -> str | None:
        names = list(choices)
        if value is None:
            return None
        if value in names:
            return str(value)
        raise self.fail(at, f"is {show(value)}", suggest(value, names))
