"""One output written by several processes: each writes its share of the files, and one puts the shares together.

    Shard.parse("0/4").share(files)             # every process finds the same shares: by size, the largest file first
    adopt(stage, journal, state, jobs, files)   # renames the files of complete shares, and says so in the journal

A share grows in a staging folder of its own beside the output, with its own lock and journal, so a process that is
killed goes on as any run does.  A file never depends on who writes it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from surgery.containers.output import OutputFile
from surgery.errors import OutputError, UsageError
from surgery.tensors.fingerprint import MASK, Count, Counts
from surgery.writing.journal import Journal, Line, State
from surgery.writing.locking import DIRECTORY, locked
from surgery.writing.staging import Staging, hidden_of

MOST = 4096


@dataclass(frozen=True)
class Shard:
    """Share number `index`, from 0, of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """ "0/4": the first of four.  Raises UsageError."""
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if not found or not int(found[1]) < int(found[2]) <= MOST:
            raise UsageError(f"--shard {text}: write I/N, I from 0 to N - 1, N at most {MOST}", hint="--shard 0/4")
        return cls(int(found[1]), int(found[2]))

    def share(self, files: Sequence[OutputFile]) -> list[OutputFile]:
        """Its files, in their order: each file, the largest first, goes to the share with the fewest bytes."""
        loads, mine = [0] * self.count, set[str]()
        for file in sorted(files, key=lambda f: (-f.size, f.name)):
            least = loads.index(min(loads))
            loads[least] += max(1, file.size)
            if least == self.index:
                mine.add(file.name)
        return [file for file in files if file.name in mine]

    def place(self, dst: Path) -> Path:
        """What its staging takes for its destination, which never appears."""
        return shards_of(dst) / f"{self.index}-of-{self.count}"


def shards_of(dst: Path) -> Path:
    """The folder of all shares of an output."""
    return dst.with_name(f".{dst.name}.surgery-shards")


def discard_shards(dst: Path) -> None:
    """Remove all shares, when the output is there."""
    shutil.rmtree(shards_of(dst), ignore_errors=True)


@dataclass
class Share(State):
    """What a share's journal says, and for each finished file what it counted: its part of the ledger."""

    of: dict[str, Counts] = field(default_factory=dict)
    pending: Counts = field(default_factory=dict)

    def apply(self, line: Line) -> None:
        before = dict(self.counts)
        super().apply(line)
        for name, now in self.counts.items():
            if now != before.get(name):
                self.pending[name] = _minus(_plus(self.pending.get(name), now), before.get(name))
        if "done" in line:
            self.of[str(line["file"])], self.pending = self.pending, {}


def _plus(a: Count | None, b: Count, sign: int = 1) -> Count:
    if a is None:
        return b
    f, n, odd, zeros = b
    return ((a[0] + sign * f) & MASK, a[1] + sign * n, a[2] + sign * odd, a[3] + sign * zeros)


def _minus(a: Count, b: Count | None) -> Count:
    return _plus(a, b, -1) if b else a


def is_complete(dst: Path, shard: Shard, files: Sequence[OutputFile]) -> bool:
    """Whether a share has been written and nobody is at it."""
    mine = shard.share(files)
    opened = _open(dst, shard, mine)
    if opened is None:
        return False
    folder, lock, share = opened
    os.close(lock)
    os.close(folder)
    return all(file.name in share.done for file in mine)


def adopt(
    stage: Staging, journal: Journal, state: State, jobs: Mapping[Shard, str], files: Sequence[OutputFile]
) -> None:
    """Take the finished files of all shares that are of these jobs into the stage.

    Raises OutputError if a share is being written.
    """
    for shard, job in jobs.items():
        mine = [file for file in shard.share(files) if file.name not in state.done]
        opened = _open(stage.dst, shard, mine)
        if opened is None:
            continue
        folder, lock, share = opened
        try:
            if share.job == job:
                _take(stage, journal, state, share, folder, mine)
        finally:
            os.close(lock)
            os.close(folder)


def _take(
    stage: Staging, journal: Journal, state: State, share: Share, folder: int, mine: Sequence[OutputFile]
) -> None:
    """A file is renamed and then told of: killed between the two, it is written anew."""
    with suppress(FileNotFoundError):
        data = os.open("data", DIRECTORY, dir_fd=folder)
        try:
            for file in mine:
                if file.name in share.done and _moved(stage, data, file):
                    counts = {n: _plus(state.counts.get(n), c) for n, c in share.of.get(file.name, {}).items()}
                    crcs = [[i, crc] for i, crc in sorted(share.checks[file.name].items())]
                    told = {n: list(c) for n, c in counts.items()}
                    line: Line = {"file": file.name, "done": file.size, "crcs": crcs, "counts": told}
                    journal.append([line])
                    state.apply(line)
        finally:
            os.close(data)


def _moved(stage: Staging, data: int, file: OutputFile) -> bool:
    """Rename a file of a share into the stage; whether it was there, and of the size that it should have."""
    with suppress(FileNotFoundError):
        info = os.stat(file.name, dir_fd=data, follow_symlinks=False)
        if info.st_size == file.size and info.st_nlink == 1:
            os.close(stage.create(file.name, 0))  # makes its folder
            os.rename(file.name, file.name, src_dir_fd=data, dst_dir_fd=stage.data)
            return True
    return False


def _open(dst: Path, shard: Shard, mine: Sequence[OutputFile]) -> tuple[int, int, Share] | None:
    """The folder of a share, its lock, held, and what its journal says; None if there is none."""
    hidden = hidden_of(shard.place(dst))
    if not mine or not hidden.is_dir():
        return None
    folder, lock = locked(hidden)
    found = Journal.resume(folder, False, partial(Share, sizes={f.name: f.size for f in mine}))
    if found is None:
        os.close(lock)
        os.close(folder)
        return None
    found[0].close()
    return folder, lock, found[1]


def others(dst: Path, shard: Shard, files: Sequence[OutputFile]) -> list[Shard]:
    """The shares of the same output, but for this one, that are not complete, or are being written."""
    missing = []
    for other in (Shard(i, shard.count) for i in range(shard.count)):
        try:
            complete = not other.share(files) or is_complete(dst, other, files)
        except OutputError:
            complete = False
        if other != shard and not complete:
            missing.append(other)
    return missing
