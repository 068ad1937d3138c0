"""What became of a step, as a file beside its log says.

    record = read_record(step)                          # None: it was never begun
    write_record(step, begun(parts, "surgery convert ..."))

A record is written before a step begins and after it ended.  That it says "running" proves nothing; the lock does.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from surgery.jobs.step import Step
from surgery.writing.atomic import write_json

FORMAT = "surgery-step-1"
JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID")


@dataclass(frozen=True)
class Record:
    """What became of a step.

    state     running, done, failed, stopped              parts    what its key is made of (keys.py)
    outputs   name -> digest                              bytes    of all outputs
    command   as one would type it                        says     the last line that it printed
    started   ISO 8601    seconds    of the last attempt  host, pid, job    who ran it, and in which job of a cluster
    exit      status of the command, negative for a signal
    """

    state: str
    parts: Mapping[str, Any]
    outputs: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0
    command: str = ""
    says: str = ""
    started: str = ""
    seconds: float = 0.0
    host: str = ""
    pid: int = 0
    job: str = ""
    exit: int | None = None

    @property
    def key(self) -> str:
        return key_of(self.parts)


def key_of(parts: Mapping[str, Any]) -> str:
    """The digest of all that a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def begun(parts: Mapping[str, Any], command: str) -> Record:
    """The record of a step that this process begins now."""
    job = next((os.environ[name] for name in JOB_IDS if os.environ.get(name)), "")
    return Record("running", parts, command=command, started=datetime.now(UTC).isoformat(timespec="seconds"),
                  host=socket.gethostname(), pid=os.getpid(), job=job)  # fmt: skip


def read_record(step: Step) -> Record | None:
    """None if there is none, or none that can be read: the step then counts as not done."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(step.file(".json").read_bytes())
        if found.pop("format") == FORMAT:
            return Record(**{f.name: found[f.name] for f in fields(Record)})
    return None


def write_record(step: Step, record: Record) -> None:
    step.files.mkdir(parents=True, exist_ok=True)
    write_json(step.file(".json"), {"format": FORMAT, **asdict(record)})
