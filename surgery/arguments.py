"""The functions that callers from Python use: arguments of a wrong kind are refused in words, as flags are.

    @checked
    def verify(a, b, *, max_memory=None): ...

    verify("a", 5, max_memory=-1)     # UsageError: b must be a path, not 5; max_memory must be a number of bytes ...

What an argument may be is told by its name, here, so that it means the same in every function; what is a setting says
so itself.  What the system refuses meanwhile becomes a SurgeryError, too.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from numbers import Integral
from typing import ParamSpec, TypeVar

from surgery.errors import UsageError, reported, show

P = ParamSpec("P")
R = TypeVar("R")
Right = Callable[[object], bool]


def _path(value: object) -> bool:
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    return isinstance(text, str) and bool(text) and "\0" not in text


def _positive(value: object) -> bool:
    whole = isinstance(value, Integral) and int(value) > 0
    return whole and not isinstance(value, bool)


def _choices(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(x, str) for pair in value.items() for x in pair)


def _words(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, (str, bytes)) and all(type(x) is str for x in value)


def _or_none(right: Right) -> Right:
    return lambda value: value is None or right(value)


def _size(value: object) -> bool:
    """Bytes, or a text such as "1GB", which whoever takes it reads."""
    return isinstance(value, str) or _positive(value)


PATH = (_path, "a path")
TOLD = (_or_none(callable), "a function of a number of bytes")
# argument -> what is right, and how that is called
KINDS: Mapping[str, tuple[Right, str]] = {
    "path": PATH, "src": PATH, "dst": PATH, "a": PATH, "b": PATH, "tokenizer": (_or_none(_path), "a path"),
    "config": (lambda value: _path(value) or isinstance(value, Mapping) or is_dataclass(value), "a path or a mapping"),
    "format": (lambda value: value is None or isinstance(value, str), "the name of a format"),
    "options": (_or_none(_choices), "a mapping of names to texts"),
    "allow": (_words, "a list of names"), "command": (_words, "a list of words"),
    "max_memory": (_or_none(_size), "a number of bytes, or a text such as '1GB'"),
    "progress": TOLD, "proving": TOLD,
}  # fmt: skip


def check(given: Mapping[str, object]) -> None:
    """Raise UsageError for every argument that is none of what KINDS says of its name."""
    wrong = [f"{name} must be {KINDS[name][1]}, not {show(value)}" for name, value in given.items()
             if name in KINDS and not KINDS[name][0](value)]  # fmt: skip
    if wrong:
        raise UsageError("; ".join(wrong))


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with its arguments checked, and with what the system refuses as SurgeryErrors."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check(signature.bind(*args, **kwargs).arguments)
        with reported():
            return function(*args, **kwargs)

    return call
