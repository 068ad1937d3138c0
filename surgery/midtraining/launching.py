"""Start a run in several processes: on this host by ourselves, on several hosts by torchrun, whose lines are printed.

    status = launch(["midtrain", "run.yaml"], 2)            # two processes here; signals are handed on to them
    lines = torchrun(["midtrain", "run.yaml"], nproc=8, nnodes=2)       # what to call on each host

The exit status of `launch` is that of the processes: 75 where a signal ended the run with a checkpoint.  torchrun ends
with 1 then, and has to be told to hand SIGUSR1 on and to wait for the checkpoint, as these lines do.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from surgery.midtraining.stopping import SIGNALS
from surgery.writing.interrupt import Requeue

GRACE = 30.0  # seconds that the others get when one has failed
PORT = 29500
PAUSE = 0.1


def launch(words: Sequence[str], nproc: int) -> int:
    """Run `surgery WORDS` in `nproc` processes that find each other; returns their exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    shared = {"OMP_NUM_THREADS": threads, **os.environ, "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    children: list[subprocess.Popen[bytes]] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    before = {s: signal.signal(s, hand_on) for s in SIGNALS}
    try:
        for rank in range(nproc):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(subprocess.Popen([sys.executable, "-m", "surgery", *words], env=env))
        return _ended(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for s, handler in before.items():
            signal.signal(s, handler)


def _ended(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit status of the first that fails, when all have ended; others get some time to end by themselves."""
    failed, limit = 0, float("inf")
    while any(child.poll() is None for child in children):
        time.sleep(PAUSE)
        found = [child.returncode for child in children if child.returncode not in (None, 0, Requeue.status)]
        if found and not failed:
            failed, limit = found[0], time.monotonic() + GRACE
        if time.monotonic() > limit:
            return failed if failed > 0 else 128 - failed
    codes = [child.returncode for child in children]
    failed = failed or next((code for code in codes if code not in (0, Requeue.status)), 0)
    return (failed if failed > 0 else 128 - failed) if failed else max(codes)


def torchrun(words: Sequence[str], nproc: int, nnodes: int) -> list[str]:
    """The lines that start `surgery WORDS` in nnodes x nproc processes, one for each host."""
    flags = ["--nproc-per-node", str(nproc), "--signals-to-handle", ",".join(["SIGTERM", "SIGINT", "SIGUSR1"]),
             "--shutdown-timeout", "600", "-m", "surgery", *words]  # fmt: skip
    if nnodes == 1:
        return [shlex.join(["torchrun", "--standalone", *flags])]
    hosts = ["--nnodes", str(nnodes), "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    return [f"torchrun {shlex.join(hosts)} $HEAD_NODE:{PORT} --rdzv-id $JOB_ID {shlex.join(flags)}"] * nnodes
