"""Keys of a config: typed access that remembers what was asked for, and tables that are read in both directions.

TABLE = (Key("d_model", "width", 768), Key("rms", "norm", words={True: "rms", False: "layer"}), Fixed("bias", False))
keys = Keys(config, "config.yaml", "model")
fields = read(TABLE, keys)              # {"width": 4096, "norm": "rms"}
write(TABLE, spec)                      # {"d_model": 4096, "rms": True, "bias": False}
keys.unknown(INERT)                     # keys that nobody asked for and that INERT does not list
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from surgery.errors import ConfigError, show
from surgery.model.spec import Spec

MISSING: Any = object()
NOT: Mapping[Any, Any] = MappingProxyType({False: True, True: False})  # a key that says the opposite of its field
_LARGEST = (1 << 31) - 1
MOST = {"layers": 1 << 14, "experts": 1 << 16}  # lists as long as these are made before tensors are counted
_TYPES: Mapping[str, str] = {f.name: str(f.type) for f in fields(Spec)}


class Keys:
    """A section of a config.  `absent` holds what upstream takes for keys that are not there; a key in neither place is
    an error.  `nulls`: a null is as good as an absent key."""

    def __init__(
        self, config: Mapping[str, Any], file: str, place: str = "", absent: Mapping[str, Any] | None = None,
        nulls: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.file, self.place, self.absent, self.nulls = config, file, place, dict(absent or {}), nulls
        self.asked: set[str] = set()
        self.unstated: list[str] = []
        self.refused: list[str] = []
        self.sections: list[tuple[Keys, frozenset[str]]] = []

    def get(self, key: str) -> Any:
        """The value of any type.  Raises ConfigError if it is not stated and has no default."""
        self.asked.add(key)
        value = self.config.get(key, MISSING)
        if value is MISSING or (value is None and self.nulls):
            if key not in self.absent:
                raise ConfigError(f"{self.path(key)} is missing", file=self.file)
            stated, value = value, self.absent[key]
            if stated is MISSING and value is not None and value is not False:
                self.unstated.append(f"{self.path(key)} = {show(value)}")
        return value

    def path(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def bad(self, key: str, value: object, want: str) -> ConfigError:
        return ConfigError(f"{self.path(key)} is {show(value)}, not {want}", file=self.file)

    def integer(self, key: str, least: int = 1, most: int = _LARGEST) -> int:
        value = self.get(key)
        if type(value) is not int or not least <= value <= most:
            too_many = type(value) is int and value > most
            raise self.bad(key, value, f"a whole number from {least} {f'to {most}' if too_many else 'on'}")
        return value

    def maybe_integer(self, key: str, least: int = 1, most: int = _LARGEST) -> int | None:
        return None if self.get(key) is None else self.integer(key, least, most)

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

    def word(self, key: str) -> str:
        """A text in lower case, for programs that do not mind."""
        value = self.get(key)
        if type(value) is not str:
            raise self.bad(key, value, "a word")
        return value.lower()

    def choice(self, key: str, choices: Iterable[Any]) -> Any:
        """One of the words (or flags) that are known."""
        value, known = self.get(key), list(choices)
        if type(value) not in (str, bool) or value not in known:
            raise self.bad(key, value, f"one of {', '.join(map(str, known))}")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """A mapping below this one; {} if it is null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.bad(key, value, "a mapping")
        return value or {}

    def below(self, key: str, absent: Mapping[str, Any] | None = None, inert: Iterable[str] = ()) -> Keys:
        """Typed access to a mapping below this one, whose `inert` keys are no business of anyone."""
        return self.over(self.section(key), self.path(key), absent, inert)

    def over(
        self, config: Mapping[str, Any], place: str, absent: Mapping[str, Any] | None = None, inert: Iterable[str] = ()
    ) -> Keys:
        """Typed access to a mapping that belongs to this one: `note`, `check` and `unknown` speak for both."""
        found = Keys(config, self.file, place, absent)
        found.unstated, found.refused = self.unstated, self.refused
        self.sections.append((found, frozenset(inert)))
        return found

    def of(self, key: str, field: str) -> Any:
        """The value for a field of Spec, of its type."""
        kind = _TYPES[field]
        if kind == "bool":
            return self.flag(key)
        if kind == "int":
            return self.integer(key, most=MOST.get(field, _LARGEST))
        if kind == "float":
            return self.real(key)
        assert kind in ("int | None", "float | None"), field
        return self.maybe_integer(key) if kind.startswith("int") else self.maybe_real(key)

    def unknown(self, inert: Iterable[str], silent: tuple[Any, ...] = (None, False, "", [], {})) -> dict[str, Any]:
        """Stated keys, with their values, that were never asked for and are not inert; values that are no statement are
        `silent`."""
        known = self.asked | set(inert)
        here = {self.path(str(k)): v for k, v in self.config.items() if k not in known and not _among(v, silent)}
        out = dict(sorted(here.items()))
        for keys, own in self.sections:
            out |= keys.unknown(own, silent)
        return out

    def note(self, upstream: str) -> list[str]:
        """One sentence naming every value that was taken from upstream's defaults."""
        if not self.unstated:
            return []
        return [f"not stated, taken as {upstream} takes it: {', '.join(dict.fromkeys(self.unstated))}"]

    def check(self) -> None:
        """Raise ConfigError naming all keys whose value is one that no Spec can say."""
        if self.refused:
            raise ConfigError(f"this is not supported: {'; '.join(dict.fromkeys(self.refused))}", file=self.file)


