"""`surgery data plan` and `surgery data show`: what a run will see, before it starts; and what any run did see."""

from __future__ import annotations

import json
from typing import Any

import click

from surgery.cli.command import Command
from surgery.cli.flags import FORCE, JSON, with_flags

ROWS_SHOWN = 4


@click.command("plan", cls=Command)
@click.argument("mixture", type=click.Path())
@click.argument("dst", required=False, type=click.Path())
@click.option("--seed", type=click.IntRange(0), help="Of the order, in place of the mixture's.")
@click.option("--rows-per-step", type=click.IntRange(1), metavar="N", help="Of the global batch, in place of the "
              "mixture's.")  # fmt: skip
@click.option("--strict", is_flag=True, help="A cap that binds is an error, not a note.")
@click.option("--cache", type=click.Path(), metavar="DIR", help="Where sources of text are tokenized to. "
              "[default: $SURGERY_CACHE, else ~/.cache/surgery]")  # fmt: skip
@with_flags((FORCE, JSON))
def plan_command(mixture: str, dst: str | None, as_json: bool, **flags: Any) -> None:
    """Plan a mixture by token budget: what each source gives, how often, and in which order.

    \b
    surgery data plan mix.yaml                   the table alone
    surgery data plan mix.yaml plan --seed 42    and the order, on disk; `show` and training open it

    \b
    sequence_length: 4096                        mix.yaml; paths are relative to it
    budget: 50B
    sources:
      - {name: web,  paths: tok/web/*.bin, weight: 0.7}
      - {name: math, paths: tok/math/*.npy, weight: 0.3, max_epochs: 4}

    What a source cannot give under its caps goes to the others, and you are told. The order depends on the seeds alone,
    on no number of machines. Ready mixtures: recipes/mixtures/.
    """
    from pathlib import Path

    from surgery.data.extra import needs

    needs("pydantic", "planning")
    from surgery.cli import show_data
    from surgery.data.plans.draft import draft_plan
    from surgery.data.plans.plan import write_plan
    from surgery.writing.progress import progress_bars
    from surgery.writing.staging import check_free

    if dst is not None:
        check_free(Path(dst), bool(flags["force"]))
    cache = Path(flags["cache"]) if flags["cache"] else None
    with progress_bars(as_json) as begin:
        chosen = {name: flags[name] for name in ("seed", "rows_per_step", "strict")}
        draft = draft_plan(mixture, **chosen, cache=cache, begin=begin)
    plan = None if dst is None else write_plan(draft, dst, force=bool(flags["force"]))
    found = show_data.plan_data(draft, plan)
    click.echo(json.dumps(found, indent=2)) if as_json else show_data.plan(found)


@click.command("show", cls=Command)
@click.argument("plan", type=click.Path())
@click.option("--step", type=click.IntRange(0), required=True, metavar="N", help="Steps count from 0.")
@click.option(
    "--rows", metavar="A:B", help=f"Which rows of the step. [default: the first {ROWS_SHOWN}; all with --json]"
)
@click.option("--source", metavar="NAME", help="Only rows of this source.")
@click.option("--decode", is_flag=True, help="Show text in place of ids.")
@click.option("--tokenizer", metavar="PATH", help="For --decode, where the plan names none.")
@click.option("--rows-per-step", type=click.IntRange(1), metavar="N", help="Of the global batch, where the run does "
              "not say it, or to see another one.")  # fmt: skip
@click.option("--root", type=click.Path(), help="Where the plan's data lie now, if they were moved.")
@click.option("--pad-id", type=click.IntRange(0, 2**32 - 1), metavar="ID", help="Of the tokenizer of a Megatron "
              "run: that id becomes 0 and is no label.")  # fmt: skip
@JSON
def show_command(plan: str, step: int, rows: str | None, as_json: bool, **flags: Any) -> None:
    """Show exactly what a batch holds: every row, its documents and where they lie.

    \b
    surgery data show plan --step 500 --decode   a plan of ours
    surgery data show olmo-run --step 0          a run of OLMo: config.yaml and global_indices.npy
    surgery data show megatron.yaml --step 0     a run of Megatron, recomputed from its settings
    surgery data show cache/HASH-GPTDataset-train-description.txt --step 0 --rows-per-step 1024     or from its cache
    surgery data show batches.npz --step 0       recorded batches
    """
    from surgery.data.extra import needs

    needs("pydantic", "reading plans")
    from surgery.cli import show_data
    from surgery.data.show import contents, open_rows

    batches = open_rows(plan, flags["rows_per_step"], root=flags["root"], pad_id=flags["pad_id"])
    decode = show_data.decoder(batches, flags["tokenizer"]) if flags["decode"] else None
    most = None if as_json or rows else ROWS_SHOWN
    found = contents(batches, step, show_data.chosen_rows(rows), flags["source"], decode, most)
    click.echo(json.dumps(found)) if as_json else show_data.step(found)
