"""Who carries the shares of one output: processes of this machine, or the workers of a Ray cluster.

    ENGINES["processes"](task, [Shard(0, 2), Shard(1, 2)], dst, progress)

A task writes one share of the files.  It opens and plans for itself, so nothing but the request travels.  A process
that is killed is started again and goes on where it was.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from surgery import errors
from surgery.errors import SurgeryError, UsageError
from surgery.writing.interrupt import Interrupted, signals
from surgery.writing.shards import Shard
from surgery.writing.sink import RESUME
from surgery.writing.stream import Progress

Task = Callable[[Shard, Progress], None]
TRIES = 3  # of a process that is killed
TICK = 0.2  # seconds


class _Worker:
    """A process that writes a share."""

    def __init__(self, task: Task, shard: Shard) -> None:
        self.shard, context = shard, multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(task, shard, theirs), name=f"surgery-shard-{shard.index}")
        self.process.start()
        theirs.close()


def _work(task: Task, shard: Shard, pipe: Connection) -> None:
    """What a process does: it tells how many bytes are done, and in the end how it ended."""

    def tell(n: int) -> None:
        try:
            pipe.send(n)
        except OSError:
            sys.exit(1)  # who started this process is gone

    try:
        task(shard, tell)
    except SurgeryError as error:
        pipe.send((type(error).__name__, error.what, error.file, error.hint))
        sys.exit(1)


def in_processes(task: Task, todo: Iterable[Shard], dst: Path, progress: Progress) -> None:
    """A process of this machine for each share.  Raises what one of them met; SurgeryError if one is killed again."""
    tries = dict.fromkeys(todo, 1)
    with signals() as came:
        running = [_Worker(task, shard) for shard in tries]
        try:
            while running:
                for worker in [w for w in running if w.ours in wait([w.ours for w in running], TICK)]:
                    if not _heard(worker, progress):
                        running.remove(worker)
                        running += _again(task, worker, tries)
                if came:
                    raise Interrupted(came[0], dst)
        finally:
            _stop(running)


def _heard(worker: _Worker, progress: Progress) -> bool:
    """Take in what a process says; False if it has ended.  Raises what it met."""
    try:
        said = worker.ours.recv()
    except EOFError:
        worker.process.join()
        return False
    if isinstance(said, int):
        progress(said)
        return True
    name, what, file, hint = said
    kind = getattr(errors, name, SurgeryError)
    raise (kind if kind.__init__ is SurgeryError.__init__ else SurgeryError)(what, file=file, hint=hint)


def _again(task: Task, worker: _Worker, tries: dict[Shard, int]) -> list[_Worker]:
    """A new process for one that was killed."""
    code, shard = worker.process.exitcode or 0, worker.shard
    if code == 0:
        return []
    tries[shard] += 1
    if code > 0 or tries[shard] > TRIES:
        what = f"the process of shard {shard.index} of {shard.count} ended with {code}"
        raise SurgeryError(what, hint=RESUME)
    return [_Worker(task, shard)]


def _stop(running: Iterable[_Worker]) -> None:
    for worker in running:
        worker.process.terminate()
    for worker in running:
        worker.process.join()


def in_ray(task: Task, todo: Iterable[Shard], dst: Path, progress: Progress) -> None:
    """A task of a Ray cluster for each share: that of RAY_ADDRESS, else one on this machine.

    `progress` is not told: what the workers do is seen when all is put together.  Raises SurgeryError.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray", hint="pip install 'checkpoint-surgery[ray]'") from None
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(_answer)
    tries = dict.fromkeys(todo, 1)
    running = {remote.remote(task, shard): shard for shard in tries}
    while running:
        (ready, *_), _ = ray.wait([*running], num_returns=1)
        shard = running.pop(ready)
        try:
            said = ray.get(ready)
        except ray.exceptions.WorkerCrashedError:
            tries[shard] += 1
            if tries[shard] > TRIES:
                what = f"the worker of shard {shard.index} of {shard.count} crashed {TRIES} times"
                raise SurgeryError(what, hint=RESUME) from None
            time.sleep(TICK)
            running[remote.remote(task, shard)] = shard
            continue
        if said is not None:
            raise SurgeryError(said)


def _answer(task: Task, shard: Shard) -> str | None:
    """What went wrong, as text."""
    try:
        task(shard, lambda n: None)
    except SurgeryError as error:
        return str(error)
    return None


ENGINES: dict[str, Callable[[Task, Iterable[Shard], Path, Progress], None]] = {
    "processes": in_processes,
    "ray": in_ray,
}
