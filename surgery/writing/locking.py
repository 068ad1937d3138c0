"""One run at a time: the hidden folder of a destination, made if need be, and its lock.

    folder, lock = locked(Path(".out.surgery-partial"))      # descriptors; closing `lock` lets go

The lock is an flock; on file systems that have none, nothing keeps two runs apart.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from surgery.errors import OutputError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
BUSY = "another run is writing this output"


def locked(hidden: Path) -> tuple[int, int]:
    """Descriptors of the hidden folder and of its lock, which is held."""
    for _ in range(100):
        with suppress(FileExistsError):
            os.mkdir(hidden, 0o700)
        _refuse_closed(hidden)
        try:
            fd = os.open(hidden, DIRECTORY)
        except FileNotFoundError:
            continue  # another run has just finished
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                raise OutputError("belongs to another user", file=hidden, hint="choose another destination")
            lock = _lock(fd, hidden)
        except BaseException:
            os.close(fd)
            raise
        if lock is not None:
            return fd, lock
        os.close(fd)
    raise OutputError("cannot be locked: other runs come and go", file=hidden)


def _refuse_closed(hidden: Path) -> None:
    """Raise OutputError if the owner has no rights in the folder, as under a umask of 0777; if empty, it goes."""
    with suppress(FileNotFoundError):
        info = os.lstat(hidden)
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and info.st_mode & 0o700 != 0o700:
            with suppress(OSError):
                os.rmdir(hidden)
            raise OutputError("its owner has no rights in it", file=hidden,
                              hint="umask 022, and remove the folder if it is still there")  # fmt: skip


def _lock(folder: int, hidden: Path) -> int | None:
    """The lock, held; None if the folder was removed meanwhile by the run that held it."""
    try:
        lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except FileNotFoundError:
        return None
    try:
        held = _hold(lock, hidden)
    except BaseException:
        os.close(lock)
        raise
    if held:
        return lock
    os.close(lock)
    return None


def _hold(lock: int, hidden: Path) -> bool:
    """Take the lock; False if it is no longer the one that lies in the folder."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(BUSY, file=hidden, hint="wait for it to end") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        there = os.stat(os.path.join(hidden, "lock"), follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(lock))
