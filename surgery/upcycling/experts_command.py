"""`surgery experts`: flags and recipes become a `Selection`; everything else is `experts_run`.

surgery experts Mixtral-8x7B Mixtral-4x7B --prune 4
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.upcycling.command import OUTPUT, Decorator, options_of, size_of, topology_of, with_flags

if TYPE_CHECKING:
    from surgery.upcycling.derived import Target

_WHICH = "[LAYERS:]EXPERTS"
_CHOICE: tuple[Decorator, ...] = (
    click.option("--keep", multiple=True, metavar=_WHICH, help="Keep these experts, e.g. 0-3,6; with layers in front "
                 "(3-5:0,1) in these layers. Repeatable."),
    click.option("--drop", multiple=True, metavar=_WHICH, help="Leave these experts out. Repeatable."),
    click.option("--prune", multiple=True, metavar="[LAYERS:]N", help="Keep the N experts of largest norm (--by)."),
    click.option("--by", type=click.Choice(["router-norm", "weight-norm"]), help="What --prune goes by: rows of the "
                 "router, or the experts' own weights. [default: router-norm]"),
    click.option("--merge", multiple=True, metavar="[LAYERS:]GROUPS", help="Average experts with each other, e.g. "
                 "0+1,2+3; their rows of the router too. Repeatable."),
    click.option("--permute", multiple=True, metavar=_WHICH, help="Put the experts into this order. Repeatable."),
    click.option("--duplicate", type=click.IntRange(1), help="Copies of every expert in the end; top-k grows along, so "
                 "that the function stays."),
    click.option("--top-k", type=click.IntRange(1), help="How many experts a token uses from now on."),
    click.option("--force-lossy", is_flag=True, help="Allow virtual groups to be broken."),
)  # fmt: skip


@click.command("experts")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@with_flags(_CHOICE, OUTPUT)
def experts_command(src: str, dst: str, **flags: Any) -> None:
    """Prune, keep, duplicate, average or reorder the experts of a mixture, or change its top-k; any format to any.

    \b
    surgery experts MOE SMALL --prune 4                      the four experts that the router weighs most
    surgery experts MOE SMALL --keep 0-3 --keep 5:4-7        0 to 3, but in layer 5 those from 4 to 7
    surgery experts MOE LARGE --duplicate 2                  every expert twice, top-k doubled: the same function
    surgery experts MOE SMALL --merge 0+1,2+3,4+5,6+7        averages of pairs

    Rows and biases of the router follow. Both models are run at the end, and how far apart they are is told.
    """
    from surgery.staging import check_free
    from surgery.upcycling import derived_render, experts_run
    from surgery.upcycling.derived import write_derived

    wanted = experts_run.selection(flags, flags["recipe"])
    source, made, plan = experts_run.prepare(src, wanted, target_of(flags))
    if flags["dry_run"]:
        data = derived_render.data_of(plan, "experts", made.to_json())
        click.echo(json.dumps(data, indent=2)) if flags["as_json"] else derived_render.plan(data, "experts")
        return
    check_free(Path(dst), flags["force"])
    done = write_derived(source, plan, dst, record={"experts": made.to_json()}, claim=made.claim(),
                         force=flags["force"], verify=not flags["no_verify"], verify_tokens=flags["verify_tokens"],
                         command=["surgery", *sys.argv[1:]])  # fmt: skip
    if flags["as_json"]:
        click.echo(json.dumps(done.to_json(), indent=2))
    else:
        derived_render.outcome(done, "experts")


def target_of(flags: dict[str, Any]) -> Target:
    """Where the result goes."""
    from surgery.upcycling.derived import Target

    return Target(flags["to"], topology_of(flags), flags["dtype"], options_of(flags), size_of(flags["max_memory"]))
