"""The hidden folder that files are pulled into, piece by piece, until all of them go to their place.

    with landing(Path("moe"), "s3://bucket/moe", {"config.json": (40, '"etag"')}) as place:
        place.missing(1 << 24)                  # [("config.json", 0, 40)]
        place.write("config.json", 0, data)
        place.finish()
        place.publish(["config.json"], force=False)

A journal has a digest of each piece, so that a run that was killed is gone on with, also after a power cut.  What was
begun from another address or of other versions is begun anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import OutputError
from surgery.writing.atomic import into_free, sync_folder
from surgery.writing.locking import locked
from surgery.writing.renaming import move
from surgery.writing.sink import pwrite_all

Sizes = Mapping[str, tuple[int, str | None]]
DATA, JOURNAL, WHOLE = "data", "journal", "whole"


class Landing:
    """Files by name in `hidden`, which is locked; `done` has the pieces of each that are there."""

    def __init__(self, hidden: Path, dst: Path, source: str, sizes: Sizes) -> None:
        self.hidden, self.dst, self.sizes = hidden, dst, sizes
        self.done: dict[str, set[tuple[int, int]]] = {name: set() for name in sizes}
        self.lock = threading.Lock()
        head = json.dumps([source, sorted(sizes.items())])
        lines = _lines(hidden / JOURNAL)
        self.complete = lines[:1] == [head] and WHOLE in lines
        if lines[:1] != [head]:
            shutil.rmtree(hidden / DATA, ignore_errors=True)
            (hidden / JOURNAL).write_text(head + "\n")
        elif not self.complete:
            for line in lines[1:]:
                self._again(line)
        (hidden / DATA).mkdir(exist_ok=True)
        self.journal = open(hidden / JOURNAL, "a")  # noqa: SIM115

    def _again(self, line: str) -> None:
        """Take a piece of an earlier run, if it is what the journal says."""
        try:
            name, start, end, digest = json.loads(line)
            with open(self.path(name), "rb") as file:
                file.seek(start)
                if _digest(file.read(end - start)) == digest and end <= self.sizes[name][0]:
                    self.done[name].add((start, end))
        except (ValueError, KeyError, TypeError, OSError):
            pass  # the line or the piece was not written in full

    def path(self, name: str) -> Path:
        """Where a file lies for now."""
        return self.hidden / DATA / name

    def had(self) -> int:
        """Bytes that are there."""
        if self.complete:
            return sum(size for size, _ in self.sizes.values())
        return sum(end - start for pieces in self.done.values() for start, end in pieces)

    def published(self, name: str) -> bool:
        """Whether an earlier run has put a file to its place."""
        place = self.dst / name
        return self.complete and not self.path(name).exists() and place.stat().st_size == self.sizes[name][0]

    def missing(self, most: int) -> list[tuple[str, int, int]]:
        """The pieces that are not there; every file exists afterwards."""
        todo = []
        for name, (size, _) in self.sizes.items():
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
            with open(self.path(name), "ab") as file:
                file.truncate(size)
            cuts = [(at, min(at + most, size)) for at in range(0, size, most)]
            todo += [(name, *cut) for cut in cuts if cut not in self.done[name]]
        return todo

    def write(self, name: str, start: int, data: bytes) -> None:
        """A piece.  Raises OSError."""
        fd = os.open(self.path(name), os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            pwrite_all(fd, data, start)
        finally:
            os.close(fd)
        self._note(json.dumps([name, start, start + len(data), _digest(data)]))

    def _note(self, line: str) -> None:
        with self.lock:
            self.journal.write(line + "\n")
            self.journal.flush()

    def finish(self) -> None:
        """All pieces are there: see that the disk has them."""
        for name in self.sizes:
            fd = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        self._note(WHOLE)
        os.fsync(self.journal.fileno())

    def publish(self, names: Sequence[str], force: bool) -> None:
        """Put the files to their place, in this order, and remove the hidden folder.  Raises OutputError."""
        if not os.path.lexists(self.dst) and all(self.path(name).exists() for name in names):
            hidden, parent = (os.open(p, os.O_RDONLY | os.O_DIRECTORY) for p in (self.hidden, self.dst.parent))
            try:
                move(DATA, self.dst.name, hidden, parent)
            except FileExistsError:
                raise OutputError("was made by another program meanwhile", file=self.dst,
                                  hint="move it away, then run the same command again") from None  # fmt: skip
            finally:
                os.close(hidden)
                os.close(parent)
        else:
            for name in names:
                self._one(name, force)
        sync_folder(self.dst.parent)
        self.journal.close()
        shutil.rmtree(self.hidden)

    def _one(self, name: str, force: bool) -> None:
        if not self.path(name).exists():
            return  # an earlier run did it
        place = self.dst / name
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path(name), place) if force else into_free(self.path(name), place)


@contextmanager
def landing(dst: Path, source: str, sizes: Sizes) -> Iterator[Landing]:
    """The folder of a destination, locked.  Raises OutputError if another run has it."""
    hidden = dst.with_name(f".{dst.name}.surgery-pull")
    dst.parent.mkdir(parents=True, exist_ok=True)
    fd, lock = locked(hidden)
    try:
        place = Landing(hidden, dst, source, sizes)
        try:
            yield place
        finally:
            place.journal.close()
    finally:
        os.close(lock)
        os.close(fd)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
