"""`surgery upcycle` and `surgery experts`: flags and recipes become requests; everything else is `upcycling.run`.

surgery upcycle SmolLM2-135M moe --experts 64 --top-k 8
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from surgery.cli.command import Command
from surgery.cli.flags import DRY_RUN, JSON, OPTIONS, SHARD_SIZE, flags_of, values_of, with_flags
from surgery.upcycling.dense_to_moe.settings import Settings
from surgery.upcycling.request import Collapse, Edit, Proven, Upcycle
from surgery.writing.progress import progress_bar, progress_bars

R = TypeVar("R", bound=Proven)
RECIPE = click.option("--recipe", type=click.Path(), help="A YAML file with any of these settings; flags win over it.")
MORE = (RECIPE, SHARD_SIZE, OPTIONS, DRY_RUN, JSON)
COLLAPSE = click.option("--collapse", metavar="MODE", is_flag=False, flag_value="exact", help="The reverse: a mixture "
                        "of experts back into a dense model. exact (of copies and virtual groups), average, or "
                        "by-router (weighted by use on a text).")  # fmt: skip


@click.command("upcycle", cls=Command)
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@with_flags(flags_of(Upcycle), (COLLAPSE, *MORE))
def upcycle_command(src: str, dst: str, **flags: Any) -> None:
    """Turn a dense checkpoint into a mixture of experts, and prove whether it still computes the same.

    \b
    surgery upcycle SmolLM2-135M moe --experts 8 --top-k 2 --strategy copy
    surgery upcycle SmolLM2-135M moe --experts 64 --top-k 8          virtual groups: 64 small experts, exact
    surgery upcycle SmolLM2-135M moe --experts 8 --top-k 2 --shared 0.5
    surgery upcycle Llama-3-8B moe --experts 8 --top-k 2 --to megatron-dist --ep 8
    surgery upcycle SmolLM2-135M moe --recipe upcycle.yaml
    surgery upcycle SmolLM2-135M moe --experts 8 --top-k 2 --attention-experts 3

    Any format goes in and out, streamed in bounded memory. After writing, the source and the result run on the same
    tokens, layer by layer; the proof is printed and written to surgery.json. What would change the function is refused
    without --force-lossy, and an exact strategy that does not come out exact is an error.
    """
    from surgery.upcycling import run

    if flags["collapse"]:
        _refuse_settings(flags, "--collapse")
        collapse = _made(Collapse, {**values_of(Collapse, flags), "by": flags["collapse"]})
        return _finish(lambda on: run.prepare_collapse(src, collapse, on), dst, collapse, flags)
    request = _upcycle(flags)
    return _finish(lambda on: run.prepare(src, request, on), dst, request, flags)


@click.command("experts", cls=Command)
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@with_flags(flags_of(Edit, but=("layers",)), MORE)
def experts_command(src: str, dst: str, **flags: Any) -> None:
    """Prune, keep, duplicate, merge or permute the experts of a mixture, or change how many are chosen.

    \b
    surgery experts Mixtral-8x7B small --keep 0,2,5,7 --force-lossy
    surgery experts Mixtral-8x7B small --keep 0-3 --keep 5:4-7 --force-lossy      other experts in layer 5
    surgery experts Mixtral-8x7B small --best 4 --force-lossy                     those that the router weighs most
    surgery experts moe twice --duplicate 2          exact: copies share the weight of what they are copies of
    surgery experts moe twice --duplicate 2 --noise 0.01 --force-lossy
    surgery experts moe fewer --top-k 1 --force-lossy
    surgery experts moe other --recipe experts.yaml  the same fields, and `layers: {3-5: {keep: [0, 1]}}`

    Experts of a virtual group belong together: what would tear them apart is refused. The proof says how far the result
    is from the source; what changes the function needs --force-lossy.
    """
    from surgery.upcycling import run
    from surgery.upcycling.edit_experts.selection import asked_for

    path = flags["recipe"]
    values = asked_for(values_of(Edit, flags), _yaml(path), path)
    request = _made(Edit, values, path)
    return _finish(lambda on: run.prepare_edit(src, request, on), dst, request, flags)


def _made(cls: type[R], values: dict[str, Any], file: str | None = None) -> R:
    """A request.  What is wrong with it is wrong with `file`, if no flag was given besides."""
    from surgery.settings import make

    return make(cls, {**values, "command": ["surgery", *sys.argv[1:]]})


def _upcycle(flags: dict[str, Any]) -> Upcycle:
    """Raises UsageError, or ConfigError for a recipe that makes no sense by itself."""
    from surgery.settings import in_file, keywords

    path = flags["recipe"]
    recipe = keywords(Settings, _yaml(path), path) if path else {}
    alone = path and not _given(flags)
    with in_file(path) if alone else nullcontext():
        return _made(Upcycle, {**recipe, **values_of(Upcycle, flags)})


def _yaml(path: str | None) -> Any:
    from surgery.containers.text import read_yaml

    return read_yaml(path, "recipe") if path else None


def _finish(prepared: Callable[[Any], Any], dst: str, request: Proven, flags: dict[str, Any]) -> None:
    """Show the plan, or carry it out and show the outcome; `prepared` is told where models run."""
    from surgery.cli import show_upcycling as render
    from surgery.running.device import device
    from surgery.storage.outgoing import outgoing
    from surgery.upcycling import run
    from surgery.writing.staging import check_free

    dry, as_json = flags["dry_run"], flags["as_json"]
    pushing = partial(progress_bar, "push", quiet=as_json)
    with nullcontext(Path(dst)) if dry else outgoing(dst, request, pushing) as place:
        if not dry:
            check_free(place, request.force)
        with progress_bars(as_json) as begin:
            ready = prepared(device(request.device, begin("measure", None)))
            done = None if dry else run.carry_out(
                ready, place, progress=begin("write", ready.plan.bytes_to_write),
                proving=begin("prove", ready.bytes_to_prove),
            )  # fmt: skip
    if done is None:
        data = render.plan_data(ready)
        click.echo(json.dumps(data, indent=2)) if as_json else render.plan(data)
    elif as_json:
        click.echo(json.dumps(done.to_json(), indent=2))
    else:
        render.outcome(done)


def _given(flags: dict[str, Any], but: tuple[str, ...] = ()) -> list[str]:
    """The flags of an upcycling that were given."""
    from dataclasses import fields

    from surgery.settings import flag

    return [flag(f) for f in fields(Settings) if f.name not in but and flags.get(f.name) not in (None, ())]


def _refuse_settings(flags: dict[str, Any], where: str) -> None:
    from surgery.errors import UsageError, some

    odd = _given(flags, ("force_lossy",)) + (["--recipe"] if flags["recipe"] else [])
    if odd:
        raise UsageError(f"{where} does not go with {some(odd)}")
    if flags["dtype"] not in (None, "keep"):
        raise UsageError(f"{where} does not go with --dtype", hint="surgery convert casts, before or after it")
