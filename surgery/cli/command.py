"""A command with the flags that all have in common, and its help in sections.

    @click.command("convert", cls=Command)
    def convert_command(...): ...

How much is said is the level of the standard logger `surgery`: --quiet is WARNING, nothing INFO, --verbose DEBUG.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import click

LOG = logging.getLogger("surgery")
FEW = 10  # flags that need no sections
REST = "Running"
Sections = Mapping[str, str]
# the sections of help, and the flags in each, of commands that have none of their own; REST has all others
SECTIONS: Sections = {
    "Source": "from O",
    "Mixture": "experts top-k strategy granularity target shared dense-layers source attention attention-experts "
               "attention-top-k collapse keep prune best by merge permute duplicate recipe",
    "Neurons and router": "router scale normalise order sharing text text-tokens reinit reinit-indices noise seed",
    "Choosing models": "greedy search eval eval-tokens log arithmetic",
    "Output": "to tp pp vpp ep dtype optimizer vocab-size tokenizer allow shard-size force",
    "Proof": "force-lossy verify verify-tokens",
}  # fmt: skip


class Command(click.Command):
    """Every command but groups; `sections` of its own, where its flags mean other things than elsewhere."""

    def __init__(self, *args: Any, sections: Sections = SECTIONS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        taken = {name for parameter in self.params for name in parameter.opts}
        self.params += [flag for flag in _talk() if not taken.intersection(flag.opts)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One list of a few flags, sections of many."""
        found = [
            (p.opts[-1].lstrip("-"), record)
            for p in self.get_params(ctx)
            if isinstance(p, click.Option) and (record := p.get_help_record(ctx))
        ]
        if len(found) - len(_talk()) <= FEW:
            return super().format_options(ctx, formatter)
        left = dict(found)
        for title, names in self.sections.items():
            if rows := [left.pop(name) for name in names.split() if name in left]:
                with formatter.section(title):
                    formatter.write_dl(rows)
        with formatter.section(REST):
            formatter.write_dl(list(left.values()))
        return None


def _talk() -> list[click.Option]:
    return [
        click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_level(logging.WARNING),
                     help="Print errors only."),
        click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_level(logging.DEBUG),
                     help="Say on stderr what is done, and where an error comes from."),
        click.Option(["--log-file"], type=click.Path(), metavar="FILE", expose_value=False, callback=_log_file,
                     help="Append progress, notes and errors, with times, to this file."),
    ]  # fmt: skip


def _level(level: int) -> Any:
    def called(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            LOG.setLevel(level)

    return called


def _log_file(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    from surgery.errors import OutputError

    if not path:
        return
    try:
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", file=path) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(handler)


def talk() -> list[str]:
    """The flags that make another process of surgery say as much, and where this one does."""
    files = [h.baseFilename for h in LOG.handlers if isinstance(h, logging.FileHandler)]
    level = "--quiet" if quiet() else "--verbose" if LOG.level == logging.DEBUG else ""
    return [*[level] * bool(level), *(word for file in files for word in ("--log-file", file))]


def quiet() -> bool:
    """Whether only errors are to be printed."""
    return LOG.level >= logging.WARNING
