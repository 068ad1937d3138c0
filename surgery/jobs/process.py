"""The command of a step as a process: what is started, where its output goes, and how it is stopped.

    children = Children()
    code = children.run(arguments(step, paths), log, lock=fd, env=environment(step))
    children.stop()                     # from a signal: SIGTERM to all of them; the second time SIGKILL

A child has a group of its own, so that Ctrl-C reaches this process alone, which then stops it in order.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from surgery.errors import UsageError
from surgery.jobs.names import Shown
from surgery.jobs.step import Step

TORCHRUN = "SURGERY_TORCHRUN"  # set by batch scripts: how to start a command on all nodes of the job
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds; torch 2.6 knows it not
LAST = 4096  # bytes at the end of a log in which its last line is looked for


def arguments(step: Step, shown: Shown) -> list[str]:
    """The words that are run.  Raises UsageError if it needs several nodes and this is no job on them."""
    words, spec = step.command(shown), step.spec
    if spec.shell is not None:
        return ["bash", "-euo", "pipefail", "-c", words[0]]
    program = ["-m", "surgery", *words] if spec.surgery else words
    if step.resources.processes is None:
        return [sys.executable, *program]
    return [*_torchrun(step), *program]


def _torchrun(step: Step) -> list[str]:
    if given := os.environ.get(TORCHRUN):
        return shlex.split(given)
    if step.resources.nodes > 1:
        raise UsageError(
            f"step {step.id} needs {step.resources.nodes} nodes", hint="surgery launch submits it as a job"
        )
    many = str(step.resources.processes)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", many]


def as_typed(step: Step, shown: Shown) -> str:
    """The command for people."""
    words = step.command(shown)
    return words[0] if step.spec.shell is not None else shlex.join([step.spec.kind, *words])


def environment(step: Step) -> dict[str, str]:
    """Ours, in which `surgery` and `python` are those that run now, what suits a log, and the step's variables.

    torchrun would kill its processes 30 seconds after it told them to stop, while they write their checkpoint.
    """
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    defaults = {"COLUMNS": "120", SHUTDOWN: "600"}
    return {**defaults, **os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", **step.env}


class Children:
    """The commands that run now, in any number of threads."""

    def __init__(self) -> None:
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._guard = threading.Lock()
        self.stopped = 0  # how often `stop` was called

    def run(self, words: Sequence[str], log: Path, stdout: BinaryIO | None, lock: int, env: Mapping[str, str]) -> int:
        """Run a command to its end; its status, negative for a signal.  All it prints is appended to the log, or what
        goes to stdout to a file.  It holds the descriptor `lock`."""
        with open(log, "ab") as told, self._guard:
            if self.stopped:
                return -signal.SIGTERM
            child = subprocess.Popen(
                list(words), stdin=subprocess.DEVNULL, stdout=stdout or told, stderr=told, env=dict(env),
                pass_fds=(lock,), process_group=0,
            )  # fmt: skip
            self._running[child.pid] = child
        try:
            return child.wait()
        finally:
            with self._guard:
                del self._running[child.pid]

    def stop(self) -> None:
        """Let all commands end, and none begin."""
        with self._guard:
            self.stopped += 1
            for pid, child in self._running.items():
                if child.poll() is None:
                    os.killpg(pid, signal.SIGTERM if self.stopped == 1 else signal.SIGKILL)


def last_line(log: Path) -> str:
    """The last line of a log that is neither blank nor a note; the first one is the command."""
    try:
        with open(log, "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - LAST)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    told = (line.strip() for line in reversed(lines[0 if start else 1 :]))
    return next((line for line in told if line and not line.startswith("note:")), "")
