"""`surgery formats`: what can be read and written, and the options of each format.

surgery formats meta
"""

from __future__ import annotations

import json

import click

from surgery.cli.command import Command
from surgery.cli.flags import JSON
from surgery.cli.flags import formats as names


@click.command("formats", cls=Command)
@click.argument("name", required=False, shell_complete=names)
@JSON
def formats_command(name: str | None, as_json: bool) -> None:
    """List the formats, or the options of one, with their meaning and defaults."""
    from surgery.cli import show
    from surgery.formats.registry import FORMATS, named

    chosen = [named(name)] if name else list(FORMATS.values())
    data = show.formats_data(chosen)
    click.echo(json.dumps(data, indent=2)) if as_json else show.formats(data)
