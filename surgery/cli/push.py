"""`surgery push`: a folder to a bucket or the hub.

surgery push SmolLM2-moe s3://bucket/SmolLM2-moe
"""

from __future__ import annotations

import json
from typing import Any

import click

from surgery.cli.command import Command
from surgery.cli.flags import JSON, flags_of, with_flags
from surgery.storage.push import Push
from surgery.writing.progress import progress_bar

DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be sent; send nothing.")


@click.command("push", cls=Command)
@click.argument("folder", type=click.Path())
@click.argument("address")
@with_flags(flags_of(Push), (DRY_RUN, JSON))
def push_command(folder: str, address: str, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Push a folder to a bucket or the hub: checked, resumable, and read by nobody before all of it is there.

    \b
    surgery push SmolLM2-moe s3://my-bucket/SmolLM2-moe
    surgery push SmolLM2-moe r2://my-bucket/SmolLM2-moe --dry-run
    surgery push SmolLM2-moe hf://me/SmolLM2-moe                 one commit, with a model card

    The place must be empty, or hold what an earlier push of the same files left there: repeat the command after a kill.
    Weights are sent first, config.json and surgery.json last, and each object is compared with its file.
    """
    from dataclasses import asdict, replace

    from surgery.cli import show_push as show
    from surgery.storage import push
    from surgery.storage.contents import size_of_folder

    with progress_bar("read", size_of_folder(folder), as_json) as advance:
        request = Push(**{k: v for k, v in flags.items() if v is not None}, progress=advance)
        plan = push.prepare(folder, address, request)
    if dry_run:
        planned = show.planned(plan)
        click.echo(json.dumps(planned, indent=2)) if as_json else show.plan(planned)
        return
    with progress_bar("push", plan.bytes_to_send, as_json) as advance:
        done = push.carried_out(plan, folder, replace(request, progress=advance))
    click.echo(json.dumps(asdict(done), indent=2)) if as_json else show.pushed(asdict(done))
