"""The flags of `surgery soup`, apart from those that every command that writes has.

    @main.command("soup")
    @soup_flags
    def soup_command(config, dst, **flags): ...

Only click is imported, as for everything that `surgery --help` shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from surgery.flags import no_sync

_FLAGS = (
    click.argument("config", type=click.Path()),
    click.argument("dst", type=click.Path()),
    click.option("--to", default="hf", show_default=True, metavar="FORMAT", help="The format to write."),
    click.option("--tp", type=click.IntRange(1), default=1, help="Tensor-parallel ranks of the output."),
    click.option("--pp", type=click.IntRange(0), default=1, help="Pipeline stages of the output; 0: none (neox)."),
    click.option("--vpp", type=click.IntRange(1), default=1, help="Virtual pipeline chunks per stage of the output."),
    click.option("--ep", type=click.IntRange(1), default=1, help="Expert-parallel ranks of the output."),
    click.option("--max-memory", metavar="SIZE", help="Memory for weights, e.g. 512MiB. The result is the same."),
    click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads that compute. [default: all cores]"),
    click.option(
        "--arithmetic",
        type=click.Choice(["fp32", "mergekit"]),
        default="fp32",
        show_default=True,
        help="fp32: round once, at the end. mergekit: work in the YAML's dtype, or the models', as mergekit does.",
    ),
    click.option("--greedy", is_flag=True, help="Keep only models that lower the loss on --eval, best first."),
    click.option("--search", type=click.IntRange(1), metavar="N", help="Try N weightings and take that with the "
                 "lowest loss on --eval."),
    click.option("--eval", "text", type=click.Path(), metavar="TEXT", help="A held-out text for --greedy or --search."),
    click.option("--eval-tokens", type=click.IntRange(8), default=8192, show_default=True, help="How much of it."),
    click.option("--device", metavar="NAME", help="Where --eval runs: cpu, cuda, ... [default: a GPU if there is one]"),
    click.option("--log", type=click.Path(), metavar="FILE", help="What was tried, one line each; tried weightings "
                 "are not tried again. [default: DST.tried.jsonl]"),
    click.option("--shard-size", metavar="SIZE", help="Largest weight file of Hugging Face output. [default: 5GB]"),
    click.option("--dry-run", is_flag=True, help="Show the plan: config, files, bytes, memory; write nothing."),
    click.option("--force", is_flag=True, help="Replace an existing output (once the new one is complete)."),
    click.option("--no-verify", is_flag=True, help="Do not read the output back."),
    no_sync,
)  # fmt: skip


def soup_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function all of them."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command
