"""PyYAML's SafeLoader without what makes YAML dangerous or ambiguous in a config.

parse_yaml(b"lr: 1e-05", "train.yaml", "config")       # {"lr": 1e-05}
parse_yaml(b"a: &x {b: 1}\nc: {<<: *x}", "merge.yaml", "config", aliases=True)["c"]     # {"b": 1}
yaml_lines(b"a:\n  b: 1")                               # {(): 1, ("a",): 1, ("a", "b"): 2}
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import yaml

from surgery.errors import FileError, show

DEPTH_LIMIT = 64
NODE_LIMIT = 100_000
_SCALAR_LIMIT = 1 << 16
_NUMBER_LIMIT = 64
PLAIN = "tag:yaml.org,2002:"
_KNOWN_TAGS = {PLAIN + name for name in ("null", "bool", "int", "float", "str", "seq", "map")}
FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")  # YAML 1.1 wants "1.0e-05"
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Bad(Exception):
    def __init__(self, what: str, mark: Any) -> None:
        super().__init__(what)
        self.what, self.mark = what, mark


class _Loader(_Base):  # type: ignore[misc]  # libyaml's loader, where there is one
    """Plain scalars, lists and maps."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != PLAIN + "timestamp"]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar[dict[str, Any]] = {
        tag: fn for tag, fn in _Base.yaml_constructors.items() if tag in _KNOWN_TAGS
    }

    def flatten_mapping(self, node: Any) -> None:
        for key, _ in node.value:
            if key.tag == PLAIN + "merge":
                raise _Bad("merge keys (<<) are not supported", key.start_mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        self.flatten_mapping(node)
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Bad("a key is not a scalar", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in out:
                raise _Bad(f"key {show(key)} appears twice", key_node.start_mark)
            out[key] = self.construct_object(value_node, deep=deep)
        return out

    def construct_scalar(self, node: Any) -> Any:
        number = node.tag in (PLAIN + "int", PLAIN + "float")
        if len(node.value) > (_NUMBER_LIMIT if number else _SCALAR_LIMIT):
            raise _Bad(f"a scalar of {len(node.value)} characters", node.start_mark)
        return super().construct_scalar(node)

    def construct_finite(self, node: Any) -> float:
        value: float = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise _Bad(f"{show(node.value)} is not a finite number", node.start_mark)
        return value

    def construct_unknown(self, node: Any) -> Any:
        raise _Bad(f"tag {show(node.tag)} is not supported", node.start_mark)


class _Aliased(_Loader):
    """Aliases and merge keys as well: a mapping's own keys win over merged ones, earlier merged ones over later."""

    def flatten_mapping(self, node: Any) -> None:
        own = [pair for pair in node.value if pair[0].tag != PLAIN + "merge"]
        said = {key.value for key, _ in own}
        for key, value in node.value:
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if key.tag == PLAIN + "merge":
                    if not isinstance(merged, yaml.MappingNode):
                        raise _Bad("<< takes a mapping or a list of them", key.start_mark)
                    self.flatten_mapping(merged)
                    own += [pair for pair in merged.value if pair[0].value not in said]
                    said |= {k.value for k, _ in merged.value}
        node.value = own


_Loader.add_implicit_resolver(PLAIN + "float", FLOAT, list("-+0123456789"))
_Loader.add_constructor(PLAIN + "float", _Loader.construct_finite)
_Loader.add_constructor(None, _Loader.construct_unknown)


ONE = "make a file of each document, and give them one after the other"


def parse_yaml(data: bytes, file: str, what: str, aliases: bool = False) -> Any:
    """The value of YAML text; with `aliases`, which may repeat what they name as far as NODE_LIMIT allows.

    Raises FileError.
    """
    try:
        text = data.decode()
        _check_events(text, aliases)
        if aliases:
            _check_size(yaml.compose(text, Loader=_Base), {})
        return yaml.load(text, Loader=_Aliased if aliases else _Loader)
    except _Bad as error:
        raise FileError(f"{what}{_place(error.mark)}: {error.what}", file=file) from None
    except yaml.YAMLError as error:
        place = _place(getattr(error, "problem_mark", None))
        said = str(getattr(error, "problem", None) or "it cannot be parsed")
        several = "another document" in said
        problem = "it holds several documents (---)" if several else show(said)
        raise FileError(
            f"{what} is not valid YAML{place}: {problem}", file=file, hint=ONE if several else None
        ) from None
    except UnicodeDecodeError as error:
        raise FileError(f"{what} is not UTF-8", file=file, byte=error.start) from None
    except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError, RecursionError):
        raise FileError(f"{what} holds a scalar that cannot be read", file=file) from None


def _place(mark: Any) -> str:
    """Where people look for it: line and column, from 1."""
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def yaml_lines(data: bytes) -> dict[tuple[str | int, ...], int]:
    """The line, from 1, on which each key or entry of a list stands; of text that `parse_yaml` accepts."""
    found: dict[tuple[str | int, ...], int] = {(): 1}

    def walk(node: Any, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[*path, key.value] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                found[*path, i] = value.start_mark.line + 1
                walk(value, (*path, i))

    walk(yaml.compose(data.decode(), Loader=_Base), ())
    return found


def _check_size(node: Any, sizes: dict[int, int | None]) -> int:
    """How many values a node is when every alias is written out."""
    if id(node) not in sizes:
        sizes[id(node)] = None
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [n for pair in below for n in (pair if isinstance(pair, tuple) else (pair,))]
        sizes[id(node)] = 1 + sum(_check_size(n, sizes) for n in nodes)
    size = sizes[id(node)]
    if size is None:
        raise _Bad("an alias within what it names", node.start_mark)
    if size > NODE_LIMIT:
        raise _Bad(f"more than {NODE_LIMIT} values, with its aliases written out", node.start_mark)
    return size


def _check_events(text: str, aliases: bool) -> None:
    """Aliases, depth and size, seen before anything is built."""
    nodes = depth = 0
    for event in yaml.parse(text, Loader=_Base):
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) and not aliases:
            raise _Bad("aliases (*name) are not supported", event.start_mark)
        if nodes > NODE_LIMIT:
            raise _Bad(f"more than {NODE_LIMIT} values", event.start_mark)
        if depth > DEPTH_LIMIT:
            raise _Bad(f"nested deeper than {DEPTH_LIMIT} levels", event.start_mark)
