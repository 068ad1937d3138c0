"""`surgery verify`: are two checkpoints the same model?

surgery verify SmolLM2 SmolLM2-meta --logits
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from surgery.cli.command import Command
from surgery.cli.flags import JSON, MAX_MEMORY, OPTIONS, options_of, with_flags
from surgery.cli.terminal import tell
from surgery.writing.progress import progress_bar


@click.command("verify", cls=Command)
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

        run = compare_logits(a, b, options=given, max_memory=memory, tell=None if as_json else tell)
    answer = Verified(result, run)
    if as_json:
        click.echo(json.dumps(answer.to_json(), indent=2))
    else:
        from surgery.cli import show_verification as render

        render.show(answer)
    sys.exit(0 if answer.same else 1)
