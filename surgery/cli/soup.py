"""`surgery soup`: merge models, perhaps after a search for the best ones or the best weights.

surgery soup merge_configs/three-seeds.yaml merged --greedy --eval held-out.txt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.command import Command
from surgery.cli.flags import DRY_RUN, JSON, OPTIONS, SHARD_SIZE, flags_of, values_of, with_flags
from surgery.cli.terminal import tell
from surgery.merging.request import Choosing, Soup
from surgery.writing.progress import progress_bar

if TYPE_CHECKING:
    from surgery.conversion.report import Report, Share
    from surgery.merging.recipe import Recipe


@click.command("soup", cls=Command)
@click.argument("config", type=click.Path())
@click.argument("dst", type=click.Path())
@with_flags(flags_of(Soup), flags_of(Choosing), (SHARD_SIZE, OPTIONS, DRY_RUN, JSON))
def soup_command(config: str, dst: str, as_json: bool, **flags: Any) -> None:
    """Merge models of any formats as a YAML of mergekit says, into any format.

    \b
    merge_method: linear                      every method and key of mergekit 0.1.5; a wrong key is an error
    models:                                   folders in any format and of any parallel sizes, hub ids, path+lora
      - {model: run-1, parameters: {weight: 1}}
      - {model: run-2, parameters: {weight: 1}}

    The config and the tokenizer are those of base_model, else of the first model named. Sums are fp32, rounded once;
    random methods follow `seed:`. The same YAML gives the same bits, whatever the memory and the threads. Ready-made
    files: merge_configs/.
    """
    from dataclasses import asdict
    from functools import partial

    from surgery.cli import show
    from surgery.merging import run
    from surgery.storage.address import is_address, parse
    from surgery.storage.outgoing import outgoing
    from surgery.writing.staging import check_free

    request = Soup(**values_of(Soup, flags), command=["surgery", *sys.argv[1:]])
    choosing = Choosing(**values_of(Choosing, flags))
    recipe = run.read(config)
    if flags["dry_run"]:
        planned = _planned(recipe, request)
        click.echo(json.dumps(planned, indent=2)) if as_json else show.plan(planned)
        return
    with outgoing(dst, request, partial(progress_bar, "push", quiet=as_json)) as place:
        check_free(place, request.force)
        recipe, tried = _chosen(recipe, request, choosing, parse(dst).name if is_address(dst) else dst)
        report = _merged(recipe, request, place, as_json)
    if as_json:
        click.echo(json.dumps({**asdict(report), **({"tried": tried} if tried else {})}, indent=2))
    else:
        show.report(report)


def _planned(recipe: Recipe, request: Soup) -> dict[str, Any]:
    """The plan as data, with the method and the models."""
    from surgery.cli.show import plan_data
    from surgery.errors import UsageError
    from surgery.merging import run
    from surgery.merging.way import TABLE, way

    if (chosen := way(recipe, request.to)).kind != TABLE:
        raise UsageError(f"there is no plan of such a merge: {chosen.why}", hint="leave out --dry-run")
    with run.prepared(recipe, request) as plan:
        more = {"merge": f"merge, by {run.summary(recipe)}", "models": [str(m) for m in recipe.models()]}
        return {**plan_data(plan), **more, "method": recipe.method}


def _chosen(recipe: Recipe, request: Soup, choosing: Choosing, dst: str) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe that --greedy or --search finds, and what was tried; the recipe itself without these flags."""
    if not choosing.method:
        return recipe, None
    from surgery.errors import UsageError
    from surgery.merging import search
    from surgery.merging.way import TABLE, way

    if (chosen := way(recipe, request.to)).kind != TABLE:
        raise UsageError(f"--{choosing.method} cannot choose among these models: {chosen.why}")
    log = Path(choosing.log or f"{dst}.tried.jsonl")
    tried = search.Tried(recipe, request, choosing, log, tell)
    best = search.search(tried, choosing.search) if choosing.search else search.greedy(tried)
    return best, tried.to_json()


def _merged(recipe: Recipe, request: Soup, dst: Path, quiet: bool) -> Report | Share:
    """Merge, and show how far it is."""
    from surgery.merging import run

    return run.merge(recipe, dst, request, lambda total: progress_bar("merge", total, quiet))
