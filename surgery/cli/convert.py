"""`surgery convert`: a checkpoint of any format into another.

surgery convert Llama-2-7b Llama-2-7b-hf --to hf
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from surgery.cli.command import Command
from surgery.cli.flags import DRY_RUN, JSON, OPTIONS, SHARD_SIZE, flags_of, values_of, with_flags
from surgery.conversion.request import Convert
from surgery.writing.progress import progress_bar


@click.command("convert", cls=Command)
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@with_flags(flags_of(Convert), (SHARD_SIZE, OPTIONS, DRY_RUN, JSON))
def convert_command(src: str, dst: str, as_json: bool, **flags: Any) -> None:
    """Convert a checkpoint into another format, at any parallel sizes.

    \b
    surgery convert Llama-2-7b Llama-2-7b-hf --to hf
    surgery convert SmolLM2 SmolLM2-meta --to meta --tp 3
    surgery convert run/iter_0005000 out --to hf --tokenizer SmolLM2 --dtype bf16
    surgery convert Mixtral-8x7B mcore --to megatron-dist --tp 2 --ep 8 --dry-run      only the plan

    Each byte is read once and written once, in bounded memory. The output is read back and compared before it
    appears under its name; it appears whole or not at all. A run that was killed goes on when it is repeated.
    """
    from dataclasses import asdict
    from functools import partial

    from surgery.cli import show
    from surgery.conversion.convert import carried_out, prepare, task_of
    from surgery.storage.outgoing import outgoing
    from surgery.writing.staging import check_free

    request = Convert(**values_of(Convert, flags), command=["surgery", *sys.argv[1:]])
    plan = prepare(src, request)
    if flags["dry_run"]:
        planned = show.plan_data(plan)
        click.echo(json.dumps(planned, indent=2)) if as_json else show.plan(planned)
        return
    with outgoing(dst, request, partial(progress_bar, "push", quiet=as_json)) as place:
        check_free(place, request.force)
        with progress_bar("convert", plan.bytes_to_write, as_json) as advance:
            report = carried_out(plan, place, request, task_of(src, place, request), advance)
    click.echo(json.dumps(asdict(report), indent=2)) if as_json else show.report(report)
