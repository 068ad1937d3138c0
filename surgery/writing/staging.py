"""A folder that appears whole or not at all: it grows in a hidden sibling and is renamed when all is on disk.

    with Staging.open(Path("out")) as stage:      # .out.surgery-partial/{lock,journal.jsonl,data/,old/}
        fd = stage.create("model.safetensors", size=4096)
        ...
        stage.publish({"model.safetensors"})     # data/ becomes out

One run at a time holds the lock (flock; on file systems that have none, nothing keeps two runs apart).  No link is
ever followed or written through: what lies in the hidden folder and is not provably from an earlier run is refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from surgery.errors import OutputError, show, some
from surgery.writing import journal

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
OLD = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class Staging:
    """The hidden folder of one destination, locked.  `fd` is its descriptor, `data` that of the growing output."""

    def __init__(self, dst: Path, hidden: Path, fd: int, lock: int, durable: bool) -> None:
        self.dst, self.hidden, self.fd, self.lock, self.durable = dst, hidden, fd, lock, durable
        self.data = -1

    @classmethod
    def open(cls, dst: Path, force: bool = False, durable: bool = True) -> Staging:
        """Lock the destination and tidy up what an interrupted `publish` left.

        Raises OutputError if `dst` holds something and not `force`, or if another run is writing it.
        """
        dst = Path(os.path.abspath(dst))
        hidden = dst.with_name(f".{dst.name}.surgery-partial") if dst.name else dst
        if not os.path.lexists(hidden) or hidden == dst:
            check_free(dst, force)
        dst.parent.mkdir(parents=True, exist_ok=True)
        fd, lock = _locked(hidden)
        self = cls(dst, hidden, fd, lock, durable)
        try:
            self._recover()
            check_free(dst, force)
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
        if not self._has("data") and not self._has("old"):
            self._remove()
        os.close(self.lock)
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
        if found and self._has("data"):
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
        if self._has("data"):
            shutil.rmtree("data", dir_fd=self.fd)
        if self._has(journal.NAME):
            os.unlink(journal.NAME, dir_fd=self.fd)

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
        os.ftruncate(fd, size)
        return fd

    def reopen(self, name: str) -> int:
        """A file that an earlier run left unfinished."""
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
        """Make the data the destination: at once, and only when everything is on disk."""
        held = {os.path.normpath(os.path.join(at, f)) for at, _, fs, _ in os.fwalk(".", dir_fd=self.data) for f in fs}
        assert held == names, held ^ names
        if self.durable:
            for _, _, _, folder in os.fwalk(".", dir_fd=self.data, topdown=False):
                os.fsync(folder)
        parent = os.open(self.dst.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.path.lexists(self.dst) and not _is_empty_folder(self.dst):
                os.rename(self.dst.name, "old", src_dir_fd=parent, dst_dir_fd=self.fd)
            try:
                os.rename("data", self.dst.name, src_dir_fd=self.fd, dst_dir_fd=parent)
            except OSError:
                if self._has("old"):
                    os.rename("old", self.dst.name, src_dir_fd=self.fd, dst_dir_fd=parent)
                raise
            if self.durable:
                os.fsync(parent)
        finally:
            os.close(parent)
        if self._has("old"):
            shutil.rmtree("old", ignore_errors=True, dir_fd=self.fd)

    def _recover(self) -> None:
        """Finish or undo the renaming of a run that was killed in the middle of it."""
        strange = set(os.listdir(self.fd)) - {"lock", "data", "old", journal.NAME}
        if strange:
            what = f"holds {some(map(show, sorted(strange)))}: not the unfinished output of an earlier run"
            raise OutputError(what, file=self.hidden, hint="move it away")
        if not self._has("old"):
            return
        if not os.path.lexists(self.dst):
            os.rename("old", self.dst, src_dir_fd=self.fd)
        elif not self._has("data"):
            shutil.rmtree("old", ignore_errors=True, dir_fd=self.fd)
        else:
            raise OutputError(
                f"what {self.dst.name} was before an earlier run with --force still lies in 'old'",
                file=self.hidden,
                hint="move it away, or back",
            )

    def _data_is_empty(self) -> bool:
        if not self._has("data"):
            return True
        fd = os.open("data", DIRECTORY, dir_fd=self.fd)
        try:
            return not os.listdir(fd)
        finally:
            os.close(fd)

    def _has(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _remove(self) -> None:
        for name in (journal.NAME, "lock"):
            if self._has(name):
                os.unlink(name, dir_fd=self.fd)
        with suppress(OSError):  # another run has just begun here
            os.rmdir(self.hidden)

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
    """Raise OutputError if something is at `dst` that may not be replaced."""
    if not os.path.lexists(dst) or _is_empty_folder(dst):
        return
    if dst.is_symlink() or not dst.is_dir():
        raise OutputError("is no folder", file=dst, hint="choose another destination")
    here = {Path.cwd(), Path.home().absolute()}
    if dst == Path(dst.anchor) or any(dst == p or dst in p.parents for p in here):
        raise OutputError("holds the working or the home folder and is never replaced", file=dst)
    if not force:
        raise OutputError("exists already", file=dst, hint="choose another destination, or --force to replace it")


def _is_empty_folder(path: Path) -> bool:
    return not path.is_symlink() and path.is_dir() and not any(path.iterdir())


def _locked(hidden: Path) -> tuple[int, int]:
    """Descriptors of the hidden folder and of its lock, which is held."""
    for _ in range(100):
        with suppress(FileExistsError):
            os.mkdir(hidden, 0o700)
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


def _lock(folder: int, hidden: Path) -> int | None:
    """The lock, held; None if the folder was removed meanwhile by the run that held it."""
    try:
        lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise
            raise OutputError("another run is writing this output", file=hidden, hint="wait for it to end") from None
    try:
        there = os.stat(os.path.join(hidden, "lock"), follow_symlinks=False)
        if os.path.samestat(there, os.fstat(lock)):
            return lock
    except FileNotFoundError:
        pass
    os.close(lock)
    return None


def data_of(dst: Path) -> Path:
    """Where the output that will become `dst` grows until it is published."""
    dst = Path(os.path.abspath(dst))
    return dst.with_name(f".{dst.name}.surgery-partial") / "data"
