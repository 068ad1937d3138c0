"""`surgery pull`: what lies at an address into a folder.

surgery pull s3://bucket/SmolLM2-moe SmolLM2-moe
"""

from __future__ import annotations

import json
from typing import Any

import click

from surgery.cli.command import Command
from surgery.cli.flags import JSON, flags_of, with_flags
from surgery.storage.pull import Pull
from surgery.writing.progress import progress_bar

DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be fetched; fetch nothing.")


@click.command("pull", cls=Command)
@click.argument("address")
@click.argument("folder", type=click.Path())
@with_flags(flags_of(Pull), (DRY_RUN, JSON))
def pull_command(address: str, folder: str, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Pull what lies at an address into a folder: in parallel, resumable, there whole or not at all.

    \b
    surgery pull s3://my-bucket/SmolLM2-moe SmolLM2-moe
    surgery pull hf://HuggingFaceTB/SmolLM2-135M SmolLM2-135M
    surgery pull https://olmo-checkpoints.org/ai2-llm/peteish7/step1000-unsharded OLMo2 --dry-run

    Files of the same names are in the way unless --force is given; all others in the folder are left alone. Repeat the
    command after a kill. To look at a checkpoint or to convert it, nothing needs to be pulled: give its address.
    """
    from dataclasses import asdict

    from surgery.cli import show_push as show
    from surgery.storage import pull

    plan = pull.prepare(address, folder)
    if dry_run:
        planned = show.to_pull(plan)
        click.echo(json.dumps(planned, indent=2)) if as_json else show.plan(planned)
        return
    with progress_bar("pull", plan.bytes, as_json) as advance:
        done = pull.carried_out(plan, Pull(**{k: v for k, v in flags.items() if v is not None}, progress=advance))
    click.echo(json.dumps(asdict(done), indent=2)) if as_json else show.pulled(asdict(done))
