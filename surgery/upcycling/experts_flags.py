"""The flags of `surgery experts`; only click is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_WHICH = "[LAYERS:]EXPERTS"


def experts_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with its arguments and flags."""
    for decorate in reversed(_FLAGS):
        command = decorate(command)
    return command


_FLAGS = (
    click.argument("src", type=click.Path()),
    click.argument("dst", type=click.Path()),
    click.option("--keep", multiple=True, metavar=_WHICH, help="Keep these experts, e.g. 0-3,6; with layers in front "
                 "(3-5:0,1) in these layers. Repeatable."),
    click.option("--drop", multiple=True, metavar=_WHICH, help="Leave these experts out. Repeatable."),
    click.option("--prune", multiple=True, metavar="[LAYERS:]N", help="Keep the N experts of largest norm (--by)."),
    click.option("--by", type=click.Choice(["router-norm", "weight-norm"]), help="What --prune goes by: rows of the "
                 "router, or the experts' own weights. [default: router-norm]"),
    click.option("--merge", multiple=True, metavar="[LAYERS:]GROUPS", help="Average experts with each other, e.g. "
                 "0+1,2+3; their rows of the router too. Repeatable."),
    click.option("--permute", multiple=True, metavar=_WHICH, help="Put the experts into this order. Repeatable."),
    click.option("--duplicate", type=click.IntRange(1), help="Copies of every expert in the end; top-k grows along, so "
                 "that the function stays."),
    click.option("--top-k", type=click.IntRange(1), help="How many experts a token uses from now on."),
    click.option("--recipe", type=click.Path(), metavar="YAML", help="The same fields from a file, `layers:` for "
                 "choices by layer."),
    click.option("--force-lossy", is_flag=True, help="Allow virtual groups to be broken."),
    click.option("--to", default="hf", show_default=True, metavar="FORMAT", help="The format to write."),
    click.option("--tp", type=click.IntRange(1), default=1, help="Tensor-parallel ranks of the output."),
    click.option("--pp", type=click.IntRange(0), default=1, help="Pipeline stages of the output."),
    click.option("--vpp", type=click.IntRange(1), default=1, help="Virtual pipeline chunks per stage of the output."),
    click.option("--ep", type=click.IntRange(1), default=1, help="Expert-parallel ranks of the output."),
    click.option("--dtype", type=click.Choice(["keep", "bf16", "fp16", "fp32"]), default="keep", show_default=True,
                 help="Cast the weights."),
    click.option("--max-memory", metavar="SIZE", help="Memory for weights, e.g. 512MiB."),
    click.option("--shard-size", metavar="SIZE", help="Largest weight file of Hugging Face output. [default: 5GB]"),
    click.option("--verify-tokens", type=click.IntRange(0), default=512, show_default=True, help="Run source and "
                 "result on so many tokens and compare; 0: do not."),
    click.option("--dry-run", is_flag=True, help="Show the plan."),
    click.option("--force", is_flag=True, help="Replace an existing output (once the new one is complete)."),
    click.option("--no-verify", is_flag=True, help="Neither read the output back nor run it."),
)  # fmt: skip
