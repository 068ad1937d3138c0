"""What a run does after a step, when it is due: look whether the first one moved everything, read routers, average the
weights, export, save.

    exports, saves = Exports(told, folder, command, came), Saves(told, saver, came)
    train(job, state, told, [First(job, told, results), Readings(job, told), average, exports, saves])

Each is called with the job and the state after every step, by all processes.  `Saves` is the last: whatever belongs to
a step has been done and logged when its checkpoint appears, and a run that goes on from it has nothing to make up for.
But what is exported of the last step is written when its checkpoint is there (`exports.last`): an export that fails, as
on a full disk, then loses no step, and a run that goes on makes up for it.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.midtraining import parallel, run_folder
from surgery.midtraining.evaluation.resting import resting
from surgery.midtraining.export import export, gathered, is_written
from surgery.midtraining.resuming import random_state, tensors_of, trainer_of
from surgery.midtraining.router_telemetry import drift, snapshot
from surgery.midtraining.routers import MLP, Routed, by_kind
from surgery.midtraining.saving import Saver
from surgery.midtraining.selftests import MOVED, Result, fingerprints, moved, sample
from surgery.midtraining.step import hidden_states
from surgery.writing.atomic import write_json
from surgery.writing.interrupt import Interrupted, Requeue

if TYPE_CHECKING:
    from surgery.midtraining.loop import Job, State
    from surgery.midtraining.told import Told

READINGS = 32  # of the routers in a run


class First:
    """After the first step that had a learning rate: has all changed that is trained, and nothing else?"""

    def __init__(self, job: Job, told: Told, results: list[Result]) -> None:
        self.told, self.results = told, results
        self.before = None if job.begun or MOVED in job.run.skip_self_tests else fingerprints(job.weights())

    def __call__(self, job: Job, state: State) -> None:
        """Raises MismatchError."""
        progress, spikes = state["progress"], state["spikes"]
        if self.before is not None and not spikes.in_a_row and job.course.schedule(progress.step) > 0:
            self.results.append(moved(job, self.before))
            if self.told.log:
                write_json(self.told.log.folder / run_folder.SELFTESTS, [asdict(r) for r in self.results])
            self.before = None


class Readings:
    """The routers now and then: loads of all experts, who is chosen together, how far they are from their start, which
    is part of the state."""

    def __init__(self, job: Job, told: Told) -> None:
        assert job.objective.routers
        self.told, self.part, self.log = told, sample(job), job.objective.routers
        self.start = snapshot(
            self.log.mixtures, self._routed(job)
        )  # if the run goes on, memory for the one that is kept
        self.every = max(1, job.course.layout.steps // READINGS)

    def __call__(self, job: Job, state: State) -> None:
        step = state["progress"].step
        if step % self.every == 0 or step == job.course.layout.steps:
            routed, found = by_kind(self._routed(job)), dict[str, Any]()
            for kind, alike in by_kind(self.log.mixtures).items():
                found[kind] = {**self.told.readings[kind], **drift(self.start, alike, routed[kind])}
            self.told.experts({"step": step, **found.pop(MLP, {}), **found})

    @torch.no_grad()
    def _routed(self, job: Job) -> tuple[Routed, ...]:
        """Where the routers send the first rows of the run."""
        with resting(job.model), job.objective.precision.computing(job.world.device), self.log:
            hidden_states(job.model, self.part, job.objective.across)
        return self.log.take()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return self.start

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All of it is tensors."""


def average(job: Job, state: State) -> None:
    """Count the weights in their running means."""
    if averages := state.get("averages"):
        averages.add(state["progress"].step, job.weights())


class Exports:
    """The model in other formats, after so many steps; at the end, by `last`, its running means as well."""

    def __init__(self, told: Told, folder: Path, command: Sequence[str], came: list[int]) -> None:
        """`came`: signals; one that stops an export is put there."""
        self.told, self.folder, self.command, self.came = told, folder, command, came

    def __call__(self, job: Job, state: State) -> None:
        if state["progress"].step < job.course.layout.steps:
            self.last(job, state)

    def last(self, job: Job, state: State) -> None:
        """All that are due at this step."""
        for dst, wanted, mean in self._due(job, state):
            if not parallel.highest(job.world, len(self.came)):
                self._export(job, state, dst, wanted, mean)

    def missing(self, job: Job, state: State) -> None:
        """Make up for what a signal cut short, and for what is wanted in another way than it was written."""
        for dst, wanted, mean in self._due(job, state):
            if not parallel.first(job.world, is_written(dst, wanted)):
                self._export(job, state, dst, wanted, mean)
            else:
                self.told.exports.append(dst)

    def _due(self, job: Job, state: State) -> Sequence[tuple[Path, Any, str]]:
        step, last = state["progress"].step, job.course.layout.steps
        means = ("", *state["averages"].points) if step == last and "averages" in state else ("",)
        found = [w for w in job.run.export if step and (step == last or (w.every and step % w.every == 0))]
        name = f"step{step:09d}-"
        return [(self.folder / f"{name}{w.to}{mean and '-'}{mean}", w, mean) for w in found for mean in means]

    def _export(self, job: Job, state: State, dst: Path, wanted: Any, mean: str) -> None:
        weights, step = state["averages"].weights(mean) if mean else job.weights(), state["progress"].step
        with gathered(job, weights, self.folder) as whole:

            def work() -> int:
                try:
                    export(job, wanted, dst, step, self.command, force=True, weights=whole)
                except Interrupted as stopped:
                    return stopped.signum
                return 0

            signum = parallel.together(job.world, work, main=True)[0]
        if signum:
            self.came.append(signum)
            return
        self.told.exports.append(dst)
        self.told.event(step, "note", f"exported to {self.folder.name}/{dst.name}")


class Saves:
    """Checkpoints: after so many steps, after the last one, and when a signal came, which then ends the run."""

    def __init__(self, told: Told, saver: Saver, came: list[int]) -> None:
        self.told, self.saver, self.came = told, saver, came

    def __call__(self, job: Job, state: State) -> None:
        """Raises Requeue, or OutputError if a checkpoint could not be written."""
        step, last, every = state["progress"].step, job.course.layout.steps, job.run.checkpoint.every
        signum = parallel.highest(job.world, max(self.came, default=0))
        if signum and step < last:
            self.told.event(step, "note", f"stopped by {signal.Signals(signum).name}")
        if signum or (every and (step % every == 0 or step == last)):
            self.told.sync()
            self.saver.save(step, tensors_of(job, state) | random_state(job), trainer_of(job, state))
        self.saver.look()
        if signum or step == last:
            self.saver.wait()
        if signum and step < last:
            raise Requeue(signum, self.saver.folder.parent)
