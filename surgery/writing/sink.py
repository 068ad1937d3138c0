"""Takes the steps of a job in order: bytes go to files at once, durability and journal to a thread behind.

    with Sink(stage, journal, state, ledger, progress, every=256 << 20, kept={}) as sink:
        for step in steps:
            sink.take(step)          # Begin, Block, Block, ..., None, Begin, ...

The order that makes the journal true: write the data, sync the data, write the line, sync the line.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.containers.output import OutputFile, Region
from surgery.errors import ADVICE, SHORT, OutputError, shortage
from surgery.tensors.files import kept_open
from surgery.tensors.fingerprint import Counts, Ledger
from surgery.writing.journal import Journal, Line, State
from surgery.writing.leaving import Leave, may_leave
from surgery.writing.staging import Staging, data_of, hidden_of

FULL = {errno.ENOSPC, errno.EDQUOT}
BACKLOG = 64  # files that may wait for their fsync
BEHIND = 2  # blocks that may wait for their CRC
NOTHING = "nothing was written"
RESUME = "what was written is kept: run the same command again to go on from there"


@dataclass(frozen=True, eq=False)
class Begin:
    """The next file; `region` and `start` say where to go on in it (0, 0: at the front)."""

    file: OutputFile
    region: int
    start: int


@dataclass(frozen=True, eq=False)
class Block:
    """Bytes of region number `index`, `start` bytes behind its beginning, and what a ledger counts for them."""

    index: int
    region: Region
    start: int
    data: memoryview
    counts: Counts


Step = Begin | Block | None  # None: the file is complete


class Sink:
    """Writes to the files of a stage.

    every    bytes between two checkpoints inside a file
    leave    what takes each file of weights when it is complete, if the disk is too small for all
    kept     file -> regions whose CRC-32 is to be known in the end, in `checks`, besides all those of archives
    """

    def __init__(
        self,
        stage: Staging,
        journal: Journal,
        state: State,
        ledger: Ledger | None,
        progress: Callable[[int], None] | None,
        every: int,
        kept: Mapping[str, Collection[int]],
    ) -> None:
        self.stage, self.journal, self.state, self.every, self.kept = stage, journal, state, every, kept
        self.ledger = Ledger() if ledger is None else ledger
        self.ledger.counts = dict(state.counts)
        self.progress = progress or (lambda n: None)
        self.file: OutputFile | None = None
        self.leave: Leave | None = None
        self.fd, self.at, self.since, self.reported = -1, (0, 0), 0, 0
        self.crcs: dict[int, int] = {}
        self.checks = dict(state.checks)
        self.new_crcs: set[int] = set()
        self.new_counts: set[str] = set()
        self.hashing: deque[Future[None]] = deque()

    def __enter__(self) -> Sink:
        try:
            self.syncer = Syncer(self.journal, self.stage.durable)
        except BaseException:
            self.journal.close()
            raise
        self.hasher = ThreadPoolExecutor(1, thread_name_prefix="surgery-crc")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait until all is durable; after an error keep what can be kept, and let the error speak."""
        try:
            if kind is not None and self.file is not None:
                with suppress(OSError):
                    self.checkpoint()
            with suppress(OSError) if kind is not None else nullcontext():
                self.syncer.finish()
        finally:
            self.hasher.shutdown()
            if self.fd >= 0:
                os.close(self.fd)
            self.journal.close()

    def resumed(self, files: Sequence[OutputFile]) -> int:
        """Bytes that an earlier run wrote and this one need not."""
        total = 0
        for file in files:
            if file.name in self.state.done:
                total += file.size
            elif file.name == self.state.file:
                total += file.regions[self.state.region].offset + self.state.offset
        return total

    def take(self, step: Step) -> None:
        """Do one step.  Raises OSError; nothing of the step then counts as done."""
        if isinstance(step, Block):
            self._write(step)
        elif isinstance(step, Begin):
            self._begin(step)
        else:
            self._finish()

    def _begin(self, step: Begin) -> None:
        file = step.file
        if file.name == self.state.file:
            self.fd, self.crcs = self.stage.reopen(file.name), dict(self.state.crcs)
            self.reported = file.regions[step.region].offset + step.start
            if os.fstat(self.fd).st_size != file.size:
                raise OutputError("does not fit its journal", file=self.stage.hidden, hint="remove it and start again")
        else:
            self.fd, self.crcs, self.reported = self.stage.create(file.name, file.size), {}, 0
            pwrite_all(self.fd, file.head, 0)
        self.file, self.at, self.since = file, (step.region, step.start), 0

    def _write(self, block: Block) -> None:
        assert self.file is not None
        offset = block.region.offset + block.start
        pwrite_all(self.fd, block.data, offset)
        if self.file.tail is not None or block.index in self.kept[self.file.name]:
            self._hashed(BEHIND)
            self.hashing.append(self.hasher.submit(self._hash, block))  # only what is written counts
        self.ledger.add(block.counts)
        self.new_counts.update(block.counts)  # not |=, which copies the set
        self.at = (block.index, block.start + len(block.data))
        self._report(offset + len(block.data))
        self.since += len(block.data)
        if self.since >= self.every and self.syncer.idle():
            self.checkpoint()

    def _hash(self, block: Block) -> None:
        self.crcs[block.index] = zlib.crc32(block.data, self.crcs.get(block.index, 0))
        self.new_crcs.add(block.index)

    def _hashed(self, behind: int = 0) -> None:
        """Wait until no more than so many blocks are still to be hashed."""
        while len(self.hashing) > behind:
            self.hashing.popleft().result()

    def _finish(self) -> None:
        assert self.file is not None
        self._hashed()
        if self.file.tail is not None:
            crcs = [self.crcs.get(i, 0) for i in range(len(self.file.regions))]
            for offset, data in self.file.tail(crcs):
                pwrite_all(self.fd, data, offset)
        self.checks[self.file.name] = self.crcs
        fd, self.fd = self.fd, -1
        self.syncer.put(fd, self._line(done=self.file.size), close=True)
        self._report(self.file.size)
        name, self.file = self.file.name, None
        if self.leave and may_leave(name):
            self.leave(name, data_of(self.stage.dst) / name)

    def checkpoint(self) -> None:
        """Have the journal say how far the current file is, as soon as that is true on disk."""
        self._hashed()
        self.syncer.put(self.fd, self._line(region=self.at[0], offset=self.at[1]), close=False)
        self.since = 0

    def write_small(self, file: OutputFile) -> None:
        """A file outside of the journal, at once."""
        assert not file.regions and file.tail is None, file.name
        fd = self.stage.create(file.name, file.size)
        try:
            pwrite_all(fd, file.head, 0)
            if self.stage.durable:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _report(self, position: int) -> None:
        self.progress(position - self.reported)
        self.reported = position

    def _line(self, **what: int) -> Line:
        """A line of the journal: where we are, and what has changed since the line before."""
        assert self.file is not None
        crcs = [[i, self.crcs[i]] for i in sorted(self.new_crcs)]
        counts = {name: list(self.ledger.counts[name]) for name in sorted(self.new_counts)}
        self.new_crcs, self.new_counts = set(), set()
        return {"file": self.file.name, **what, "crcs": crcs, "counts": counts}


