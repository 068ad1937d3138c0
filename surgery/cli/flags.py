"""Flags of the command line, made of the settings that requests say of themselves.

    @click.command("convert")
    @with_flags(flags_of(Convert), (SHARD_SIZE, JSON))
    def convert_command(src, dst, **flags):
        convert(src, dst, **values_of(Convert, flags))

Only click and requests are imported, as for everything that `surgery --help` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_origin

import click

from surgery import settings
from surgery.cli.plain_flags import JSON as JSON
from surgery.cli.plain_flags import Flag
from surgery.cli.plain_flags import with_flags as with_flags
from surgery.conversion.request import Write

SHARD_SIZE = click.option("--shard-size", metavar="SIZE", help="Largest weight file of the output, where its format "
                          "has that option. [default: 5GB]")  # fmt: skip
DRY_RUN = click.option("--dry-run", is_flag=True, help="Show the plan: files, bytes, memory, what is dropped or "
                       "guessed; write nothing.")  # fmt: skip
ALLOW_UNKNOWN = click.option("--allow-unknown", multiple=True, metavar="NAME", help="Go on though this key of a "
                             "config, or this dtype of weights, is not understood. Repeatable.")  # fmt: skip


def OPTIONS(function: Callable[..., Any]) -> Callable[..., Any]:
    """-O, and the one option of all formats that has a flag of its own."""
    option = click.option("-O", "options", multiple=True, metavar="NAME=VALUE",
                          help="A choice of a format; see `surgery formats`. Repeatable.")  # fmt: skip
    return option(ALLOW_UNKNOWN(function))


def flags_of(cls: type, but: Collection[str] = ()) -> tuple[Flag, ...]:
    """A flag for every setting of a request, its own before those that it inherits."""
    owned = [f for c in cls.__mro__ for f in fields(cls) if f.name in vars(c).get("__annotations__", {})]
    chosen = [f for f in dict.fromkeys(owned) if settings.about(f) and f.name not in but]
    return tuple(flag_of(cls, f.name) for f in chosen)


def flag_of(cls: type, name: str) -> Flag:
    """The flag of one setting.  What is not given is None (or empty), so that a default stands in one place only."""
    f = next(f for f in fields(cls) if f.name == name)
    found = settings.about(f)
    assert found
    name, kind = settings.flag(f), settings.types_of(cls)[f.name][0]
    plain = {int: "N", float: "X"}.get(kind) if not found.choices else None
    more: dict[str, Any] = {"default": None, "metavar": found.metavar or plain, "help": found.help + _otherwise(f)}
    if f.default is MISSING and f.default_factory is MISSING:
        more |= {"required": True}
        del more["default"]
    if found.metavar == "FORMAT":
        more["shell_complete"] = formats
    if kind is bool:
        return click.option(f"{name}/--no-{name[2:]}" if f.default is True else name, f.name, **more, is_flag=True)
    if found.many:
        more |= {"default": (), "multiple": True}
    elif found.choices and not found.metavar:
        more["type"] = _Choice(found.choices, found.aliases)
    elif kind is int and found.metavar != "SIZE":
        low, high = (None if n is None else int(n) for n in (found.low, found.high))
        more["type"] = click.IntRange(low, high)
    elif kind is float:
        more["type"] = float
    return click.option(name, f.name, **more)


class _Choice(click.Choice[str]):
    """A choice that has other names as well."""

    def __init__(self, choices: Sequence[str], aliases: Mapping[str, str]) -> None:
        super().__init__(choices)
        self.aliases = aliases

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(self.aliases.get(value, value), param, ctx)


def formats(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """The names of formats that begin like this, for a shell that completes them."""
    from surgery.formats.registry import FORMATS

    return [name for name in FORMATS if name.startswith(begun)]


def _otherwise(f: Field[Any]) -> str:
    """The default as help shows it."""
    found, value = settings.about(f), f.default
    assert found
    if found.otherwise or not (value is MISSING or value in (None, (), "") or isinstance(value, bool)):
        return f" [default: {found.otherwise or value}]"
    return ""


def values_of(cls: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a request that flags give; of others its defaults hold.  Raises UsageError."""
    from surgery.units import parse_size

    out: dict[str, Any] = {}
    for f in fields(cls):
        value, found = flags.get(f.name), settings.about(f)
        if value in (None, ()) or not found:
            continue
        kind = settings.types_of(cls)[f.name][0]
        if found.metavar == "SIZE":
            value = parse_size(value, int(found.low or 1))
        elif get_origin(kind) is tuple and isinstance(value, str):
            value = _numbers(settings.flag(f), value)
        out[f.name] = value
    if issubclass(cls, Write):
        out["options"] = options_of(flags, out.get("to", Write.to))
    return out


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    from surgery.errors import UsageError

    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} {text!r}: write numbers, as 0,-1") from None


def options_of(flags: Mapping[str, Any], to: str | None = None) -> dict[str, str]:
    """What -O, --allow-unknown and, where a format is written, --shard-size say.  Raises UsageError."""
    from surgery.errors import UsageError
    from surgery.formats.registry import named

    out: dict[str, str] = {}
    for pair in flags["options"]:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"-O {pair}: write -O NAME=VALUE")
        if name in out:
            raise UsageError(f"-O {name} is given twice")
        out[name] = value
    if flags.get("allow_unknown"):
        given = [out["allow_unknown"]] if "allow_unknown" in out else []
        out["allow_unknown"] = ",".join((*given, *flags["allow_unknown"]))
    if to and flags.get("shard_size"):
        if "shard_size" not in named(to).option_names("write"):
            raise UsageError(f"--shard-size does not apply to {to}", hint="its files are given by the ranks")
        if "shard_size" in out:
            raise UsageError("--shard-size and -O shard_size are the same: give one of them")
        out["shard_size"] = flags["shard_size"]
    return out


FORCE, SYNC, MAX_MEMORY = (flag_of(Write, name) for name in ("force", "sync", "max_memory"))
