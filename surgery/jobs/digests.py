"""Digests of files and folders, by content: what tells whether something has changed.

    digests = Digests(Path("runs/demo/steps/digests.json"))
    digests.tree(Path("models/llama")).digest           # hashes every byte once, and never again while nothing changes

Times never count.  They say which files need not be read again: a file whose size, times and inode are those of the
last reading has the digest of the last reading, as in git.  Files larger than `LARGE` are left to their names and
sizes where something else speaks for their content: in an output, the key of the step that made it; in a folder by
surgery, the digest of all weights in its surgery.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import FileError
from surgery.storage.address import Address, is_address, parse
from surgery.storage.listing import listing
from surgery.storage.remote import fingerprint
from surgery.storage.store import Entry
from surgery.writing.atomic import atomic_file

LARGE = 16 << 20  # bytes
FRESH = 2.0  # seconds after a change in which a clock may not tell the next one
THREADS = 4
CHUNK = 1 << 20
SPEAKS = "surgery.json"  # beside an output of surgery: the digest of its weights


@dataclass(frozen=True)
class Tree:
    """A file, or all files of a folder.  `exact`: every byte counts in the digest, not only names and sizes."""

    digest: str
    bytes: int
    exact: bool


@dataclass(frozen=True)
class _Entry:
    name: str
    path: str
    info: os.stat_result


class Digests:
    """Digests of files, remembered in a file of JSON, which may be removed at any time; addresses are listed once."""

    def __init__(self, memory: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.memory, self.say = memory, say
        self.known = _remembered(memory)
        self.new: dict[str, list[Any]] = {}
        self.listed: dict[Address, Mapping[str, Entry]] = {}
        self.lock = threading.Lock()

    def tree(self, path: Path, large: bool = True, entry: Entry | None = None) -> Tree:
        """Of a file or folder.  `large`: large files count by content as well.  Raises FileError if there is none.

        Of an address: by the names, sizes and ETags of what lies there; `entry`: of a file, what is known of it.
        """
        if is_address(path):
            there = self._listed(path, entry)
            return Tree(fingerprint(there), sum(entry.size for entry in there.values()), True)
        entries = sorted(_entries(path), key=lambda entry: entry.name)
        if any(entry.name == SPEAKS for entry in entries):
            large = False
        read = [e for e in entries if large or e.info.st_size <= LARGE]
        found = dict(zip([e.name for e in read], self._files(read), strict=True))
        lines = [[e.name, e.info.st_size, found.get(e.name, "")] for e in entries]
        digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
        return Tree(digest, sum(e.info.st_size for e in entries), len(read) == len(entries))

    def sizes(self, path: Path, entry: Entry | None = None) -> Tree:
        """By names and sizes alone."""
        if is_address(path):
            sizes = sorted((name, entry.size) for name, entry in self._listed(path, entry).items())
        else:
            sizes = sorted((e.name, e.info.st_size) for e in _entries(path))
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
        return Tree(digest, sum(size for _, size in sizes), False)

    def _listed(self, path: Path, entry: Entry | None) -> Mapping[str, Entry]:
        """What lies at an address, which is listed once."""
        address = parse(path)
        if entry is not None:
            return {address.name: entry}
        with self.lock:
            if address not in self.listed:
                self.listed[address] = listing(address).entries
            return self.listed[address]

    def save(self) -> None:
        """Remember what was read."""
        if self.new:
            self.known = {**_remembered(self.memory), **self.new}
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.memory) as file:
                file.write(json.dumps(self.known, separators=(",", ":")).encode())
            self.new = {}

    def _files(self, entries: Sequence[_Entry]) -> list[str]:
        unread = [e for e in entries if not self._remembers(e)]
        size = sum(e.info.st_size for e in unread)
        if size > 64 * LARGE:
            self.say(f"reading {size / 1e9:.1f} GB of {unread[0].path} and its kind, once, for their digests")
        if len(unread) < 2 or size < LARGE:
            return [self._file(e) for e in entries]
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self._file, entries))

    def _remembers(self, entry: _Entry) -> bool:
        return self.known.get(entry.path, [])[:-1] == _stamp(entry.info)

    def _file(self, entry: _Entry) -> str:
        if self._remembers(entry):
            return str(self.known[entry.path][-1])
        digest = _read(entry.path)
        if time.time() - max(entry.info.st_mtime, entry.info.st_ctime) > FRESH:
            self.new[entry.path] = self.known[entry.path] = [*_stamp(entry.info), digest]
        return digest


def _remembered(memory: Path) -> dict[str, list[Any]]:
    with suppress(OSError, ValueError):
        found = json.loads(memory.read_bytes())
        if isinstance(found, dict):
            return {k: v for k, v in found.items() if isinstance(v, list) and len(v) == 5}
    return {}


def _stamp(info: os.stat_result) -> list[int]:
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _read(path: str) -> str:
    found = hashlib.sha256()
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            found.update(memoryview(buffer)[:n])
    return found.hexdigest()


def _entries(path: Path) -> Iterator[_Entry]:
    """All files of a folder, or the file itself, whose name is then "".  Links count as what they lead to."""
    try:
        info = os.stat(path)
        if stat.S_ISREG(info.st_mode):
            yield _Entry("", str(path), info)
        elif stat.S_ISDIR(info.st_mode):
            yield from _below(str(path), "", frozenset({(info.st_dev, info.st_ino)}))
        else:
            raise FileError("is neither a file nor a folder", file=path)
    except OSError as error:
        name = error.filename or path
        raise FileError(
            "does not exist" if isinstance(error, FileNotFoundError) else str(error.strerror), file=name
        ) from None


def _below(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[_Entry]:
    with os.scandir(folder) as found:
        for entry in found:
            info = entry.stat()
            if stat.S_ISREG(info.st_mode):
                yield _Entry(prefix + entry.name, entry.path, info)
            elif stat.S_ISDIR(info.st_mode):
                place = (info.st_dev, info.st_ino)
                if place in above:
                    raise FileError("is a link to a folder that it lies in", file=entry.path)
                yield from _below(entry.path, f"{prefix}{entry.name}/", above | {place})
