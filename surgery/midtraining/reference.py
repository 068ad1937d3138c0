"""The frozen reference of preferences: what the model says of every completion before it is trained, kept on disk.

    job = with_reference(job)           # job.batches then give rows with their `reference`

It is computed once, without a second model in memory, into `reference.safetensors` in the run's folder, which a run
that goes on reads again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from surgery.data.files.mapped import Array
from surgery.data.rows import Rows, RowSource
from surgery.errors import FileError
from surgery.midtraining import parallel
from surgery.midtraining.batching import micro_batches, rows_of
from surgery.midtraining.evaluation.resting import resting
from surgery.midtraining.preference import completion_logps
from surgery.midtraining.step import hidden_states
from surgery.writing.atomic import atomic_file

if TYPE_CHECKING:
    from surgery.midtraining.loop import Job

FILE = "reference.safetensors"


@dataclass(frozen=True, eq=False)
class Referred:
    """Rows of a source of pairs, each with what the reference says of its completion: `logps`, by its instance."""

    batches: Any
    logps: Array

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        rows: Rows = self.batches.rows(step, rank, world)
        return replace(rows, reference=self.logps[rows.instance])


def with_reference(job: Job) -> Job:
    """The job with the reference in its rows, if it learns from preferences; else as it is.

    Raises FileError if the file is of another model or data, or is missing where the run goes on.
    """
    if job.objective.preference is None:
        return job
    path = Path(job.run.output) / FILE
    if not path.is_file():
        if job.begun:
            raise FileError("is missing, and the model has been trained since", file=path, hint="begin the run anew")
        logps = _computed(job)
        parallel.together(job.world, lambda: _write(path, logps, job.digest), main=True)
    return replace(job, batches=cast(RowSource, Referred(job.batches, _read(path, job))))


@torch.no_grad()
def _computed(job: Job) -> torch.Tensor:
    """float64 [instances], by the model as it is now; NaN for those that the run does not see."""
    model, objective, world = job.model, job.objective, job.world
    largest = max(int(rows.instance.max()) for rows in _all_rows(job))
    sums, counts = torch.zeros(2, largest + 1, dtype=torch.float64, device=world.device)
    with resting(model), objective.precision.computing(world.device):
        for rows in _all_rows(job):
            at = 0
            for part in micro_batches(rows, job.course.micro, world.device):
                hidden = hidden_states(model, part)
                logps, _ = completion_logps(hidden, model.get_output_embeddings().weight, part.labels, objective.chunk)
                index = torch.from_numpy(rows.instance[at : at + len(logps)]).to(world.device)
                sums[index], counts[index] = logps.double(), 1.0
                at += len(logps)
    total = parallel.summing(world)
    found: torch.Tensor = total(sums) / total(counts)
    return found.cpu()


def _all_rows(job: Job) -> Iterator[Rows]:
    """This rank's rows of every step, as far as the run goes; each only once."""
    seen: set[bytes] = set()
    for step in range(job.course.layout.steps):
        rows = rows_of(job.batches, job.course.layout, step, job.world.rank, job.world.size)
        if (key := rows.instance.tobytes()) not in seen:
            seen.add(key)
            yield rows


def _write(path: Path, logps: torch.Tensor, digest: str) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(save({"logps": logps}, metadata={"model": digest}))


def _read(path: Path, job: Job) -> Array:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("model") != job.digest or set(file.keys()) != {"logps"}:
            raise FileError("is of another model", file=path, hint="move it away, or choose another output")
        logps: Array = file.get_tensor("logps").numpy()
    rows = next(_all_rows(job))
    if rows.instance.max() >= len(logps) or not all(map(bool, (logps[rows.instance] <= 0))):
        raise FileError("is of other data", file=path, hint="move it away, or choose another output")
    return logps
