"""Settings: a frozen dataclass says of each field its help, limits and choices, and all else follows from that.

    @dataclass(frozen=True, kw_only=True)
    class Blur(Checked):
        share: float = setting(0.0, "How much of it.", low=0, high=1)

    Blur(share=2.0)                             # UsageError: --share 2.0: choose 0 to 1
    read(Blur, {"shaer": 0.1}, "blur.yaml")     # ConfigError: there is no field 'shaer', did you mean share?

Flags of the command line are made of the same fields (`cli.flags`), and so are the keywords of functions: `taking`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Concatenate, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from surgery.arguments import check
from surgery.errors import ConfigError, SurgeryError, UsageError, reported, show, some, suggest

KEY = "setting"  # of a field's metadata
WHOLE = 1 << 63  # above the largest whole number
A = TypeVar("A")
B = TypeVar("B")
Q = TypeVar("Q")
R = TypeVar("R")
P = ParamSpec("P")


@dataclass(frozen=True)
class About:
    """What is known of a setting besides its name, type and default.

    low, high   the least and the largest number     choices     all values that a text can have
    metavar     what stands for the value in help    otherwise   the default in words, where it does not say it itself
    aliases     other texts for some of the choices
    flag        the flag's name, where it is not that of the field
    many        whether the flag may be given several times, one value each
    """

    help: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    otherwise: str = ""
    flag: str = ""
    many: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)


def setting(default: Any, help: str, **about: Any) -> Any:
    """A field of a dataclass that people set; the keywords are the fields of `About`."""
    return field(default=default, metadata=said(help, **about))


def said(help: str, **about: Any) -> Mapping[str, About]:
    """The metadata of such a field, for one without a default: `top_k: int = field(metadata=said("How many."))`."""
    return {KEY: About(help, **about)}


def about(f: Field[Any]) -> About | None:
    """What a field says of itself; None if it is not for people."""
    return f.metadata.get(KEY)


def flag(f: Field[Any]) -> str:
    """`top_k` -> `--top-k`."""
    found = about(f)
    return "--" + ((found and found.flag) or f.name).replace("_", "-")


def _types_of(cls: type) -> Mapping[str, tuple[Any, bool]]:
    """The type of every field, and whether it may be None."""
    out = {}
    for name, hint in get_type_hints(cls).items():
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        plain = [o for o in options if o is not NoneType]
        out[name] = (plain[0] if len(plain) == 1 else Any, len(plain) < len(options))
    return out


types_of: Callable[[type], Mapping[str, tuple[Any, bool]]] = functools.cache(_types_of)


class Checked:
    """A dataclass whose values are checked, one by one, when it is made; a list may stand for a tuple."""

    def __post_init__(self) -> None:
        """Raise UsageError naming every value that has another type or lies outside of its limits."""
        for name, (kind, _) in types_of(type(self)).items():
            if get_origin(kind) is tuple and isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for f in fields(self):  # type: ignore[arg-type]
            if (found := about(f)) and (meant := found.aliases.get(str(getattr(self, f.name)))):
                object.__setattr__(self, f.name, meant)
        wrong = [problem for f in fields(self) if (problem := _problem(self, f))]  # type: ignore[arg-type]
        if wrong:
            texts, hints = zip(*wrong, strict=True)
            raise UsageError("; ".join(texts), hint=next(filter(None, hints), None))


def _problem(owner: Any, f: Field[Any]) -> tuple[str, str | None] | None:
    """What is wrong with a value, and a hint."""
    found, value = about(f), getattr(owner, f.name)
    kind, optional = types_of(type(owner))[f.name]
    if found is None or kind is Any or (value is None and optional):
        return None
    what = f"{flag(f)} {show(value)}"
    if not fits(value, kind):
        return f"{what} is not {_called(kind)}", None
    if found.choices and value not in found.choices:
        return f"{what} is unknown", suggest(value, found.choices, "choose from")
    low, high = found.low, found.high if found.high is not None else WHOLE - 1
    if kind in (int, float) and low is not None and not low <= value <= high:
        if found.high is not None:
            return f"{what}: choose {low:g} to {high:g}", None
        return f"{what}: at least {low:g}" if value < low else f"{what} is larger than anything here can be", None
    return None


def fits(value: object, kind: Any) -> bool:
    """Whether a value has a type; whole numbers serve as any number, nothing but True and False as a bool."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(v, get_args(kind)[0]) for v in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind if kind in (int, bool, str) else True


