"""What a recipe can say of a step, of an input, and of a step's job.

spec = read_step({"surgery": "convert $model $out --to hf", "resources": {"time": "2h"}})
spec.line                                               # ("convert", "$model", "$out", "--to", "hf")
read_resources({"time": "12h", "gpus": 8}).time         # 43200
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import ConfigError, show, some
from surgery.settings import Checked, keywords, make, said, setting
from surgery.units import parse_size

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
RESERVED = {"out", "config", "script", "step", "steps", "folder", "recipe"}  # what these names mean is ours to say
KINDS = ("surgery", "python", "shell")
_CLOCK = re.compile(r"(?:(\d{1,3})-)?(\d{1,3}):(\d\d):(\d\d)")
_SPAN = re.compile(r"(\d{1,5})\s*(d|h|min|m|s)")
_SECONDS = {"d": 86400, "h": 3600, "min": 60, "m": 60, "s": 1}


def named(help: str) -> Any:
    """A field that maps names to values."""
    return field(default_factory=dict, metadata=said(help))


@dataclass(frozen=True, kw_only=True)
class Input(Checked):
    """A file or folder that no step makes."""

    path: str = field(metadata=said("Where it lies; * and ? in its last part stand for several files."))
    check: str = setting(
        "content", "content: a change of any byte counts. size: only names and sizes, of what is too large to be read.",
        choices=("content", "size"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepSpec(Checked):
    """One step; exactly one of surgery, python and shell says what it runs."""

    surgery: tuple[str, ...] | None = setting(None, "The words of a command of surgery.")
    python: tuple[str, ...] | None = setting(None, "A script, relative to the recipe, and its words.")
    shell: str | None = setting(None, "Lines for bash.")
    about: str = setting("", "What it does, in a few words.")
    config: Mapping[str, Any] | None = setting(None, "A YAML that is written for the command, as $config.")
    inputs: Mapping[str, Input] = named("What it reads besides what its command mentions: {NAME: PATH}.")
    outputs: Mapping[str, str] = named(
        "What it makes: {NAME: PATH in the run's folder}. Where it mentions $out, {out: the step's name}."
    )
    stdout: str | None = setting(None, "A file in the run's folder that takes what the command prints, as its output.")
    after: tuple[str, ...] = setting((), "Steps that must have ended well before, though nothing of them is read.")
    matrix: Mapping[str, Any] = named("{NAME: LIST}: it is run once for every combination of the values.")
    env: Mapping[str, Any] = named("Variables of the environment.")
    resources: Mapping[str, Any] = named("What its job asks of a cluster.")

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind))

    @property
    def line(self) -> tuple[str, ...]:
        """The words of the command, as they are written; none of a shell step.  A script is $script."""
        return ("$script", *self.python[1:]) if self.python else self.surgery or ()

    @property
    def templates(self) -> tuple[Any, ...]:
        """Everything in which names may be mentioned, but for paths."""
        return (list(self.line), self.shell or "", self.config or {}, [str(v) for v in self.env.values()], self.about)


@dataclass(frozen=True, kw_only=True)
class Resources(Checked):
    """What a job asks of a cluster; None: the site's default."""

    time: int | None = setting(None, "How long it may run: 12h, 90min, 2d, 12:00:00.", low=1)
    nodes: int = setting(1, "Machines.", low=1)
    gpus: int = setting(0, "Of each machine.", low=0)
    cpus: int | None = setting(None, "Of each machine.", low=1)
    memory: int | None = setting(None, "Of each machine: 64GB.", low=1)
    processes: int | None = setting(None, "torchrun starts so many on each machine. [default: one, without it]", low=1)
    chain: int = setting(
        1, "Jobs one after the other, each of which goes on where the one before ran out of time.", low=1
    )


def read_input(value: Any) -> Input:
    """A path, or the fields of an Input.  Raises ConfigError or UsageError."""
    return make(Input, {"path": value} if isinstance(value, str) else keywords(Input, value))


def read_step(value: Any) -> StepSpec:
    """Raises ConfigError or UsageError for what is wrong with a step."""
    given = keywords(StepSpec, mapping("it", value))
    for kind in ("surgery", "python"):
        if kind in given:
            given[kind] = _words(kind, given[kind])
    if isinstance(given.get("after"), str):
        given["after"] = [given["after"]]
    for name in ("inputs", "outputs", "matrix", "env", "resources"):
        given[name] = mapping(name, given.get(name) or {})
    if not isinstance(given.get("config"), dict | None):
        raise ConfigError(f"config is {show(given['config'])}, not keys and values")
    given["inputs"] = {check_name(name): read_input(one) for name, one in given["inputs"].items()}
    check_name(*given["matrix"])
    if odd := [name for name, path in given["outputs"].items() if not isinstance(path, str)]:
        raise ConfigError(f"outputs: {some(odd)} is no path")
    kinds = [kind for kind in KINDS if given.get(kind)]
    if len(kinds) != 1:
        raise ConfigError(f"give exactly one of {', '.join(KINDS)}, not {' and '.join(kinds) or 'none'}")
    return make(StepSpec, given)


def _words(kind: str, value: Any) -> tuple[str, ...]:
    """A line as a shell would split it, or a list of words."""
    if isinstance(value, list):
        return tuple(word if isinstance(word, str) else repr(word) for word in value)
    try:
        return tuple(shlex.split(value))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{kind}: {show(value)} cannot be split into words: {error}") from None


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Raises ConfigError if a value is not keys, which are texts, and values."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} is {show(value)}, not names and values")
    return value


def check_name(*names: str) -> str:
    """The last of some names.  Raises ConfigError for what cannot be one."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{show(name)} is no name: letters, digits and _, a letter first")
        if name in RESERVED:
            raise ConfigError(f"{name} means something already", hint="choose another name")
    return names[-1] if names else ""


def read_resources(value: Mapping[str, Any]) -> Resources:
    """Raises ConfigError or UsageError."""
    given = keywords(Resources, value)
    given["time"] = seconds(given.get("time"))
    if isinstance(given.get("memory"), str):
        given["memory"] = parse_size(given["memory"])
    return make(Resources, given)


def seconds(value: Any) -> Any:
    """12h, 90min, 2d, 1-12:00:00 as seconds; of 12:00:00 YAML has made seconds already."""
    if not isinstance(value, str):
        return value
    if clock := _CLOCK.fullmatch(value):
        days, hours, minutes, rest = (int(n or 0) for n in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if span := _SPAN.fullmatch(value):
        return int(span[1]) * _SECONDS[span[2]]
    raise ConfigError(f"time: {show(value)} is no time", hint="write 12h, 90min, 2d or 12:00:00")
