"""Typed access to a section of a config, which remembers what was not stated and what was never asked for.

keys = TypedKeys(config["model"], "config.yaml", "model", {"n_layers": 12})
layers = keys.integer("n_layers")       # 12 if the config does not say it, and keys.notes says so
keys.unknown(INERT)                     # keys that nobody asked for and that INERT does not list
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from surgery.errors import ConfigError, show

MISSING = object()


class TypedKeys:
    """`absent` holds what upstream takes for keys that are not there; a key in neither place is an error."""

    def __init__(self, config: Mapping[str, Any], file: str, place: str, absent: Mapping[str, Any]) -> None:
        self.config, self.file, self.place, self.absent = config, file, place, absent
        self.asked: set[str] = set()
        self.unstated: list[str] = []

    def get(self, key: str) -> Any:
        """The value of any type.  Raises ConfigError if it is not stated and has no default."""
        self.asked.add(key)
        value = self.config.get(key, MISSING)
        if value is MISSING:
            if key not in self.absent:
                raise ConfigError(f"{self.path(key)} is missing", file=self.file)
            value = self.absent[key]
            if value is not None and value is not False:
                self.unstated.append(f"{self.path(key)} = {show(value)}")
        return value

    def path(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def bad(self, key: str, value: object, want: str) -> ConfigError:
        return ConfigError(f"{self.path(key)} is {show(value)}, not {want}", file=self.file)

    def integer(self, key: str, least: int = 1) -> int:
        value = self.get(key)
        if type(value) is not int or not least <= value < 1 << 31:
            raise self.bad(key, value, f"a whole number from {least} on")
        return value

    def maybe_integer(self, key: str, least: int = 1) -> int | None:
        return None if self.get(key) is None else self.integer(key, least)

    def real(self, key: str) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not 0 < value < 1e15:
            raise self.bad(key, value, "a positive number")
        return float(value)

    def maybe_real(self, key: str) -> float | None:
        return None if self.get(key) is None else self.real(key)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if type(value) is not bool:
            raise self.bad(key, value, "true or false")
        return value

    def maybe_flag(self, key: str) -> bool | None:
        return None if self.get(key) is None else self.flag(key)

    def choice(self, key: str, choices: Iterable[str]) -> str:
        value = self.get(key)
        if type(value) is not str or value not in (known := list(choices)):
            raise self.bad(key, value, f"one of {', '.join(known if type(value) is str else choices)}")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """A mapping below this one; {} if it is null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.bad(key, value, "a mapping")
        return value or {}

    def below(self, key: str, absent: Mapping[str, Any]) -> TypedKeys:
        """Typed access to a mapping below this one."""
        return TypedKeys(self.section(key), self.file, self.path(key), absent)

    def unknown(self, inert: Iterable[str]) -> list[str]:
        """Stated keys that were never asked for and are not inert; null, false and empty ones are no statement."""
        known = self.asked | set(inert)
        return sorted(
            self.path(str(k)) for k, v in self.config.items() if k not in known and v not in (None, False, "", [], {})
        )

    def note(self, upstream: str) -> list[str]:
        """One sentence naming every value that was taken from upstream's defaults."""
        if not self.unstated:
            return []
        return [f"not stated, taken as {upstream} takes it: {', '.join(self.unstated)}"]
