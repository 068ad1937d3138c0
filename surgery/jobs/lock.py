"""One run of a step at a time, on whatever machine: an flock, which ends with the processes that hold it.

    with held(Path("steps/train.lock"), waiting) as fd:         # `waiting(who)` is called again and again meanwhile
        subprocess.Popen(command, pass_fds=(fd,))               # which then holds it even if this process is killed

On file systems without flock a file that only one run can create takes its place; a run that was killed leaves it
behind, and it is taken over once its process is gone, or removed by hand where that ran on another machine.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from surgery.writing.locking import NO_LOCKS

POLL = 0.25  # seconds between two looks
FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@contextmanager
def held(path: Path, waiting: Callable[[str], None]) -> Iterator[int]:
    """Hold a lock; `waiting` may raise to give up.  What the file says is who holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, FLAGS, 0o666)
    token = path.with_suffix(".owner")
    mine = False
    try:
        while True:
            free = _flock(fd)
            mine = free is None and _create(token)
            if free or mine:
                break
            waiting(_read(token if free is None else path))
            time.sleep(POLL)
        os.ftruncate(fd, 0)
        os.pwrite(fd, _myself(), 0)
        yield fd
    finally:
        os.close(fd)
        if mine:
            token.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether a run holds the lock now; on file systems without flock, whether one may."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        free = _flock(fd)
        return path.with_suffix(".owner").exists() if free is None else not free
    finally:
        os.close(fd)


def _flock(fd: int) -> bool | None:
    """Whether the lock was free, and is now held; None if there are no locks here."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _create(token: Path) -> bool:
    """Make the file that stands for a lock, after removing that of a process of this machine that is gone."""
    with suppress(OSError):
        host, pid = token.read_text().split()[:2]
        if host == socket.gethostname() and not _alive(int(pid)):
            token.unlink()
    try:
        fd = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    os.write(fd, _myself())
    os.close(fd)
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _myself() -> bytes:
    return f"{socket.gethostname()} {os.getpid()} {datetime.now(UTC).isoformat(timespec='seconds')}\n".encode()


def _read(path: Path) -> str:
    """Who holds it: host, process, since when."""
    try:
        host, pid, since = path.read_text().split()
    except (OSError, ValueError):
        return "another run"
    return f"process {pid} on {host}, since {since}"
