"""Write the model of a run in any format, through the converter: export(job, run.export[0], Path("export/step500"))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.conversion.convert import execute, plan_for
from surgery.conversion.report import Report
from surgery.conversion.request import Write
from surgery.formats.operations import DTYPES
from surgery.formats.topology import Topology
from surgery.midtraining.model import checkpoint_of
from surgery.midtraining.settings import Export

if TYPE_CHECKING:
    from surgery.midtraining.loop import Job


def export(
    job: Job, wanted: Export, dst: Path, step: int | None = None, command: Sequence[str] = (), force: bool = False
) -> Report:
    """The model as it is after `step` steps.  `dst` appears whole or not at all.  Raises SurgeryError."""
    now = checkpoint_of(job.weights(), job.source, DTYPES.get(wanted.dtype, wanted.dtype), step)
    if wanted.attention == "full":
        now = replace(now, spec=now.spec.replace(sparse=None))
    sizes = Topology(tp=wanted.tp, pp=wanted.pp, ep=wanted.ep)
    write = Write(to=wanted.to, topology=sizes, options=wanted.options, command=command, force=force)
    return execute(plan_for(now, write, job={"midtraining": step}), dst)
