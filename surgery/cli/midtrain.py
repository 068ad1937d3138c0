"""`surgery midtrain`: train a checkpoint further, as a YAML says.

surgery midtrain run.yaml --dry-run --set train.micro_batch=4

Only click is imported here; everything else when it is used, so that `--help` is instant.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.command import LOG, Command, quiet, talk
from surgery.cli.flags import JSON
from surgery.cli.terminal import ASIDE, say, tell
from surgery.writing.progress import progress_bars

if TYPE_CHECKING:
    from surgery.midtraining.log import View
    from surgery.midtraining.loop import Job


FOREIGN = ("olmo", "neox", "megatron")  # whose configs --from-... reads


SECTIONS = {
    "The run": "set output seeds soup nproc",
    "Before it": "dry-run nnodes sweep steps explain schema",
    "Of other trainers": "from-olmo from-neox from-megatron",
}


@click.command("midtrain", cls=Command, sections=SECTIONS)
@click.argument("run", metavar="RUN.yaml", type=click.Path(), required=False)
@click.argument("more", metavar="", nargs=-1)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a key of the YAML, or add one: "
              "train.micro_batch=4. Repeatable.")  # fmt: skip
@click.option("--output", type=click.Path(), metavar="DIR", help="The run's folder, instead of the YAML's `output`.")
@click.option("--dry-run", is_flag=True, help="Measure one step and say what the run would be: steps, tokens, epochs, "
              "memory, time, learning rates. Nothing is written.")  # fmt: skip
@click.option("--nproc", type=click.IntRange(1), metavar="N", help="Train in N processes of this host, or on N of its "
              "GPUs; with --dry-run, count for them.")  # fmt: skip
@click.option("--nnodes", type=click.IntRange(1), metavar="N", help="With --dry-run: count for N hosts, and print the "
              "torchrun line for each.")  # fmt: skip
@click.option("--seeds", metavar="N,N,...", help="A run for each seed of the data's order, in OUTPUT/seed-N.")
@click.option("--soup", is_flag=True, help="With --seeds: merge the runs in the end, and keep the soup if it is better "
              "than each of them.")  # fmt: skip
@click.option(
    "--explain",
    is_flag=True,
    help="Print the run as a YAML with every key, its value, its meaning, and who set it; "
    "without RUN.yaml all defaults.",
)
@click.option("--from-olmo", type=click.Path(), metavar="YAML", help="Make RUN.yaml of OLMo's config: what can be said "
              "is said, the rest is named.")  # fmt: skip
@click.option("--from-neox", type=click.Path(), metavar="YAML", help="The same of GPT-NeoX' config.")
@click.option("--from-megatron", type=click.Path(), metavar="FILE", help="The same of Megatron's arguments in a file.")
@click.option("--sweep", "grid", multiple=True, metavar="KEY=V,V...", help="Try these values for a few steps each, in "
              "all combinations, and compare speed, memory and loss; more KEY=V,V may follow.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Of each trial of --sweep.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of the YAML, for editors.")
@JSON
def midtrain_command(
    run: str | None, more: Sequence[str], sets: Sequence[str], output: str | None, dry_run: bool, explain: bool,
    grid: Sequence[str], steps: int, schema: bool, as_json: bool, **spread: Any,
) -> None:  # fmt: skip
    """Train a checkpoint of any format further, and write it in any format.

    \b
    model: {path: SmolLM2-135M}                      # run.yaml; a folder in any format, dense or a mixture of experts
    data:  {plan: plan}                              # made by `surgery data plan`
    output: runs/anneal
    train:
      batch_tokens: 1M                               # of all devices together
      schedule: {name: linear, start_lr: 3e-5}       # to zero at the end of the plan
    export: {to: megatron, tp: 2}

    \b
    surgery midtrain --explain                       every key, its default, and what it means
    surgery midtrain run.yaml --dry-run              what would it be? one step is measured
    surgery midtrain run.yaml --from-olmo config.yaml
    surgery midtrain run.yaml --sweep micro_batch=2,4,8 compile=true,false --steps 20
    surgery midtrain run.yaml                        tests itself, trains, exports; again: goes on where it was stopped
    surgery midtrain run.yaml --nproc 2              in two processes, or on two GPUs
    surgery midtrain run.yaml --seeds 42,666,42069 --soup      three orders of the data, and the mean of the three

    Before the first step the run tests itself on its own model, data and device: does the future leak, do documents,
    are experts, loss and weights what they should be, does a gradient reach everything? A test that fails stops it.
    """
    from surgery.errors import UsageError

    if schema:
        from surgery.midtraining.settings import Run

        click.echo(json.dumps(Run.model_json_schema(), indent=2))
        return
    theirs = {name: path for name in FOREIGN if (path := spread.pop(f"from_{name}"))}
    if theirs:
        _translate(theirs, run)
        return
    from surgery.midtraining.run_file import default_run, read_run

    sets = [*sets, *([] if output is None else [f"output={json.dumps(output)}"])]
    if run is None and not explain:
        raise UsageError("which run? give its YAML", hint="surgery midtrain run.yaml; --help shows one")
    if more and not grid:
        raise UsageError(f"one run at a time: what is {more[0]}?", hint="--sweep KEY=V,V takes several values")
    if run is not None and grid:
        _sweep(run, [*grid, *more], steps, sets, as_json)
        return
    wanted, origins = default_run(sets) if run is None else read_run(run, sets)
    if explain:
        _explain(wanted, origins, as_json)
    elif dry_run:
        _foretell(Call(str(run), sets, as_json), wanted, nproc=spread["nproc"] or 1, nnodes=spread["nnodes"] or 1)
    else:
        _train_all(Call(str(run), sets, as_json), wanted, **spread)


def _translate(theirs: Mapping[str, str], run: str | None) -> None:
    """Write RUN.yaml, or print it where none is named."""
    from pathlib import Path

    from surgery.errors import UsageError
    from surgery.midtraining.foreign import read_foreign, write_foreign

    if len(theirs) > 1:
        raise UsageError("one config at a time")
    [(trainer, path)] = theirs.items()
    found = read_foreign(trainer, path)
    if run is None:
        say(found.text("data.yaml"))
        return
    for place in write_foreign(found, Path(run)):
        say(f"wrote {place}")
    if found.left:
        tell(f"not taken over: {', '.join(found.left)}")


def _explain(wanted: Any, origins: Mapping[str, str], as_json: bool) -> None:
    from surgery.cli import show_midtraining as show
    from surgery.midtraining.run_file import explained

    lines = list(explained(wanted, origins))
    click.echo(json.dumps([vars(line) for line in lines], indent=2)) if as_json else show.explanation(lines)


def _sweep(run: str, grid: Sequence[str], steps: int, sets: Sequence[str], as_json: bool) -> None:
    from surgery.cli import show_midtraining as show
    from surgery.midtraining.sweep import parse_grid, sweep

    found = sweep(run, parse_grid(grid), steps, sets, lambda trial: tell(show.trial(trial)))
    click.echo(json.dumps([trial.to_json() for trial in found], indent=2)) if as_json else show.trials(found)


@dataclass(frozen=True)
class Call:
    """What the command was given: a YAML, what --set changes in it, and whether results are JSON."""

    run: str
    sets: Sequence[str]
    as_json: bool

    def words(self) -> list[str]:
        """Of the command that each of several processes runs."""
        return ["midtrain", self.run, *(word for each in self.sets for word in ("--set", each)),
                *["--json"] * self.as_json, *talk()]  # fmt: skip


def _foretell(call: Call, wanted: Any, nproc: int, nnodes: int) -> None:
    from surgery.cli import show_midtraining as show
    from surgery.midtraining.dry_run import foretell
    from surgery.midtraining.launching import torchrun
    from surgery.midtraining.loop import prepare

    with TemporaryDirectory() as folder, progress_bars(quiet=False) as begin:  # plans of mixtures go there
        job = prepare(wanted.model_copy(update={"output": folder}), begin("open", None))
        forecast = foretell(job, nproc * nnodes)
    lines = torchrun(call.words(), nproc, nnodes) if nproc * nnodes > 1 else []
    if call.as_json:
        click.echo(json.dumps({**forecast.to_json(), "torchrun": lines}, indent=2))
        return
    show.forecast(forecast)
    for line in lines:
        say(line)


def _train_all(call: Call, wanted: Any, nproc: int | None, nnodes: int | None, seeds: str | None, soup: bool) -> None:
    """One run, or one for each seed and their soup."""
    from surgery.cli import show_midtraining as show
    from surgery.errors import UsageError
    from surgery.midtraining.seeds import make_soup, parse_seeds, sets_of

    if nnodes:
        raise UsageError("--nnodes goes with --dry-run: on several hosts torchrun starts the processes")
    if soup and not seeds:
        raise UsageError("--soup goes with --seeds", hint="--seeds 42,666,42069 --soup")
    if not seeds:
        return _train_in(call, nproc or 1)
    if "WORLD_SIZE" in os.environ:
        raise UsageError("--seeds under torchrun: start a run for each seed", hint="or --nproc N without torchrun")
    numbers = parse_seeds(seeds)
    for each in [sets_of(wanted, seed) for seed in numbers]:
        _train_in(replace(call, sets=[*call.sets, *each]), nproc or 1)
    if soup:
        found = make_soup(wanted, numbers, ["surgery", *sys.argv[1:]])
        click.echo(json.dumps(found.to_json(), indent=2)) if call.as_json else show.soup(found)


def _train_in(call: Call, nproc: int) -> None:
    """Here, or in other processes; ends the process if these fail."""
    from surgery.midtraining.launching import launch
    from surgery.midtraining.run_file import read_run

    if nproc == 1 or "WORLD_SIZE" in os.environ:
        _train(read_run(call.run, call.sets)[0], call.as_json)
    elif status := launch(call.words(), nproc):
        sys.exit(status)


def _train(wanted: Any, as_json: bool) -> None:
    from surgery.midtraining.run import midtrain

    others = os.environ.get("RANK", "0") != "0"
    with ExitStack() as bars:
        opened = bars.enter_context(progress_bars(quiet=others))("open", None)

        def note(text: str) -> None:
            bars.close()  # lines follow, and then a panel of its own
            if text:
                tell(text)

        command = ["surgery", *sys.argv[1:]]
        done = midtrain(wanted, command=command, views=lambda job: _views(job, as_json), say=note, progress=opened)
    if others:
        return
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=2))
    else:
        from surgery.cli import show_midtraining as show

        show.done(done)


def _views(job: Job, as_json: bool) -> list[View]:
    """A panel on a terminal, else lines; on stderr where stdout is for JSON.  A log file gets the lines as well."""
    from pathlib import Path

    from surgery.midtraining.log import Lines

    out, steps, folder, log = (
        (sys.stderr if as_json else sys.stdout), job.course.layout.steps, Path(job.run.output), job.run.log
    )  # fmt: skip
    views: list[View] = []
    if quiet():
        pass
    elif out.isatty():
        from surgery.cli.console import console
        from surgery.midtraining.panel import Panel

        views.append(Panel(folder.name, steps, console(out, soft_wrap=False)))
    else:
        views.append(Lines(partial(print, file=out, flush=True), log.every, steps))
    views.append(Lines(partial(LOG.info, "%s", extra={ASIDE: True}), log.every, steps))
    if log.tensorboard or log.wandb:
        from surgery.midtraining.trackers import TensorBoard, Wandb

        begun = job.begun or None
        views += [TensorBoard(folder / "tensorboard", begun)] if log.tensorboard else []
        views += [Wandb(folder, log.wandb, job.run.model_dump(mode="json"), begun)] if log.wandb else []
    return views
