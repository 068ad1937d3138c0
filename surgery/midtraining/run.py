"""A run from its settings to its folder: prepared, tested, trained, logged, saved, exported; or gone on with.

    done = midtrain(run, command=["surgery", "midtrain", "run.yaml"], views=[Lines(print)])
    done.exports                                # folders: output/export/step000001600-hf, ...

The folder is what run_folder.py describes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from surgery.containers.yaml_writer import to_yaml
from surgery.errors import SurgeryError, shown
from surgery.midtraining import parallel, run_folder
from surgery.midtraining.after_step import Exports, First, Readings, Saves, average
from surgery.midtraining.averages import Averages
from surgery.midtraining.checkpoint import FOLDER
from surgery.midtraining.compiling import compiled
from surgery.midtraining.evaluating import Evaluations
from surgery.midtraining.log import RunLog, View
from surgery.midtraining.loop import Act, Job, State, fresh_state, prepare, train
from surgery.midtraining.reference import with_reference
from surgery.midtraining.resuming import previous, restore, said, versions
from surgery.midtraining.run_folder import EXPORT, claimed
from surgery.midtraining.saving import Saver
from surgery.midtraining.selftests import Result, self_test
from surgery.midtraining.settings import Run
from surgery.midtraining.stopping import stops
from surgery.midtraining.throughput import Meter, flops_per_token, peak_flops
from surgery.midtraining.told import Told
from surgery.writing.atomic import atomic_file, write_json
from surgery.writing.interrupt import Requeue

FORMAT = "surgery-run-1"


@dataclass(frozen=True)
class Done:
    """What a run did."""

    folder: Path
    steps: int
    tokens: int
    skipped: int
    loss: float
    seconds: float
    exports: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "exports": [str(path) for path in self.exports]}


def midtrain(
    run: Run,
    *,
    command: Sequence[str] = (),
    views: Callable[[Job], Sequence[View]] = lambda job: (),
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] | None = None,
) -> Done:
    """Do all of a run, or what is left of it.  `say` is told what is decided and tested on the way; `progress` bytes of
    weights.

    Raises OutputError if the folder holds something to which this run cannot belong, MismatchError if a self-test
    fails, Requeue if a signal ends it, SurgeryError for whatever else does not fit.
    """
    folder, world = Path(run.output), parallel.start(run.device)
    say = say if world.main else lambda text: None
    with claimed(folder) if world.main else nullcontext(), stops(world) as came:
        saved = previous(run, world, say)
        job = with_reference(prepare(run, progress, saved))
        told = Told(None, Meter(flops_per_token(job.source.spec, job.course.layout.length), _peak(job), world.size))
        state = fresh_state(job) | kept_besides(job, told)
        if saved:
            restore(job, state, saved, progress)
        for note in (*job.notes, *(said(job, saved) if saved else ())):
            say(note)
        results = self_test(job, lambda r: say(f"self-test {r.name}: {r.detail}"))
        say(compile_for(job, results))

        def begin_log() -> None:
            told.log = begin(job, folder, results, command, views(job))
            told.tokens, told.loss = state["progress"].tokens, told.log.last.get("loss", 0.0)

        parallel.together(world, begin_log, main=True)
        exports = Exports(told, folder / EXPORT, command, came)
        return trained(job, state, told, results, folder, exports, came)


def trained(
    job: Job, state: State, told: Told, results: list[Result], folder: Path, exports: Exports, came: list[int]
) -> Done:
    """Take the steps that are left, and do what is due after each."""
    progress = state["progress"]
    saver = Saver(folder / FOLDER, job.world, job.run.checkpoint, parallel.group(job.world))
    try:
        evaluations = Evaluations(job, told)
        if job.begun:
            told.event(job.begun, "note", f"resumed from step {job.begun}")
            exports.missing(job, state)
        else:
            evaluations.at(0, tokens=0)
        readings: list[Act] = [state["readings"]] if "readings" in state else []
        train(job, state, told, [First(job, told, results), *readings, average, evaluations, exports,
                                 Saves(told, saver, came)])  # fmt: skip
        saver.wait()
        if progress.step > job.begun:
            exports.last(job, state)
        if signum := parallel.highest(job.world, max(came, default=0)):  # in the last step, perhaps while it exported
            raise Requeue(signum, folder)
    except BaseException as error:
        stopped = isinstance(error, (Requeue, KeyboardInterrupt))
        with suppress(SurgeryError, OSError):  # what ended the run is what is told, also where the disk is full
            if job.world.size == 1:
                saver.wait()
        with suppress(SurgeryError, OSError):
            told.end("stopped" if stopped else "failed", progress.step, str(error).partition("\n")[0])
        raise
    told.end("finished", progress.step)
    parallel.leave(job.world)
    return Done(folder, progress.step, progress.tokens, state["spikes"].skipped, told.loss, told.meter.seconds,
                tuple(told.exports))  # fmt: skip


def kept_besides(job: Job, told: Told) -> State:
    """What a run keeps besides what every loop has."""
    found: State = {}
    if job.objective.routers:
        found["readings"] = Readings(job, told)
    if job.run.average.last or job.run.average.ema:
        found["averages"] = Averages(job.run.average, job.weights(), job.course.layout.steps)
    return found


def compile_for(job: Job, results: Sequence[Result]) -> str:
    """Compile the layers where it pays, by the time that the test of the gradient took; a run that goes on does as it
    did."""
    took = next((r.seconds for r in results if r.name == "gradient"), 0.0)
    seconds = parallel.first(job.world, took * job.course.layout.steps * job.course.accumulation(0))
    wanted = job.run.train.compile
    if wanted == "auto" and "compile" in job.choices:
        wanted = job.choices["compile"] == "yes"
    note = compiled(job.model, wanted, device=job.world.device, seconds=seconds, dense=not job.objective.routers)
    job.choices["compile"] = "yes" if note else "no"
    return note


# -------------------------------------------------------------------------------------------------------- the folder


def begin(job: Job, folder: Path, results: Sequence[Result], command: Sequence[str], views: Sequence[View]) -> RunLog:
    """Write what the run is; of a run that goes on only what may have changed."""
    with atomic_file(folder / run_folder.CONFIG) as file:
        file.write(to_yaml(job.run.model_dump(mode="json")))
    if not job.begun:
        write_json(folder / run_folder.RUN, facts(job, folder, command))
        write_json(folder / run_folder.SELFTESTS, [asdict(r) for r in results])
    if (plan := getattr(job.batches, "plan", None)) is not None:
        sources = [s.model_dump(mode="json") for s in plan.file.sources]
        write_json(folder / run_folder.PLAN, {"sources": sources, "notes": list(plan.file.notes)})
    return RunLog(folder, views, job.begun or None)


def facts(job: Job, folder: Path, command: Sequence[str]) -> dict[str, Any]:
    """What the run is: run.json."""
    spec, layout = job.source.spec, job.course.layout
    model = {"path": shown(job.source.path), "format": job.source.format, "family": spec.family, "digest": job.digest,
             "parameters": spec.parameters(), "active_parameters": spec.parameters(active=True)}  # fmt: skip
    return {
        "format": FORMAT,
        "name": folder.name,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": versions(),
        "device": {"name": device_name(job.world.device), "count": job.world.size},
        "model": model,
        "steps": layout.steps,
        "tokens": layout.tokens,
        "flops_per_token": flops_per_token(spec, layout.length),
        "seed": job.run.train.seed,
        "parents": [job.digest],
        "notes": list(job.notes),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"


def _peak(job: Job) -> float | None:
    return peak_flops(device_name(job.world.device))
