"""A folder that appears whole or not at all: it grows in a hidden sibling and is renamed when all is on disk.

    with Staging.open(Path("out")) as stage:      # .out.surgery-partial/{lock,journal.jsonl,data/}
        fd = stage.create("model.safetensors", size=4096)
        ...
        stage.publish({"model.safetensors"})     # data/ becomes out

One run at a time holds the lock.  No link is ever followed or written through: what lies in the hidden folder and is
not provably from an earlier run is refused.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from surgery.errors import OutputError, SurgeryError
from surgery.tensors.files import usable_path
from surgery.writing import journal, publishing
from surgery.writing.locking import DIRECTORY, locked
from surgery.writing.replaceable import is_junk

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
OLD = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class Staging:
    """The hidden folder of one destination, locked.

    `fd` is its descriptor, `data` that of the growing output; `found` is what was at the destination at first.
    """

    def __init__(self, dst: Path, hidden: Path, fd: int, lock: int, force: bool, durable: bool) -> None:
        self.dst, self.hidden, self.fd, self.lock, self.force, self.durable = dst, hidden, fd, lock, force, durable
        self.data = -1
        self.found: os.stat_result | None = None

    @classmethod
    def open(cls, dst: Path, force: bool = False, durable: bool = True) -> Staging:
        """Lock the destination and tidy up what an interrupted `publish` left.

        Raises OutputError if `dst` holds something and not `force`, or if another run is writing it.
        """
        dst = usable_path(dst)
        hidden = hidden_of(dst)
        if not os.path.lexists(hidden) or hidden == dst:
            publishing.refuse(dst, force)
        dst.parent.mkdir(parents=True, exist_ok=True)
        fd, lock = locked(hidden)
        self = cls(dst, hidden, fd, lock, force, durable)
        try:
            publishing.recover(self)
            publishing.refuse(dst, force)
            self.found = os.lstat(dst) if os.path.lexists(dst) else None
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go.  A hidden folder without data is removed; one with data stays, to be resumed."""
        if self.fd < 0:
            return
        if self.data >= 0:
            os.close(self.data)
        done = not self.has("data") and not self.has("old")
        if done:
            with suppress(OSError):
                for name in os.listdir(self.fd):
                    if name in publishing.OURS or is_junk(name):
                        self.remove(name)
        os.close(self.lock)  # before the folder goes: on NFS an open file that is removed stays under another name
        if done:
            with suppress(OSError):  # another run has just begun here
                os.rmdir(self.hidden)
        os.close(self.fd)
        self.fd = self.data = -1

    def begin(
        self, job: str, make: Callable[[str], journal.S], other: Callable[[str], None] = lambda job: None
    ) -> tuple[journal.Journal, journal.S, list[str]]:
        """The journal to go on with, what is done already, and what there is to say about it.

        `make` makes an empty state of the job's name.  `other` is told the name of another job, before its unfinished
        output is discarded; it may raise.
        """
        notes = []
        found = journal.Journal.resume(self.fd, self.durable, make)
        if not found and not self._data_is_empty():
            what = "has no journal: not provably the unfinished output of an earlier run"
            raise OutputError(what, file=self.hidden, hint="move it away")
        if found and found[1].job != job:
            found[0].close()
            other(found[1].job)
            found = None
            notes.append("discarded the unfinished output of another job")
        if found and self.has("data"):
            self.data = os.open("data", DIRECTORY, dir_fd=self.fd)
            if found[1].fits(self.size):
                return *found, notes
            found[0].close()
            os.close(self.data)
            self.data = -1
            notes.append("discarded an unfinished output that does not fit its journal")
        self.discard()
        os.mkdir("data", 0o777, dir_fd=self.fd)
        self.data = os.open("data", DIRECTORY, dir_fd=self.fd)
        return journal.Journal.create(self.fd, job, self.durable), make(job), notes

    def discard(self) -> None:
        """Remove an unfinished output."""
        self.remove("data")
        self.remove(journal.NAME)

    def create(self, name: str, size: int) -> int:
        """A new file of `size` zero bytes, replacing what an earlier run left under that name."""
        folder = self._folder(name)
        try:
            base = name.rpartition("/")[2]
            with suppress(FileNotFoundError):
                os.unlink(base, dir_fd=folder)
            fd = os.open(base, NEW, 0o666, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def reopen(self, name: str) -> int:
        """A file that was written before."""
        folder = self._folder(name)
        try:
            return os.open(name.rpartition("/")[2], OLD, dir_fd=folder)
        finally:
            os.close(folder)

    def size(self, name: str) -> int | None:
        """The size of a file of ours; None if there is none, or it is linked from elsewhere."""
        try:
            fd = self.reopen(name)
        except OSError:
            return None
        info = os.fstat(fd)
        os.close(fd)
        ours = stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and info.st_uid == os.geteuid()
        return info.st_size if ours else None

    def publish(self, names: set[str]) -> None:
        """Make the data, which are the files of these names, the destination.  Raises OutputError."""
        publishing.publish(self, names)

    def has(self, name: str) -> bool:
        """Whether the hidden folder holds it."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def note(self, name: str, data: bytes) -> None:
        """A small file in the hidden folder."""
        fd = os.open(name, NEW, 0o600, dir_fd=self.fd)
        try:
            os.write(fd, data)
            if self.durable:
                os.fsync(fd)
                os.fsync(self.fd)
        finally:
            os.close(fd)

    def read(self, name: str) -> bytes:
        """What `note` wrote."""
        fd = os.open(name, OLD, dir_fd=self.fd)
        try:
            return os.read(fd, 256)
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        """Remove a file or a folder from the hidden folder, if it is there."""
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode):
                shutil.rmtree(name, ignore_errors=name == "old", dir_fd=self.fd)
            else:
                os.unlink(name, dir_fd=self.fd)

    def _data_is_empty(self) -> bool:
        if not self.has("data"):
            return True
        fd = os.open("data", DIRECTORY, dir_fd=self.fd)
        try:
            return all(map(is_junk, os.listdir(fd)))
        finally:
            os.close(fd)

    def _folder(self, name: str) -> int:
        """A descriptor of the folder of a file; made if it is not there."""
        fd = os.dup(self.data)
        for part in name.split("/")[:-1]:
            with suppress(FileExistsError):
                os.mkdir(part, 0o777, dir_fd=fd)
            try:
                inner = os.open(part, DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd


def check_free(dst: Path, force: bool) -> None:
    """Raise OutputError if something is at `dst` that may not be replaced.

    What a run that was killed after its last step left beside it is removed.
    """
    dst = usable_path(dst)
    if os.path.lexists(dst) and os.path.lexists(hidden_of(dst)):
        with suppress(SurgeryError):
            Staging.open(dst, force).close()
    publishing.refuse(dst, force)


def hidden_of(dst: Path) -> Path:
    return dst.with_name(f".{dst.name}.surgery-partial") if dst.name else dst


def has_begun(dst: Path) -> bool:
    """Whether a run has begun to write it and has not ended."""
    return (hidden_of(usable_path(dst)) / journal.NAME).exists()


def data_of(dst: Path) -> Path:
    """Where the output that will become `dst` grows until it is published."""
    return hidden_of(usable_path(dst)) / "data"