def _among(value: object, known: Iterable[object]) -> bool:
    """Whether a value is one of these; True is not 1."""
    return any(value == x and (type(value) is bool) == (type(x) is bool) for x in known)


# ------------------------------------------------------------------------------------------ keys in both directions


@dataclass(frozen=True)
class Key:
    """A key that holds a field of Spec: as it is, or in upstream's `words` (word -> value of the field, the word to be
    written first).  `absent` is what upstream takes where the key is not there; by default it must be."""

    name: str
    field: str
    absent: Any = MISSING
    words: Mapping[Any, Any] | None = None

    def read(self, keys: Keys) -> dict[str, Any]:
        if self.absent is not MISSING:
            keys.absent.setdefault(self.name, self.absent)
        if self.words is None:
            return {self.field: keys.of(self.name, self.field)}
        return {self.field: self.words[keys.choice(self.name, self.words)]}

    def write(self, spec: Spec) -> dict[str, Any]:
        value = getattr(spec, self.field)
        if self.words is None:
            return {self.name: value}
        fallback = next(iter(self.words))  # reading back will tell that it is another
        return {self.name: next((word for word, means in self.words.items() if means == value), fallback)}


@dataclass(frozen=True)
class Fixed:
    """A key of which no Spec says anything but `value`; `fine` are others that change nothing.  `absent` is what
    upstream takes where the key is not there, `means` says what another value is, `written` that it is written too."""

    name: str
    value: Any
    fine: tuple[Any, ...] = (None,)
    absent: Any = MISSING
    means: str = ""
    written: bool = True

    def read(self, keys: Keys) -> dict[str, Any]:
        keys.absent.setdefault(self.name, self.value if self.absent is MISSING else self.absent)
        value = keys.get(self.name)
        if not any(
            value == good and (type(value) is bool) == (type(good) is bool) for good in (self.value, *self.fine)
        ):
            said = str(value).lower() if type(value) is bool else show(value)
            keys.refused.append(f"{keys.path(self.name)}: {self.means or said}")
        return {}

    def write(self, spec: Spec) -> dict[str, Any]:
        return {self.name: self.value} if self.written else {}


@dataclass(frozen=True)
class Pair:
    """Keys that say fields of Spec in another way, as two functions."""

    read: Callable[[Keys], Mapping[str, Any]]
    write: Callable[[Spec], Mapping[str, Any]]


Entry = Key | Fixed | Pair


def read(table: Iterable[Entry], keys: Keys) -> dict[str, Any]:
    """The fields of Spec that the keys say.  Raises ConfigError; `keys.check` raises for what no Spec can say."""
    out: dict[str, Any] = {}
    for entry in table:
        out |= entry.read(keys)
    return out


def write(table: Iterable[Entry], spec: Spec) -> dict[str, Any]:
    """The keys that say a model, or the one that comes nearest."""
    out: dict[str, Any] = {}
    for entry in table:
        out |= entry.write(spec)
    return out
