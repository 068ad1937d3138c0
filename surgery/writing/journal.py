"""What a killed run had finished: lines of JSON, each with its own checksum, appended after the data are on disk.

    journal, state = Journal.resume(folder_fd, True, State)       # None: nothing to go on from
    journal.append([{"file": "a.bin", "done": 4096}])

The first line names the job.  A line that is torn or damaged ends what is believed; it and all after it are cut off.
What the other lines mean is up to a state, made for the job and told of each line: `State` here, of a run that writes
planned files, is one.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

NAME = "journal.jsonl"
FORMAT = 3
Line = dict[str, Any]
Sizes = Callable[[str], int | None]  # the size of a file of the output, None if there is none of ours


class Told(Protocol):
    """What lines of a journal add up to."""

    job: str

    def apply(self, line: Line) -> None:
        """Take in one line.  Raises KeyError, TypeError, ValueError or AttributeError if it is none of ours."""

    def fits(self, size: Sizes) -> bool:
        """Are the files there that the lines speak of?"""


S = TypeVar("S", bound=Told)


@dataclass
class State:
    """What the lines of a journal add up to.

    sizes    of all files as planned, in bytes: one that was begun is that long already
    done     finished files -> their sizes
    file, region, offset   where in which unfinished file to go on: `offset` bytes into region number `region`
    crcs     CRC-32 of that file's regions up to there
    checks   finished files -> CRC-32 of their regions, as far as they were kept
    counts   of the ledger: part -> [fingerprint, elements, not finite, zeros]
    """

    job: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    file: str | None = None
    region: int = 0
    offset: int = 0
    crcs: dict[int, int] = field(default_factory=dict)
    checks: dict[str, dict[int, int]] = field(default_factory=dict)
    counts: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)

    def apply(self, line: Line) -> None:
        """Take in one line.  Raises KeyError, TypeError or ValueError if it is none of ours."""
        counts = {str(name): (int(a), int(b), int(c), int(d)) for name, (a, b, c, d) in line["counts"].items()}
        crcs = {int(i): int(crc) for i, crc in line["crcs"]}
        name = str(line["file"])
        crcs = (self.crcs if self.file == name else {}) | crcs
        if "done" in line:
            self.done[name], self.checks[name] = int(line["done"]), crcs
            self.file, self.region, self.offset, self.crcs = None, 0, 0, {}
        else:
            self.file, self.region, self.offset = name, int(line["region"]), int(line["offset"])
            self.crcs = crcs
        self.counts |= counts

    def fits(self, size: Sizes) -> bool:
        begun = [*self.done, *([] if self.file is None else [self.file])]
        right = all(self.sizes.get(name) == told for name, told in self.done.items())
        return right and all(size(name) == self.sizes.get(name, 0) for name in begun)


class Journal:
    """An open journal; `append` returns when the lines are on disk (if `durable`)."""

    def __init__(self, fd: int, durable: bool) -> None:
        self.fd, self.durable = fd, durable

    @classmethod
    def create(cls, folder: int, job: str, durable: bool) -> Journal:
        """A new journal in the folder of descriptor `folder`, which must not have one."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        journal = cls(os.open(NAME, flags, 0o600, dir_fd=folder), durable)
        journal.append([{"surgery-journal": FORMAT, "job": job}])
        if durable:
            os.fsync(folder)
        return journal

    @classmethod
    def resume(cls, folder: int, durable: bool, make: Callable[[str], S]) -> tuple[Journal, S] | None:
        """The journal in a folder and what it says, as a state that `make` makes of the job's name.

        None if there is none, or none of ours.
        """
        try:
            fd = os.open(NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return None
        with os.fdopen(os.dup(fd), "rb") as stream:
            state, size = _replay(stream.read(), make)
        if state is None:
            os.close(fd)
            return None
        os.ftruncate(fd, size)
        os.lseek(fd, size, os.SEEK_SET)
        return cls(fd, durable), state

    def append(self, lines: list[Line]) -> None:
        data = b"".join(map(_encode, lines))
        while data:
            data = data[os.write(self.fd, data) :]
        if self.durable:
            os.fdatasync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def _encode(line: Line) -> bytes:
    text = json.dumps(line, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _replay(data: bytes, make: Callable[[str], S]) -> tuple[S | None, int]:
    """What the whole lines at the front of a journal say, and how many bytes they are."""
    state: S | None = None
    size = 0
    for raw in data.splitlines(keepends=True):
        try:
            check, text = raw.removesuffix(b"\n").split(b" ", 1)
            if not raw.endswith(b"\n") or check != b"%08x" % zlib.crc32(text):
                break
            line = json.loads(text)
            if state is not None:
                state.apply(line)
            else:  # of another version it is nobody's job, so what it tells of is discarded
                state = make(str(line["job"]) if line["surgery-journal"] == FORMAT else "")
        except (AttributeError, KeyError, TypeError, ValueError):
            break
        size += len(raw)
    return state, size
