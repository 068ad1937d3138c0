"""`surgery inspect`: what lies at a path, whatever it is.

surgery inspect Llama-2-7b --tensors
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.command import Command
from surgery.cli.flags import JSON, OPTIONS, formats, options_of, with_flags
from surgery.writing.progress import progress_bar

if TYPE_CHECKING:
    from surgery.formats.base import Checkpoint


@click.command("inspect", cls=Command)
@click.argument("path", type=click.Path())
@click.option(
    "--from", "from_", metavar="FORMAT", shell_complete=formats, help="The format, where a folder holds several."
)
@click.option("--tensors", is_flag=True, help="List every part, or every tensor of a file, with its shape and dtype.")
@click.option("--pickles", is_flag=True, help="List the names that pickles mention. None is ever imported.")
@click.option("--scan", is_flag=True, help="Read all weights once and look for NaN and Inf.")
@click.option("--try-text", type=click.Path(), metavar="FILE", help="Where the files can be read in several ways: "
              "which reading predicts this text? Converts and runs each.")  # fmt: skip
@click.option("--tokenizer", type=click.Path(), help="Of --try-text, where the checkpoint has none.")
@with_flags((OPTIONS, JSON))
def inspect_command(path: str, as_json: bool, **flags: Any) -> None:
    """Say what lies at a path, without loading it: a checkpoint, a file, or anything else, and what to do next.

    \b
    surgery inspect Llama-2-7b              format, family, sizes, parameters, dtypes, files, tokenizer
    surgery inspect Llama-2-7b --tensors    every part of the model
    surgery inspect pytorch_model.bin --pickles     the tensors of a file, and the names in its pickle
    surgery inspect runs                    the checkpoints in it

    Exit status 1 if it is damaged, or a checkpoint that cannot be read.
    """
    from surgery.errors import SurgeryError, UsageError
    from surgery.formats.registry import describe, known, located, open_checkpoint
    from surgery.recognising import unread

    if flags["tokenizer"] and not flags["try_text"]:
        raise UsageError("--tokenizer goes with --try-text")
    if flags["try_text"]:
        return _try_text(path, flags, as_json)
    place = located(path)
    if not (flags["from_"] or known(place)):
        return _answer(describe(place), flags, as_json)
    try:
        options = {"allow_unknown": "*", **options_of(flags)}  # what is not understood is a note
        checkpoint = open_checkpoint(path, format=flags["from_"], options=options)
    except UsageError:
        raise
    except SurgeryError:  # what lies there is said all the same; then why it cannot be read
        if not (as_json or flags["from_"]):
            _show(unread(place, str(known(place))), {**flags, "tensors": False})
        raise
    _checkpoint(checkpoint, flags, as_json)


def _answer(answer: Any, flags: dict[str, Any], as_json: bool) -> None:
    from surgery.errors import FileError, UsageError

    if flags["scan"]:
        raise UsageError(f"--scan needs a checkpoint, and this is {answer.what}", hint="; ".join(answer.next) or None)
    if as_json:
        click.echo(json.dumps(answer.to_json(flags["tensors"]), indent=2))
        sys.exit(1 if answer.problem else 0)
    _show(answer, flags)
    if answer.problem:
        raise FileError(answer.problem)


def _show(answer: Any, flags: dict[str, Any]) -> None:
    from surgery.cli import show_answer

    show_answer.answer(answer, tensors=flags["tensors"], pickles=flags["pickles"])


def _checkpoint(checkpoint: Checkpoint, flags: dict[str, Any], as_json: bool) -> None:
    from surgery.cli import show
    from surgery.conversion import inspection
    from surgery.conversion.request import default_memory

    found = inspection.describe(checkpoint, tensors=flags["tensors"], pickles=flags["pickles"])
    if flags["scan"]:
        total = sum(p.nbytes for p in checkpoint.parts.values())
        with progress_bar("scan", total, as_json) as advance:
            found["scan"] = inspection.scan(checkpoint, default_memory(), advance)
    click.echo(json.dumps(found, indent=2)) if as_json else show.inspection(found)


def _try_text(path: str, flags: dict[str, Any], as_json: bool) -> None:
    from surgery.cli import show_verification as render
    from surgery.verification.ambiguity import try_readings

    tried = try_readings(path, flags["try_text"], format=flags["from_"], options=options_of(flags),
                         tokenizer=flags["tokenizer"])  # fmt: skip
    click.echo(json.dumps(tried.to_json(), indent=2)) if as_json else render.readings(tried)
