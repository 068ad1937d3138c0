"""`surgery run`: the steps of a recipe, each once.

surgery run recipes/quickstart.yaml --dry-run
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from surgery.cli.command import Command
from surgery.cli.plain_flags import JSON, with_flags

SET = click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="Change a variable or the path of an "
                   "input; of a step: take its output from that path and do not run it. Repeatable.")  # fmt: skip
SMALL = click.option("--small", is_flag=True, help="The recipe's small twin, for a laptop.")
FOLDER = click.option("--folder", type=click.Path(), metavar="DIR", help="Where outputs, records and logs go. "
                      "[default: the recipe's, or runs/RECIPE]")  # fmt: skip
STEP = click.option("--step", "only", multiple=True, metavar="NAME", help="Only this step; those before it must be "
                    "done. Repeatable.")  # fmt: skip
FROM = click.option("--from", "start", multiple=True, metavar="NAME", help="Only this step and all that come after it. "
                    "Repeatable.")  # fmt: skip


SECTIONS = {
    "Steps": "step from again accept",
    "The recipe": "set small folder",
}


@click.command("run", cls=Command, sections=SECTIONS)
@click.argument("recipe", type=click.Path())
@with_flags((STEP, FROM))
@click.option("--dry-run", is_flag=True, help="Show the steps, what would be run and why, bytes and minutes where they "
              "are known; write nothing.")  # fmt: skip
@with_flags((SET, SMALL, FOLDER))
@click.option("-j", "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Steps at a time.")
@click.option("--again", is_flag=True, help="Run the steps though they are done.")
@click.option("--accept", is_flag=True, help="Run nothing: take the outputs that are there for those of the steps.")
@click.option("-v", "--verbose", is_flag=True, help="Show each command and all that it prints.")
@JSON
def run_command(recipe: str, dry_run: bool, verbose: bool, as_json: bool, **flags: Any) -> None:
    """Run the steps of a recipe that are not done, in their order.

    \b
    inputs: {model: SmolLM2-135M}                        # recipe.yaml; files and folders from elsewhere
    vars:   {tp: 3}
    steps:
      meta: {surgery: convert $model $out --to meta --tp $tp}
      back: {surgery: convert $meta $out --to hf}        # reads what `meta` makes, so it comes after it
      same: {surgery: verify $model $back}

    \b
    surgery run recipe.yaml --dry-run                    what would be run, and why?
    surgery run recipe.yaml                              all of it; again: what is not done, or has changed
    surgery run recipe.yaml --step back --again          one step once more
    surgery run recipe.yaml --set tp=1 --set meta=/data/llama-meta

    A step is done when its record says so, what it reads, its command, its config and the version of surgery are the
    same, and its outputs are still what they were: by content, whatever their times. Stop it or kill it at any point
    and run it again: what is done is not repeated. `surgery launch` submits the same recipe to a cluster.
    """
    from surgery.cli.recipe_commands import check_commands
    from surgery.errors import UsageError
    from surgery.jobs.graph import graph_of
    from surgery.jobs.recipe import read_recipe
    from surgery.jobs.run import accept, chosen, run

    if flags["jobs"] > 1 and verbose:
        raise UsageError("--verbose goes with one step at a time")
    asked = read_recipe(recipe, sets=flags["sets"], small=flags["small"], folder=flags["folder"])
    steps = graph_of(asked, recipe)
    wanted = chosen(steps, flags["only"], flags["start"])
    check_commands(wanted, click.get_current_context().find_root().command, recipe)
    if dry_run:
        return _foresee(steps, wanted, flags["again"], as_json)
    if flags["accept"]:
        board = accept(steps, wanted)
    else:
        with _view(verbose, as_json) as view:
            board = run(steps, wanted, jobs=flags["jobs"], again=flags["again"], view=view)
    if as_json:
        click.echo(json.dumps(board.to_json(), indent=2))
    if board.failure:
        raise board.failure


def _foresee(steps: Any, wanted: Any, again: bool, as_json: bool) -> None:
    from surgery.jobs.forecast import forecast

    lines = list(forecast(steps, wanted, again))
    if as_json:
        click.echo(json.dumps([line.to_json() for line in lines], indent=2))
        return
    from surgery.cli import show_run

    show_run.forecast(lines)


def _view(verbose: bool, as_json: bool) -> Any:
    from surgery.cli import show_run

    if as_json:
        return show_run.silent()
    if verbose:
        return show_run.followed()
    return show_run.table() if sys.stdout.isatty() else show_run.lines()
