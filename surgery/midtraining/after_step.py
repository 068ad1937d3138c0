"""What a run does after a step, when it is due: look whether the first one moved everything, read routers, export.

    train(job, state, told, [First(job, told, results), Readings(job, told), Exports(told, command)])

Each is called with the job and the state after every step.  `told` is the log of run.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from surgery.midtraining import run_folder
from surgery.midtraining.evaluation.resting import resting
from surgery.midtraining.export import export
from surgery.midtraining.router_telemetry import drift, snapshot
from surgery.midtraining.routers import Routed
from surgery.midtraining.selftests import MOVED, Result, fingerprints, moved, sample
from surgery.midtraining.step import hidden_states
from surgery.writing.atomic import write_json

if TYPE_CHECKING:
    from surgery.midtraining.loop import Job, State
    from surgery.midtraining.run import Told

READINGS = 32  # of the routers in a run


class First:
    """After the first step that had a learning rate: has all changed that is trained, and nothing else?"""

    def __init__(self, job: Job, told: Told, results: list[Result]) -> None:
        self.told, self.results = told, results
        self.before = None if MOVED in job.run.skip_self_tests else fingerprints(job.weights())

    def __call__(self, job: Job, state: State) -> None:
        """Raises MismatchError."""
        progress, spikes = state["progress"], state["spikes"]
        if self.before is not None and not spikes.in_a_row and job.course.schedule(progress.step) > 0:
            self.results.append(moved(job, self.before))
            write_json(self.told.log.folder / run_folder.SELFTESTS, [asdict(r) for r in self.results])
            self.before = None


class Readings:
    """The routers now and then: loads of all experts, who is chosen together, how far they are from their start."""

    def __init__(self, job: Job, told: Told) -> None:
        assert job.objective.routers
        self.told, self.part, self.log = told, sample(job), job.objective.routers
        self.start = snapshot(self.log.mixtures, self._routed(job))
        self.every = max(1, job.course.layout.steps // READINGS)

    def __call__(self, job: Job, state: State) -> None:
        step = state["progress"].step
        if step % self.every == 0 or step == job.course.layout.steps:
            far = drift(self.start, self.log.mixtures, self._routed(job))
            self.told.log.experts({"step": step, **self.told.reading, **far})

    @torch.no_grad()
    def _routed(self, job: Job) -> tuple[Routed, ...]:
        """Where the routers send the first rows of the run."""
        with resting(job.model), job.objective.precision.computing(job.world.device), self.log:
            hidden_states(job.model, self.part, job.objective.across)
        return self.log.take()


class Exports:
    """The model in other formats, after so many steps and at the end."""

    def __init__(self, told: Told, command: Sequence[str]) -> None:
        self.told, self.command = told, command

    def __call__(self, job: Job, state: State) -> None:
        step, last, folder = state["progress"].step, job.course.layout.steps, self.told.log.folder
        for wanted in job.run.export:
            if step == last or (wanted.every and step % wanted.every == 0):
                dst = folder / "export" / f"step{step:09d}-{wanted.to}"
                export(job, wanted, dst, step, self.command)
                self.told.exports.append(dst)
                self.told.event(step, "note", f"exported to {dst.relative_to(folder)}")
