"""`$name` in the commands and configs of a recipe: variables, files, and what steps make.

    names = {"tp": 3, "model": Thing("model", Path("/models/llama"))}
    words(("convert", "$model", "--tp", "$tp"), names, str)        # ["convert", "/models/llama", "--tp", "3"]
    value({"path": "$model/hf", "tp": "$tp"}, names, str)          # {"path": "/models/llama/hf", "tp": 3}

A name ends where an identifier ends; `${name}` says so, and names an output or one run of a step: `${train.hf}`,
`${train-42}`.  `$$` is a dollar.  Where a step is run several times, a word or an entry of a list that mentions it
stands once for each run, and the variables of the matrix have the values of that run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import ConfigError, some, suggest
from surgery.storage.store import Entry

REFERENCE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[\w.-]+)\})")
Where = Mapping[str, Any]  # variables of a matrix -> their values in one run


@dataclass(frozen=True)
class Thing:
    """A file or folder; `maker` is the step that makes it, "" if none does.

    `entry`: of an object that a pattern has found, what its store said of it then.
    """

    label: str
    path: Path
    maker: str = ""
    check: str = "content"
    entry: Entry | None = None


@dataclass(frozen=True)
class Several:
    """What a step makes in its several runs, or the files of a pattern."""

    items: tuple[tuple[Where, Thing], ...]

    def at(self, where: Where) -> Several | Thing:
        """What agrees with these values; a Thing if nothing is left open."""
        kept = tuple(
            (own, thing) for own, thing in self.items if all(where[k] == v for k, v in own.items() if k in where)
        )
        return kept[0][1] if len(kept) == 1 and kept[0][0].keys() <= where.keys() else Several(kept)


Names = Mapping[str, Any]  # name -> plain value, Thing or Several
Shown = Callable[[Thing], str]


def mentioned(template: Any) -> Iterator[str]:
    """The names in a text, or in a value with texts."""
    if isinstance(template, str):
        for match in REFERENCE.finditer(template):
            if name := match["plain"] or match["braced"]:
                yield name
    elif isinstance(template, Mapping):
        for inner in template.values():
            yield from mentioned(inner)
    elif isinstance(template, Sequence):
        for inner in template:
            yield from mentioned(inner)


def meaning(name: str, names: Names) -> Any:
    """Raises ConfigError if there is no such name."""
    if name not in names:
        raise ConfigError(f"there is no ${name}", hint=f"{suggest(name, names, 'there are')}; a dollar is $$")
    found = names[name]
    if isinstance(found, Several) and not found.items:
        raise ConfigError(f"${name} has no run with the values of this one")
    return found


def bound(names: Names, where: Where) -> Names:
    """The names as they are meant in one run of a matrix."""
    narrowed = {name: found.at(where) for name, found in names.items() if isinstance(found, Several)}
    return {**names, **narrowed, **{k: v for k, v in where.items() if not k.startswith("#")}}


def words(line: Sequence[str], names: Names, shown: Shown) -> list[str]:
    """The words of a command; one that is a list, or mentions several runs, becomes several."""
    out: list[str] = []
    for word in line:
        for scope in _scopes(word, names):
            found = _exactly(word, scope)
            out += [as_text(v) for v in found] if isinstance(found, list) else [text(word, scope, shown)]
    return out


def value(template: Any, names: Names, shown: Shown) -> Any:
    """A value of a config; a text that is one name and nothing else has the type of what it names."""
    if isinstance(template, Mapping):
        return {key: value(inner, names, shown) for key, inner in template.items()}
    if isinstance(template, list):
        return [value(entry, scope, shown) for entry in template for scope in _scopes(entry, names)]
    if not isinstance(template, str):
        return template
    match = REFERENCE.fullmatch(template)
    found = meaning(match["plain"] or match["braced"], names) if match and not match["dollar"] else None
    return text(template, names, shown) if found is None or isinstance(found, Thing | Several) else found


def text(template: str, names: Names, shown: Shown) -> str:
    """A text with every name replaced.  Raises ConfigError where a name stands for several things."""

    def put(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name = match["plain"] or match["braced"]
        found = meaning(name, names)
        if isinstance(found, Several):
            labels = some(("${%s}" % thing.label for _, thing in found.items), 3)  # noqa: UP031
            what = f"${name} stands for {len(found.items)} things: {labels}"
            raise ConfigError(what, hint="let it be a word or an entry of a list, or name one of them")
        return shown(found) if isinstance(found, Thing) else as_text(found)

    return REFERENCE.sub(put, template)


def shell_text(template: str, names: Names, shown: Shown) -> str:
    """Lines for a shell: what is put in is quoted, several things become several words."""

    def put(match: re.Match[str]) -> str:
        return "$" if match["dollar"] else shlex.join(words([match[0]], names, shown))

    return REFERENCE.sub(put, template)


def as_text(found: Any) -> str:
    """A plain value as a word of a command."""
    if isinstance(found, bool) or found is None:
        return {True: "true", False: "false", None: "null"}[found]
    if isinstance(found, Mapping | list):
        raise ConfigError("a list or a mapping cannot be part of a text", hint="let the name be all of it")
    return str(found)


def _exactly(word: str, names: Names) -> Any:
    """What a word means that is one name and nothing else."""
    match = REFERENCE.fullmatch(word)
    return meaning(match["plain"] or match["braced"], names) if match and not match["dollar"] else None


def _scopes(entry: Any, names: Names) -> Iterator[Names]:
    """The names for each time that an entry of a list stands there; lists inside of it see to themselves."""
    for name in mentioned(_without_lists(entry)):
        found = meaning(name, names)
        if isinstance(found, Several):
            for where, _ in found.items:
                yield from _scopes(entry, bound(names, where))
            return
    yield names


def _without_lists(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return {key: _without_lists(inner) for key, inner in entry.items()}
    return None if isinstance(entry, list) else entry
