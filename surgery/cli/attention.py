"""`surgery attention show`: what each kind of sparse attention sees, in figures and as a picture.

surgery attention show --n 1024 --heads 16 spattention -o masks.png

Only click is imported here; everything else when it is used, so that `--help` is instant.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from surgery.cli.command import Command
from surgery.cli.flags import JSON

MOST = 1 << 28  # pairs of a mask


@click.group("attention")
def attention_command() -> None:
    """What sparse attention sees."""


@attention_command.command("show", cls=Command)
@click.argument("kinds", nargs=-1, metavar="[KIND]...")
@click.option("--n", "length", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of a row.")
@click.option("--heads", type=click.IntRange(1), default=16, show_default=True, help="Heads of a layer.")
@click.option("--reference-len", type=click.IntRange(1), help="The length that it is made for, if not that of the row.")
@click.option("--window", type=click.IntRange(1), help="Of sliding, longformer, bigbird, reformer.")
@click.option("--globals", "globals_", type=click.IntRange(1), help="Of longformer, bigbird.")
@click.option("--stride", type=click.IntRange(1), help="Of bigbird.")
@click.option("--buckets", type=click.IntRange(1), help="Of reformer.")
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="Draw the masks: masks.png or masks.html.")
@JSON
def show_command(
    kinds: Sequence[str], length: int, heads: int, reference_len: int | None, window: int | None,
    globals_: int | None, stride: int | None, buckets: int | None, output: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Say how much of full attention each KIND computes (all of them, if none is named), and draw what heads see.

    \b
    surgery attention show                                            every kind, 16 heads, 1024 tokens
    surgery attention show --n 1024 --heads 16 spattention -o masks.html
    surgery attention show --n 4096 --heads 32 longformer --window 512 -o masks.png

    In a run: `attention: spattention`, or `attention: {kind: longformer, window: 512}`.
    """
    from pathlib import Path

    from surgery.cli import show_attention
    from surgery.errors import UsageError
    from surgery.formats.hf.hub.sparse_patterns import KINDS, pattern_of
    from surgery.midtraining.masks.figures import figures
    from surgery.midtraining.masks.picture import drawn, html, png
    from surgery.writing.atomic import atomic_file

    numbers = {"window": window, "globals": globals_, "stride": stride, "buckets": buckets}
    given = {name: value for name, value in numbers.items() if value is not None}
    if length * length * heads > MOST:
        raise UsageError(f"masks of {heads} heads for {length:,} tokens are too large to be drawn")
    if output and Path(output).suffix not in (".png", ".html"):
        raise UsageError(f"{output}: a picture is a .png or an .html")
    try:
        patterns = [pattern_of(kind, reference_len or length, heads, given) for kind in kinds or KINDS]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if output:
        made = html(patterns, length).encode() if output.endswith(".html") else png(drawn(patterns, length))
        with atomic_file(output) as file:
            file.write(made)
    found = [figures(pattern, length) for pattern in patterns]
    click.echo(json.dumps([f.to_json() for f in found], indent=2)) if as_json else show_attention.table(found)
