"""The command line: each command parses, opens, calls one function and shows the result.

Only click is imported here; everything else is imported by the command that needs it, so that `--help` is instant.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from surgery.cli.attention import attention_command
from surgery.cli.command import LOG, Command
from surgery.cli.convert import convert_command
from surgery.cli.data import data_command
from surgery.cli.eval import eval_command
from surgery.cli.flags import JSON, MAX_MEMORY, OPTIONS, formats, options_of, with_flags
from surgery.cli.inspect import inspect_command
from surgery.cli.launch import launch_command
from surgery.cli.midtrain import midtrain_command
from surgery.cli.report import report_command
from surgery.cli.run import run_command
from surgery.cli.soup import soup_command
from surgery.cli.terminal import ASIDE, Stopped, lenient_streams, say, stoppable, talking
from surgery.cli.upcycle import experts_command, upcycle_command
from surgery.writing.progress import progress_bar

if TYPE_CHECKING:
    from surgery.errors import SurgeryError

atexit.register(gc.freeze)  # so that Python does not look through torch for garbage, most of a second, when it ends
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Group(click.Group):
    """Turns every SurgeryError into one message and an exit status: 2 for flags, 1 for everything else."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        from surgery.errors import SurgeryError, UsageError, reported

        lenient_streams()
        as_json = "--json" in ctx.args
        with talking():
            try:
                with stoppable(), reported():
                    return super().invoke(ctx)
            except SurgeryError as error:
                _fail(error, as_json)
            except click.exceptions.NoArgsIsHelpError:
                raise
            except click.UsageError as wrong:
                _fail(UsageError(wrong.format_message(), hint=_advice(wrong)), as_json)
            except Stopped as stopped:
                say(f"stopped by {signal.Signals(stopped.signum).name}", err=True)
                raise
            except KeyboardInterrupt:
                say("stopped by SIGINT", err=True)
                sys.exit(128 + signal.SIGINT)
            except BrokenPipeError:
                return _unread()


def _advice(wrong: click.UsageError) -> str:
    """What to look at; the formats, where one is missing."""
    if isinstance(wrong, click.MissingParameter) and wrong.param and wrong.param.metavar == "FORMAT":
        from surgery.formats.registry import FORMATS

        return f"formats: {', '.join(FORMATS)}"
    words = wrong.ctx.command_path.split()[1:] if wrong.ctx else []
    return " ".join(["surgery", *words, "--help"])


def _unread() -> NoReturn:
    """Nobody reads what is printed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _fail(error: SurgeryError, as_json: bool) -> NoReturn:
    from surgery.errors import UsageError

    if as_json:
        click.echo(json.dumps({"error": error.to_json()}, indent=2))
    say("error: ", err=True, fg="red", bold=True, nl=False)
    say(str(error), err=True)
    LOG.error("%s", error, extra={ASIDE: True})
    LOG.debug("it comes from", exc_info=error)
    signum = getattr(error, "signum", None)
    plain = 128 + signum if signum else 2 if isinstance(error, UsageError) else 1
    sys.exit(getattr(error, "status", plain))


@click.group(cls=Group, context_settings=CONTEXT, invoke_without_command=False)
@click.version_option(package_name="checkpoint-surgery", prog_name="surgery")
def main() -> None:
    """Convert, inspect and verify large-language-model checkpoints: bit for bit, in bounded memory, executing nothing.

    \b
    surgery inspect Llama-2-7b                              what is it?
    surgery convert Llama-2-7b Llama-2-7b-hf --to hf        Meta -> Hugging Face
    surgery convert SmolLM2 SmolLM2-meta --to meta --tp 3   Hugging Face -> Meta, 3 ranks
    surgery verify SmolLM2 SmolLM2-meta --logits            are they the same model?
    surgery upcycle SmolLM2 moe --experts 64 --top-k 8      dense -> mixture of experts, with a proof
    surgery midtrain run.yaml                               continue its pretraining, write it in any format
    surgery run recipe.yaml                                 many such steps in their order, each once
    surgery launch recipe.yaml --scheduler slurm            the same as jobs of a cluster
    surgery formats meta                                    what can be chosen for a format?
    """


@main.command("verify")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--logits", is_flag=True, help="Also run both through transformers, and find out what makes them differ.")
@with_flags((MAX_MEMORY, OPTIONS, JSON))
def verify_command(a: str, b: str, logits: bool, as_json: bool, **flags: Any) -> None:
    """Are two checkpoints, in any two formats and parallel sizes, the same model?

    Compares part by part and names every difference, then the configs field by field. What nobody understands on one
    side (a key of a config) makes it not the same; what had to be guessed is in the answer, too. The last line is the
    answer. Exit status 0: the same; 1: not.
    """
    from surgery.conversion.request import LEAST, default_memory
    from surgery.units import parse_size
    from surgery.verification import compare, open_both
    from surgery.verification.findings import Verified

    given = options_of(flags)
    left, right = open_both(a, b, given)
    memory = parse_size(flags["max_memory"], LEAST) if flags["max_memory"] else default_memory()
    total = sum(p.nbytes for c in (left, right) for p in c.parts.values())
    with progress_bar("verify", total, as_json) as advance:
        result = compare(left, right, max_memory=memory, progress=advance)
    run = None
    if logits:
        from surgery.verification.logits import compare_logits

        tell = None if as_json else lambda line: say(line, err=True)
        run = compare_logits(a, b, options=given, max_memory=memory, tell=tell)
    answer = Verified(result, run)
    if as_json:
        click.echo(json.dumps(answer.to_json(), indent=2))
    else:
        from surgery.cli import show_verification as render

        render.show(answer)
    sys.exit(0 if answer.same else 1)


@main.command("formats")
@click.argument("name", required=False, shell_complete=formats)
@JSON
def formats_command(name: str | None, as_json: bool) -> None:
    """List the formats, or the options of one, with their meaning and defaults."""
    from surgery.cli import show
    from surgery.formats.registry import FORMATS, named

    chosen = [named(name)] if name else list(FORMATS.values())
    data = show.formats_data(chosen)
    click.echo(json.dumps(data, indent=2)) if as_json else show.formats(data)


@main.command("ask")
@click.argument("path", type=click.Path())
@click.argument("question")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest answer.")
def ask_command(path: str, question: str, max_new_tokens: int) -> None:
    """Let a Hugging Face checkpoint answer a question (greedily, on the CPU): the quickest sign of life."""
    from surgery.running.chat import answer

    say(answer(path, question, max_new_tokens))


for command in (
    inspect_command,
    convert_command,
    soup_command,
    upcycle_command,
    experts_command,
    data_command,
    midtrain_command,
    attention_command,
    eval_command,
    report_command,
    run_command,
    launch_command,
):
    main.add_command(command)