class Syncer:
    """Makes files durable, then writes their lines, in a thread of its own and in the order given."""

    def __init__(self, journal: Journal, durable: bool) -> None:
        self.journal, self.durable = journal, durable
        self.todo: queue.Queue[tuple[int, Line, bool] | None] = queue.Queue(min(BACKLOG, kept_open()))
        self.busy = False
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._run, name="surgery-sync", daemon=True)
        self.thread.start()

    def put(self, fd: int, line: Line, close: bool) -> None:
        """`line` is true once what has been written to `fd` is on disk.  Raises what an earlier one met."""
        self.todo.put((fd, line, close))
        if self.error:
            raise self.error

    def idle(self) -> bool:
        return not self.busy and self.todo.empty()

    def finish(self) -> None:
        """Wait for all lines.  Raises OSError if one could not be made true."""
        self.todo.put(None)
        self.thread.join()
        if self.error:
            raise self.error

    def _run(self) -> None:
        going = True
        while going:
            batch: list[Any] = [self.todo.get()]
            self.busy = True
            while not self.todo.empty():
                batch.append(self.todo.get())
            going = None not in batch
            self._settle([entry for entry in batch if entry is not None])
            self.busy = False

    def _settle(self, batch: list[tuple[int, Line, bool]]) -> None:
        for fd, _, close in batch:
            try:
                if self.durable and not self.error:
                    os.fdatasync(fd)
            except OSError as error:
                self.error = error
            if close:
                os.close(fd)
        try:
            if batch and not self.error:
                self.journal.append([line for _, line, _ in batch])
        except OSError as error:
            self.error = error


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the bytes, however few the system takes at once.  Raises OSError."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


@contextmanager
def os_errors(dst: Path, missing: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn what the system says while writing `dst` into OutputErrors; `missing` tells how much room is lacking."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            what = "the disk is full" + (f": {missing()} more bytes are needed" if missing else "")
            raise OutputError(what, file=dst, hint=_hint(dst, "make room")) from None
        what = f"cannot be written: {error.strerror or type(error).__name__}"
        raise OutputError(what, file=dst, hint=_hint(dst, ADVICE.get(error.errno or 0, NOTHING))) from None
    except (MemoryError, RuntimeError) as error:
        if (lacking := shortage(error)) is None:
            raise
        raise OutputError(lacking, file=dst, hint=_hint(dst, SHORT)) from error


def _hint(dst: Path, otherwise: str) -> str:
    """What to do; and that a run can be resumed, if it has written anything."""
    if not os.path.lexists(hidden_of(dst)):
        return otherwise
    return RESUME if otherwise == NOTHING else f"{otherwise}; {RESUME}"


def boot_id() -> str:
    """Tells this boot of the machine from the next."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
