"""Programs, timed one by one: what each took of time, processor and memory, imports and all.

    result = Result()
    print(timed(["cp", "-r", "a", "b"], result), result.wall, result.peak)

A child's peak begins at its parent's, so a program that calls this must stay small.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Result:
    """Of one kind of run: seconds (wall, work, processor), peak bytes of the process, and what it reported."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    report: dict[str, object] = field(default_factory=dict)


def timed(command: Sequence[str], result: Result, quiet: bool = False) -> str:
    """Run a program; note its wall time, processor time and peak.  Returns what it printed.

    quiet: what it says on stderr is dropped.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL if quiet else None, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with status {process.returncode}")
    result.wall.append(time.monotonic() - began)
    result.cpu.append(usage.ru_utime + usage.ru_stime)
    result.peak.append(usage.ru_maxrss * 1024)
    return out
