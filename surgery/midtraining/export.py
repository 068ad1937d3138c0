"""Write the model of a run in any format, through the converter: export(job, run.export[0], Path("export/step500"))."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

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
    job: Job, wanted: Export, dst: Path, step: int | None = None, command: Sequence[str] = (), force: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Report:  # fmt: skip
    """The model as it is after `step` steps, or other `weights` of it, such as a mean.

    `dst` appears whole or not at all.  Raises SurgeryError.
    """
    now = checkpoint_of(job.weights() if weights is None else weights, job.source,
                        DTYPES.get(wanted.dtype, wanted.dtype), step)  # fmt: skip
    if wanted.attention == "full":
        now = replace(now, spec=now.spec.replace(sparse=None))
    sizes = Topology(tp=wanted.tp, pp=wanted.pp, ep=wanted.ep)
    write = Write(to=wanted.to, topology=sizes, options=wanted.options, command=command, force=force)
    once = {"midtraining": step, "weights": secrets.token_hex(8)}  # a killed export is not gone on with: memory is gone
    return execute(plan_for(now, write, job=once), dst)
