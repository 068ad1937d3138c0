"""Write the model of a run in any format, through the converter: export(job, run.export[0], Path("export/step500")).

Where several processes hold the model, all of them first write what they hold, and the first one exports that:

    with gathered(job, job.weights(), folder) as whole:
        if job.world.main:
            export(job, wanted, dst, step, weights=whole)

check_exports(run, source) plans all of them before the first step, so that none is refused behind the last.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.containers.text import read_json
from surgery.conversion.convert import execute, plan_for
from surgery.conversion.report import Plan, Report
from surgery.conversion.request import Write
from surgery.errors import ConfigError, FileError, SurgeryError
from surgery.formats.base import Checkpoint
from surgery.formats.operations import DTYPES, to_dtype
from surgery.formats.topology import Topology
from surgery.midtraining import parallel
from surgery.midtraining.checkpoint import shard_name, stitched
from surgery.midtraining.model import checkpoint_of
from surgery.midtraining.saving import held, write_checkpoint
from surgery.midtraining.settings import Export, Run
from surgery.tensors.lazy import Lazy
from surgery.writing.replaceable import PROVENANCE

if TYPE_CHECKING:
    from surgery.midtraining.loop import Job

GATHERED = ".gathered"
ENTRY = "export"  # of surgery.json: the settings of an export
Weights = Mapping[str, torch.Tensor] | Mapping[str, Lazy]


@contextmanager
def gathered(job: Job, weights: Mapping[str, torch.Tensor], folder: Path) -> Iterator[Weights]:
    """Whole weights: of one process as they lie in memory, of several through files in `folder`, for the first process
    to read.  Raises OutputError if they cannot be written."""
    if job.world.size == 1:
        yield weights
        return
    place = folder / GATHERED
    written = write_checkpoint(place, job.world, 0, held(job.world, weights, copied=False), None)
    yield stitched([written / shard_name(rank) for rank in range(job.world.size)]) if job.world.main else {}
    parallel.together(job.world, lambda: shutil.rmtree(place, ignore_errors=True), main=True)


def export(
    job: Job, wanted: Export, dst: Path, step: int | None = None, command: Sequence[str] = (), force: bool = False,
    weights: Weights | None = None,
) -> Report:  # fmt: skip
    """The model as it is after `step` steps, or other `weights` of it, such as a mean.

    `dst` appears whole or not at all.  Raises SurgeryError.
    """
    now = checkpoint_of(job.weights() if weights is None else weights, job.source,
                        DTYPES.get(wanted.dtype, wanted.dtype), step)  # fmt: skip
    once = {"midtraining": step, "weights": secrets.token_hex(8)}  # a killed export is not gone on with: memory is gone
    return execute(_planned(now, wanted, command=command, force=force, job=once), dst,
                   prove=lambda written: {ENTRY: _settings(wanted)})  # fmt: skip


def is_written(dst: Path, wanted: Export) -> bool:
    """Whether an export lies there that was made with the same settings."""
    with suppress(FileError):
        record = read_json(dst / PROVENANCE)
        return isinstance(record, dict) and record.get(ENTRY) == _settings(wanted)
    return False


def _settings(wanted: Export) -> dict[str, Any]:
    """What an export depends on besides the weights."""
    return wanted.model_dump(mode="json", exclude={"every"})


def check_exports(run: Run, source: Checkpoint) -> None:
    """Plan every export before anything is trained.  Raises ConfigError naming each that could not be written."""
    found, hints, twice = [], [], {w.to for w in run.export if [e.to for e in run.export].count(w.to) > 1}
    if twice:
        found.append(f"export: {', '.join(sorted(twice))} is named twice, and both would have the same name")
        hints.append("convert the one into the other when the run has ended")
    for wanted in run.export:
        try:
            _planned(source if wanted.dtype == "source" else to_dtype(source, DTYPES[wanted.dtype]), wanted)
        except SurgeryError as error:
            found.append(f"export to {wanted.to}: {error.what}")
            hints += [error.hint] if error.hint else []
    if found:
        raise ConfigError("\n  ".join(found), hint="; ".join(hints) or None)


def _planned(now: Checkpoint, wanted: Export, job: Mapping[str, object] | None = None, **more: Any) -> Plan:
    """How a checkpoint would be written."""
    if wanted.attention == "full":
        now = replace(now, spec=now.spec.replace(sparse=None))
    sizes = Topology(tp=wanted.tp, pp=wanted.pp, ep=wanted.ep)
    return plan_for(now, Write(to=wanted.to, topology=sizes, options=wanted.options, **more), job=job)
