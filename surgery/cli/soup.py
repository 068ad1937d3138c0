"""What `surgery soup` does between its flags and what it shows.

recipe, tried = chosen(recipe, settings, dst, flags, print)      # --greedy and --search
report = execute(recipe, settings, dst, flags, progress)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from surgery.conversion.convert import Plan, Report
from surgery.errors import UsageError
from surgery.merging import run
from surgery.merging.mergekit import by_mergekit, reason_for_mergekit
from surgery.merging.recipe import Recipe
from surgery.writing import stream

Bar = Callable[[int], AbstractContextManager[stream.Progress]]


def dry_run(recipe: Recipe, settings: run.Settings, data: Callable[[Plan], dict[str, Any]]) -> dict[str, Any]:
    """The plan as data, by `data`; with the method and the models."""
    if why := reason_for_mergekit(recipe, settings.to):
        raise UsageError(f"mergekit would do this merge, and it makes no plan: {why}", hint="leave out --dry-run")
    with run.prepared(recipe, settings) as plan:
        merge = f"merge, by {run.summary(recipe)}"
        return {**data(plan), "merge": merge, "method": recipe.method, "models": [str(m) for m in recipe.models()]}


def chosen(
    recipe: Recipe, settings: run.Settings, dst: Path, flags: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe that --greedy or --search finds, and what was tried; the recipe itself without these flags."""
    wanted = [flag for flag in ("greedy", "search") if flags[flag]]
    if not wanted:
        if flags["text"] or flags["log"]:
            raise UsageError("--eval and --log go with --greedy or --search")
        return recipe, None
    if len(wanted) > 1:
        raise UsageError("--greedy and --search exclude each other", hint="search the weights of the greedy soup later")
    if not flags["text"]:
        raise UsageError(f"--{wanted[0]} needs a text to measure the loss on", hint="--eval TEXT")
    if why := reason_for_mergekit(recipe, settings.to):
        raise UsageError(f"--{wanted[0]} cannot choose among these models: {why}")
    from surgery.merging import search

    log = Path(flags["log"] or f"{dst}.tried.jsonl")
    tried = search.Tried(recipe, settings, Path(flags["text"]), flags["eval_tokens"], flags["device"], log, say)
    best = search.greedy(tried) if flags["greedy"] else search.search(tried, flags["search"])
    return best, tried.to_json()


def execute(recipe: Recipe, settings: run.Settings, dst: Path, flags: Mapping[str, Any], bar: Bar) -> Report:
    """Merge, by surgery or by mergekit."""
    more: dict[str, Any] = {"force": flags["force"], "command": ["surgery", *sys.argv[1:]]}
    if why := reason_for_mergekit(recipe, settings.to):
        return by_mergekit(recipe, dst, why, **more)
    verify = not flags["no_verify"]
    with run.prepared(recipe, settings) as plan:
        weights = sum(p.nbytes for p in plan.source.parts.values())
        with bar(plan.bytes + (weights if verify else 0)) as advance:
            return run.carry_out(recipe, plan, dst, verify=verify, sync=not flags["no_sync"], progress=advance, **more)
