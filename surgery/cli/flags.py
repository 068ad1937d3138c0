"""Flags that several commands have, and what they mean.

    @click.command("soup")
    @with_flags(PARALLEL, (OPTIONS, SHARD_SIZE, JSON))
    def soup_command(**flags):
        topology(flags), options_of(flags)

Only click is imported, as for everything that `surgery --help` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from surgery.formats.table import Topology

Flag = Callable[[Callable[..., Any]], Callable[..., Any]]

PARALLEL: tuple[Flag, ...] = (
    click.option("--tp", type=click.IntRange(1), default=1, help="Tensor-parallel ranks of the output."),
    click.option("--pp", type=click.IntRange(0), default=1, help="Pipeline stages of the output; 0: none (neox)."),
    click.option("--vpp", type=click.IntRange(1), default=1, help="Virtual pipeline chunks per stage of the output."),
    click.option("--ep", type=click.IntRange(1), default=1, help="Expert-parallel ranks of the output."),
)
TO = click.option("--to", default="hf", show_default=True, metavar="FORMAT", help="The format to write.")
DTYPE = click.option("--dtype", type=click.Choice(["keep", "bf16", "fp16", "fp32"]), default="keep", show_default=True,
                     help="Cast the weights before anything else; by default every bit is kept.")  # fmt: skip
MAX_MEMORY = click.option("--max-memory", metavar="SIZE", help="Memory for weights, e.g. 512MiB; the result is the "
                          "same. [default: a quarter of what is free, at most 2GiB]")  # fmt: skip
SHARD_SIZE = click.option("--shard-size", metavar="SIZE", help="Largest weight file (hf, olmo-core). "
                          "[default: 5GB]")  # fmt: skip
FORCE = click.option("--force", is_flag=True, help="Replace an existing output (once the new one is complete).")
NO_VERIFY = click.option("--no-verify", is_flag=True, help="Do not read the output back.")
NO_SYNC = click.option("--no-sync", is_flag=True, help="Do not wait until the disk has the output: sooner done; after "
                       "a power cut it may be spoilt.")  # fmt: skip
OPTIONS = click.option("-O", "options", multiple=True, metavar="NAME=VALUE", help="A choice of a format; see `surgery "
                       "formats`. Repeatable.")  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def with_flags(*groups: Sequence[Flag]) -> Flag:
    """A decorator that gives a command all flags of these groups, in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed([flag for group in groups for flag in group]):
            function = flag(function)
        return function

    return decorate


def topology(flags: Mapping[str, Any]) -> Topology:
    """What --tp, --pp, --vpp and --ep say."""
    from surgery.formats.table import Topology

    return Topology(tp=flags["tp"], pp=flags["pp"], ep=flags["ep"], vpp=flags["vpp"])


def options_of(flags: Mapping[str, Any]) -> dict[str, str]:
    """What -O and --shard-size say.  Raises UsageError."""
    from surgery.errors import UsageError
    from surgery.formats.registry import FORMATS

    out: dict[str, str] = {}
    for pair in flags["options"]:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"-O {pair}: write -O NAME=VALUE")
        if name in out:
            raise UsageError(f"-O {name} is given twice")
        out[name] = value
    if flags.get("shard_size"):
        target = FORMATS.get(flags["to"])
        if target and "shard_size" not in target.option_names("write"):
            raise UsageError(f"--shard-size does not apply to {flags['to']}", hint="its files are given by the ranks")
        out["shard_size"] = flags["shard_size"]
    return out


def size(text: str | None) -> int | None:
    """The bytes that a size like 512MiB means.  Raises UsageError."""
    if text is None:
        return None
    from surgery.units import parse_size

    return parse_size(text)