def _called(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind) or f"a list of {'numbers' if get_args(kind)[:1] == (int,) else 'texts'}"


def read(cls: type[Q], values: object, file: str | None = None, given: Mapping[str, Any] | None = None) -> Q:
    """The settings in a mapping, as YAML has it, and those that were `given` by flags, which win.

    Raises ConfigError for what stands in the file and is no field or makes no sense, UsageError for what was given.
    """
    known = keywords(cls, values, file)
    if file is None or given:
        return make(cls, {**known, **(given or {})})
    with in_file(file):
        return make(cls, known)


@contextmanager
def in_file(file: str) -> Iterator[None]:
    """What is wrong with values is wrong with the file that they come from: a ConfigError."""
    try:
        yield
    except SurgeryError as error:
        raise ConfigError(error.what, file=file, hint=error.hint) from None


def make(cls: type[Q], values: Mapping[str, Any]) -> Q:
    """The settings that have these values.  Raises UsageError for those that are missing."""
    needed = [f for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [flag(f) for f in needed if values.get(f.name) is None]:
        raise UsageError(f"{some(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return cls(**values)


def keywords(cls: type, values: object, file: str | None = None) -> dict[str, Any]:
    """The fields of a recipe under their names, numbers as texts where a text is wanted.

    Raises ConfigError (UsageError without a file) for what is no field, with the field that may have been meant.
    """
    names = [f.name for f in fields(cls) if about(f)]
    kind: type[SurgeryError] = UsageError if file is None else ConfigError
    if not isinstance(values, Mapping):
        raise kind("is no recipe: it should map fields to values", file=file, hint=f"fields: {', '.join(names)}")
    out = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise kind(f"there is no field {show(key)}", file=file, hint=suggest(name, names, "fields"))
        if types_of(cls)[name][0] is str and type(value) in (int, float):
            value = repr(value)
        out[name] = value
    return out


def taking(
    request: Callable[P, Q],
) -> Callable[[Callable[[A, B, Q], R]], Callable[Concatenate[A, B, P], R]]:
    """Decorator: a function of two arguments and a request becomes one that takes the request's fields as keywords.

        @taking(Convert)
        def convert(src, dst, request): ...

        convert("a", "b", to="meta", topology=Topology(tp=2))

    Its signature and its documentation list every keyword.
    """
    asked = inspect.signature(request).parameters.values()

    def decorate(function: Callable[[A, B, Q], R]) -> Callable[Concatenate[A, B, P], R]:
        own = list(inspect.signature(function).parameters.values())[:2]
        more = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in asked]
        signature = inspect.signature(function).replace(parameters=[*own, *more])

        @functools.wraps(function)
        def called(*args: Any, **given: Any) -> R:
            if odd := [name for name in given if name not in signature.parameters]:
                hint = suggest(odd[0], signature.parameters)
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {odd[0]!r}; {hint}")
            try:
                bound = signature.bind(*args, **given).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            check(bound)
            first, second = (bound.pop(p.name) for p in own)
            with reported():
                return function(first, second, request(**bound))  # type: ignore[call-arg]

        called.__signature__ = signature  # type: ignore[attr-defined]
        called.__doc__ = f"{inspect.getdoc(function)}\n\n{_explained(request)}"
        return called

    return decorate


def _explained(request: Any) -> str:
    """One line per keyword."""
    found = {f.name: f.metadata[KEY].help for f in fields(request) if about(f)}
    width = max(map(len, found), default=0) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in found.items())
