"""`surgery report`: one or several runs as one HTML file.

surgery report runs/anneal -o anneal.html
"""

from __future__ import annotations

import json

import click

from surgery.cli.command import Command
from surgery.cli.flags import JSON


@click.command("report", cls=Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="The file to write. [default: report.html in the folder of the "
              "first run]")  # fmt: skip
@JSON
def report_command(runs: tuple[str, ...], output: str | None, as_json: bool) -> None:
    """Write report.html: what happened in one or several runs of `surgery midtrain`.

    \b
    surgery report runs/anneal                      while it runs, or when it has ended
    surgery report runs/seeds                       a folder of runs, and the soup that was made of them
    surgery report runs/dense runs/moe -o both.html

    Held-out losses, tasks, curves of training, speed, experts, data, self-tests, and where it all came from; several
    runs lie over each other. The file needs no network and follows the light or dark setting of whoever reads it. A
    report that is there is replaced.
    """
    from pathlib import Path

    from surgery.midtraining.report.page import write_report

    path = Path(output) if output else Path(runs[0]) / "report.html"
    titles = write_report(runs, path)
    click.echo(json.dumps({"report": str(path), "runs": titles}) if as_json else f"{path}: {', '.join(titles)}")
