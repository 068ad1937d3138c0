"""`surgery launch`: the steps of a recipe as jobs of Slurm or PBS.

surgery launch recipes/llemma-7b.yaml --scheduler slurm --write-only scripts
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from surgery.cli.command import Command
from surgery.cli.plain_flags import JSON, with_flags
from surgery.cli.run import FOLDER, FROM, SET, SMALL, STEP
from surgery.cli.terminal import say

SELFTEST = Path("runs/launch-selftest")


SECTIONS = {
    "Steps": "step from after",
    "The recipe": "set small folder",
    "The scheduler": "scheduler site template show-template selftest write-only",
}


@click.command("launch", cls=Command, sections=SECTIONS)
@click.argument("words", nargs=-1, metavar="RECIPE | status RECIPE", type=click.Path())
@click.option("--scheduler", type=click.Choice(["slurm", "pbs"]), help="[default: what launch.yaml says]")
@click.option("--site", type=click.Path(), metavar="FILE", help="Account, partition, modules, container and the like. "
              "[default: launch.yaml, if there is one]")  # fmt: skip
@click.option("--after", multiple=True, metavar="JOBID", help="Begin when this job has ended well. Repeatable.")
@click.option("--write-only", type=click.Path(), metavar="DIR", help="Write the scripts there; submit nothing.")
@with_flags((STEP, FROM, SET, SMALL, FOLDER))
@click.option("--template", type=click.Path(), metavar="FILE", help="A script of your own instead of ours.")
@click.option("--show-template", is_flag=True, help="Print the script that is filled in, to start your own from.")
@click.option("--selftest", is_flag=True, help="Submit jobs of a second, with an array and one that fails, and check "
              "what becomes of them.")  # fmt: skip
@JSON
def launch_command(words: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Submit the steps of a recipe that are not done as jobs, each after those that it needs.

    \b
    scheduler: slurm                                     # launch.yaml
    account: llm
    partition: gpu
    modules: [cuda/12.8]
    setup: source ~/venv/bin/activate

    \b
    surgery launch --selftest                            does it work here? about a minute
    surgery launch recipe.yaml --write-only scripts      only look at the scripts
    surgery launch recipe.yaml --set tp=8                submit all of it
    surgery launch status recipe.yaml                    what became of it?
    surgery launch recipe.yaml                           once more: what failed or was stopped, and what comes after it

    The scheduler keeps the order (afterok), so nothing has to run on the login node. A job runs the same step as
    `surgery run` does and records the same, so a graph that is submitted twice does nothing twice. Before its time
    limit a step is told to stop in order, and its job is queued again.
    """
    from dataclasses import replace

    from surgery.errors import UsageError
    from surgery.jobs.schedulers import scheduler_of
    from surgery.jobs.scripts import template_of
    from surgery.jobs.site import read_site

    site = read_site(flags["site"])
    if flags["template"]:
        site = replace(site, template=str(Path(flags["template"]).absolute()))
    if words[:1] == ("status",):
        return _status(words[1:], flags, as_json)
    scheduler = scheduler_of(flags["scheduler"], site)
    if flags["show_template"]:
        return say(template_of(scheduler, site), nl=False)
    if flags["selftest"]:
        return _selftest(scheduler, site, Path(flags["folder"] or SELFTEST), as_json)
    if len(words) != 1:
        raise UsageError("which recipe? give one", hint="surgery launch RECIPE, or surgery launch status RECIPE")
    _launch(words[0], scheduler, site, flags, as_json)


def _launch(path: str, scheduler: Any, site: Any, flags: Any, as_json: bool) -> None:
    from surgery.cli.recipe_commands import check_commands
    from surgery.jobs.graph import graph_of
    from surgery.jobs.launch import launch
    from surgery.jobs.run import chosen

    recipe = _recipe(path, flags)
    steps = graph_of(recipe, path)
    wanted = chosen(steps, flags["only"], flags["start"])
    check_commands(wanted, click.get_current_context().find_root().command, path)
    target = Path(flags["write_only"]) if flags["write_only"] else None
    done = launch(recipe, steps, wanted, scheduler, site, after=flags["after"], write_only=target)
    if as_json:
        return click.echo(json.dumps(done.to_json(), indent=2))
    for name, job in done.jobs.items():
        number = f"{' '.join(job.ids)}  " if job.ids else ""
        say(f"{number}{name}  {job.script}" + (f"  after {', '.join(job.needs)}" if job.needs else ""))


def _recipe(path: str, flags: Any) -> Any:
    from surgery.jobs.recipe import read_recipe

    return read_recipe(path, sets=flags["sets"], small=flags["small"], folder=flags["folder"])


def _status(words: tuple[str, ...], flags: Any, as_json: bool) -> None:
    from surgery.cli import show_run
    from surgery.errors import UsageError
    from surgery.jobs.graph import graph_of
    from surgery.jobs.queue import status
    from surgery.jobs.recipe import read_recipe

    if len(words) != 1:
        raise UsageError("status of which recipe? give it, or the folder of its run")
    folder = Path(_recipe(words[0], flags).folder)
    lines = list(status(folder, graph_of(read_recipe(folder, folder=str(folder)))))
    if as_json:
        return click.echo(json.dumps([line.to_json() for line in lines], indent=2))
    show_run.jobs(lines)


def _selftest(scheduler: Any, site: Any, folder: Path, as_json: bool) -> None:
    from surgery.jobs.selftest import selftest

    checks = list(selftest(scheduler, site, folder, look=lambda lines: None))
    if as_json:
        click.echo(json.dumps([vars(check) for check in checks], indent=2))
    else:
        for check in checks:
            say(f"{'good' if check.good else 'BAD '}  {check.what}" + ("" if check.good else f": {check.seen}"))
    sys.exit(0 if all(check.good for check in checks) else 1)
