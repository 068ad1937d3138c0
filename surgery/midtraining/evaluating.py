"""Evaluate the model of a run while it runs: losses on held-out rows of each source, tasks by log-likelihood; and the
running means of its weights likewise.

evaluations = Evaluations(job, told)          # everything is read and encoded once
evaluations.at(0, tokens=0)                   # the model before the run
train(job, state, told, [evaluations])        # then when it is due, and at the end
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from surgery.data.rows import Rows
from surgery.data.tokenizing.vocabulary import load_vocabulary
from surgery.midtraining import parallel
from surgery.midtraining.averages import Averages, standing_in
from surgery.midtraining.evaluation.domains import heldout_loss
from surgery.midtraining.evaluation.opened import CONTEXT, Opened
from surgery.midtraining.evaluation.resting import Ranks
from surgery.midtraining.evaluation.suite import Suite
from surgery.midtraining.evaluation.tasks import find_data

if TYPE_CHECKING:
    from surgery.midtraining.loop import Job, State


class Told(Protocol):
    """Who is told of evaluations; see run.py."""

    def evaluation(self, record: dict[str, Any]) -> None: ...


class Evaluations:
    """What a run is evaluated on, and when."""

    def __init__(self, job: Job, told: Told) -> None:
        """Raises FileError or UsageError if tasks are named that are not there, or need a tokenizer that is not."""
        self.job, self.told, self.wanted = job, told, job.run.evaluation
        self.ranks = Ranks(job.world.rank, job.world.size, parallel.summing(job.world))
        source = job.source
        vocabulary = load_vocabulary(str(source.path)) if source.tokenizer else None
        self.opened = Opened(source, job.model, job.digest, source.spec.context or CONTEXT, vocabulary)
        self.domains = _domains(job, self.wanted.rows)
        self.suite: Suite | None = None
        if self.wanted.tasks:
            tasks = find_data(self.wanted.task_data).load(self.wanted.tasks, self.wanted.limit)
            self.suite = Suite.of(tasks, self.opened.encoder, self.opened.context)

    def __call__(self, job: Job, state: State) -> None:
        step, every = state["progress"].step, self.wanted.every
        if step == job.course.layout.steps or (every and step % every == 0):
            self.at(step, state["progress"].tokens, state.get("averages"))

    def at(self, step: int, tokens: int, averages: Averages | None = None) -> None:
        """Evaluate now, if there is anything to evaluate on; also the means that have seen a point."""
        if not self.domains and not self.suite:
            return
        record: dict[str, Any] = {"step": step, "tokens": tokens, **self._found()}
        for name, mean in averages.seen().items() if averages else ():
            with standing_in(self.job.model, mean):
                record.setdefault("averages", {})[name] = self._found()
        self.told.evaluation(record)

    def _found(self) -> dict[str, Any]:
        """Of the model as it is."""
        found: dict[str, Any] = {}
        with self.job.objective.precision.computing(self.job.world.device):
            if self.domains:
                found["heldout"] = heldout_loss(self.job.model, self.domains, self.opened.lengths, ranks=self.ranks)
            if self.suite:
                found["tasks"] = self.suite.run(self.job.model, ranks=self.ranks)
        return found


def _domains(job: Job, rows: int) -> dict[str, Rows]:
    """The first held-out rows of each source that has some."""
    heldout = getattr(job.batches, "heldout", None)
    if heldout is None or not rows:
        return {}
    found = {name: heldout(name, 0, rows) for name in job.batches.sources}
    return {name: part for name, part in found.items() if len(part)}
