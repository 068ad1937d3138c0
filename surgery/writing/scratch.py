"""Temporary folders that do not outlive their run: also after SIGKILL, when the next run of the same kind removes them.

with scratch("logits") as folder:         # /tmp/surgery-logits-xxxxxxxx, locked while it is used
    ...
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".surgery-lock"


@contextmanager
def scratch(kind: str, beside: Path | None = None) -> Iterator[Path]:
    """A new folder in TMPDIR, or a hidden one in the folder `beside`; it is removed with all that it holds."""
    prefix = f"surgery-{kind}-" if beside is None else f".surgery-{kind}-"
    _sweep(Path(tempfile.gettempdir() if beside is None else beside), prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=beside, ignore_cleanup_errors=True) as name:
        lock = os.open(os.path.join(name, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(lock, _machine())
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(name)
        finally:
            os.close(lock)


def _sweep(place: Path, prefix: str) -> None:
    """Remove what runs that were killed left: folders of ours, made on this machine, whose lock nobody holds."""
    for folder in place.glob(prefix + "*"):
        with suppress(OSError):
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(lock).st_uid == os.geteuid() and os.read(lock, 256) == _machine():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _machine() -> bytes:
    """Locks may not reach from one machine to another where both see the folder."""
    return os.uname().nodename.encode()
