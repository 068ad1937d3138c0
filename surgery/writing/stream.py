"""The only loop over tensors: blocks within a memory budget, read once, written once, resumable, whole or not at all.

    files = [safetensors_file("model.safetensors", tensors), text_file("config.json", config)]
    done = write(files, Path("out"), max_memory=256 << 20, job={"source": digest, "options": options})
    print(done.bytes, done.seconds, done.peak)

A few threads make the next blocks, this one writes them in their order, another makes what was written durable and
then says so in the journal; a run that was killed at any point goes on from there, and ends in the same bits.  Memory:
a block is a small part of the budget, for several are in flight, rearranging one takes several times its size, and the
allocator keeps a good many for the next.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from surgery.containers.output import OutputFile, Region
from surgery.errors import FileError, LayoutError, OutputError, some
from surgery.tensors.elsewhere import limited
from surgery.tensors.extent import Extent
from surgery.tensors.files import AGAIN, IO, check_unchanged, usable_path
from surgery.tensors.fingerprint import Counts, Ledger
from surgery.tensors.lazy import ITEMSIZE, Box, Lazy, Map, Shape, boxes, bytes_of, inside, lengths, walk, whole
from surgery.tensors.memory import Peak, keep_blocks
from surgery.tensors.stamp import Stamp
from surgery.units import human
from surgery.writing.ahead import ahead
from surgery.writing.interrupt import Interrupted, signals
from surgery.writing.journal import State
from surgery.writing.leaving import Leave, leave_of, may_leave
from surgery.writing.readback import proven, unproven
from surgery.writing.shards import Shard, adopt, discard_shards
from surgery.writing.sink import Begin, Block, Sink, Step, boot_id, os_errors
from surgery.writing.staging import Staging

MAX_BLOCK = 2 << 20  # bytes; larger ones are mapped anew each time, and their page faults cost more than the copying
MIN_BLOCK = 1 << 12
PARTS = 64  # of the budget: one part is a block
CHECKPOINT = 64  # blocks between two lines of the journal
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Written:
    """What a run did: sizes in bytes, wall time in seconds.

    bytes     of all output files;  resumed_bytes  of them, which an earlier run had written
    read_bytes  from files, by this process;  peak  memory above what was occupied at the start
    """

    dst: Path
    bytes: int
    resumed_bytes: int
    read_bytes: int
    seconds: float
    peak: int
    notes: tuple[str, ...] = ()


def write(
    files: Sequence[OutputFile],
    dst: Path,
    *,
    max_memory: int,
    job: Mapping[str, Any],
    ledger: Ledger | None = None,
    progress: Progress | None = None,
    force: bool = False,
    durable: bool = True,
    threads: int | None = None,
    closing: Callable[[Written], Sequence[OutputFile]] | None = None,
    compare: bool = True,
    shards: int = 0,
) -> Written:
    """Write `files` as the folder `dst`, which appears when all of it is on disk.

    job       what makes this run the same as an earlier one: a killed run is resumed by an equal job on equal files,
              else its unfinished output is discarded (`Written.notes` says so)
    ledger    counts the tapped parts below the regions; every element of every part must be written once
    progress  is called with the number of bytes done since it was called last
    durable   False: no fsync.  Survives kills, not a power cut; the run after one starts afresh
    threads   that make blocks, besides this one, which writes them (None: one per core, at most 4)
    closing   small files that depend on the outcome, such as digests; asked for when all else is written
    compare   read back whatever the ledger's parts do not prove, and compare it byte for byte
    shards    take what this many calls of `write_shard` have written; what they have not is written here

    Raises OutputError if `dst` exists and may not be replaced, is full or cannot be written; Interrupted on signals;
    LayoutError if the ledger has gaps; Spoilt if other bytes are read back than were written; FileError if a source has
    changed.  All keep what was written for the next run, except Spoilt; nothing is begun where `dst` must not be.
    """
    dst = usable_path(dst)
    keep_blocks(max_memory)
    _check_names(files)
    sources = _sources(files)
    if force:
        _check_sources(sources, dst)
    tally = _Tally(dst, sum(f.size for f in files), progress)
    with limited(max_memory) as left, os_errors(dst, tally.missing), Staging.open(dst, force, durable) as stage:
        kept = unproven(files, ledger)
        identity = _identity(files, job, ledger, durable, sources)
        journal, state, tally.notes = stage.begin(identity, partial(State, sizes={f.name: f.size for f in files}))
        if shards:
            jobs = _shard_jobs(files, job, ledger, durable, shards)
            adopt(stage, journal, state, {Shard(i, shards): jobs[i] for i in range(shards)}, files)
        sink = Sink(stage, journal, state, ledger, tally.count, CHECKPOINT * block_size(left), kept)
        _fill(files, sink, tally, ledger, block_size(left), threads)
        _check_complete(ledger, dst)
        check_unchanged(sources)
        everything = list(files)
        with proven(stage, everything, kept, sink.checks) if compare else nullcontext():
            everything += closing(tally.written(files)) if closing else []
            _check_names(everything)
            for file in everything[len(files) :]:
                sink.write_small(file)
        check_unchanged(sources)
        stage.publish({f.name for f in everything})
        if shards:
            discard_shards(dst)
        return tally.written(everything)


def write_shard(
    files: Sequence[OutputFile],
    dst: Path,
    shard: Shard,
    *,
    max_memory: int,
    job: Mapping[str, Any],
    ledger: Ledger | None = None,
    progress: Progress | None = None,
    durable: bool = True,
    threads: int | None = None,
) -> Written:
    """Write those of `files` that are one process's share, beside `dst`; `write(..., shards=N)` puts shares together.

    The arguments are those of `write`, and so are the errors.  A share that is complete is left alone.
    """
    dst = usable_path(dst)
    keep_blocks(max_memory)
    _check_names(files)
    mine = shard.share(files)
    sources, place = _sources(mine), shard.place(dst)
    tally = _Tally(place, sum(f.size for f in mine), progress)
    with limited(max_memory) as left, os_errors(place, tally.missing), Staging.open(place, False, durable) as stage:
        block = block_size(left)
        identity = _shard_jobs(files, job, ledger, durable, shard.count)[shard.index]
        sizes = {f.name: f.size for f in mine}
        journal, state, tally.notes = stage.begin(identity, partial(State, sizes=sizes))
        sink = Sink(stage, journal, state, ledger, tally.count, CHECKPOINT * block, unproven(files, ledger))
        _fill(mine, sink, tally, ledger, block, threads)
        check_unchanged(sources)
    return tally.written(mine)


def _shard_jobs(
    files: Sequence[OutputFile], job: Mapping[str, Any], ledger: Ledger | None, durable: bool, count: int
) -> list[str]:
    """What tells each share of this output from any other."""
    shares = ((i, Shard(i, count).share(files)) for i in range(count))
    return [_identity(mine, {**job, "shard": [i, count]}, ledger, durable, _sources(mine)) for i, mine in shares]


def _fill(
    files: Sequence[OutputFile], sink: Sink, tally: _Tally, ledger: Ledger | None, block: int, threads: int | None
) -> None:
    """Write what is not written yet."""
    with sink:
        tally.resumed = sink.resumed(files)
        sink.leave = _check_space(tally, files)
        tally.count(tally.resumed)
        _take(_steps(files, sink.state, ledger, block), threads, sink, tally.dst)


class _Tally:
    """What is done of `total` bytes, and what it has cost so far."""

    def __init__(self, dst: Path, total: int, progress: Progress | None) -> None:
        self.dst, self.total, self.progress = dst, total, progress
        self.begun, self.read, self.peak = time.monotonic(), IO["bytes"], Peak()
        self.done = self.resumed = 0
        self.notes: list[str] = []

    def count(self, n: int) -> None:
        self.done += n
        if self.progress:
            self.progress(n)

    def missing(self) -> int:
        """Bytes that the disk has too little."""
        return max(1, self.total - self.done - free_space(self.dst))

    def written(self, files: Sequence[OutputFile]) -> Written:
        read, seconds = IO["bytes"] - self.read, time.monotonic() - self.begun
        size = sum(f.size for f in files)
        return Written(self.dst, size, self.resumed, read, seconds, self.peak.bytes(), tuple(self.notes))


def _take(makers: Iterable[Callable[[], Step]], threads: int | None, sink: Sink, dst: Path) -> None:
    """Do all steps, or up to a signal."""
    with signals() as stop, ahead(makers, threads) as steps:
        for step in steps:
            sink.take(step)
            if stop:
                raise Interrupted(stop[0], dst)


def read_through(parts: Mapping[str, Lazy], ledger: Ledger, max_memory: int, progress: Progress | None = None) -> None:
    """Read every part once, in the given order, and count it in `ledger`: what verification compares."""
    for name, part in parts.items():
        ledger.tap(name, part)

    def look(name: str, part: Lazy, box: Box) -> tuple[int, Counts]:
        with ledger.collect() as seen:
            data = part.read(box)
            ledger.count(name, data, box)
        return data.nbytes, seen

    blocks = (
        partial(look, name, part, box)
        for name, part in parts.items()
        for box in boxes(part.shape, ITEMSIZE[part.dtype], block_limit(part, block_size(max_memory)))
    )
    with ahead(blocks) as looked:
        for size, seen in looked:
            ledger.add(seen)
            if progress:
                progress(size)


def block_size(max_memory: int) -> int:
    """Bytes per block within a budget."""
    return max(MIN_BLOCK, min(MAX_BLOCK, max_memory // PARTS))


def _steps(
    files: Sequence[OutputFile], state: State, ledger: Ledger | None, block: int
) -> Iterator[Callable[[], Step]]:
    """What makes each step from `state` on, in the order of the files and of the bytes in them."""
    for file in files:
        if file.name in state.done:
            continue
        first, start = (state.region, state.offset) if state.file == file.name else (0, 0)
        yield partial(Begin, file, first, start)
        for index in range(first, len(file.regions)):
            yield from _blocks(file.regions[index], index, start if index == first else 0, ledger, block)
        yield lambda: None


def _blocks(region: Region, index: int, at: int, ledger: Ledger | None, block: int) -> Iterator[Callable[[], Block]]:
    tensor = region.tensor
    item = ITEMSIZE[tensor.dtype]
    for box in boxes_from(tensor.shape, item, block_limit(tensor, block), at // item):
        yield partial(_block, region, index, at, ledger, box)
        at += math.prod(lengths(box)) * item


def _block(region: Region, index: int, at: int, ledger: Ledger | None, box: Box) -> Block:
    tensor = region.tensor
    counts: Counts = {}
    if ledger is None or region.copy:
        data = tensor.read(box)
    else:
        with ledger.collect() as counts:
            data = tensor.read(box)
    assert list(data.shape) == lengths(box) and data.dtype == tensor.torch_dtype, (region.name, box, data.shape)
    return Block(index, region, at, bytes_of(data.contiguous()), counts)


def block_limit(tensor: Lazy, block: int) -> int:
    """Bytes per block: all of a tensor that is computed as a whole, for it must be read only once."""
    return max(block, tensor.nbytes) if any(isinstance(n, Map) and n.whole for n in walk(tensor)) else block


def boxes_from(shape: Shape, itemsize: int, limit: int, start: int) -> Iterator[Box]:
    """As `lazy.boxes`, but only what lies behind the first `start` elements (row-major)."""
    for rest in _rests(shape, start):
        for box in boxes(tuple(lengths(rest)), itemsize, limit):
            yield inside(box, rest)


def _rests(shape: Shape, start: int) -> Iterator[Box]:
    """Boxes that cover a shape from element `start` on, in row-major order."""
    if start == 0:
        yield whole(shape)
        return
    if not shape or start >= math.prod(shape):
        return
    row, inner = divmod(start, math.prod(shape[1:]))
    if inner:
        for box in _rests(shape[1:], inner):
            yield ((row, row + 1), *box)
        row += 1
    if row < shape[0]:
        yield ((row, shape[0]), *whole(shape[1:]))


def _identity(
    files: Sequence[OutputFile], job: Mapping[str, Any], ledger: Ledger | None, durable: bool,
    sources: Mapping[str, Stamp],
) -> str:  # fmt: skip
    """A digest of all that must be equal for a killed run to be resumed."""
    plan = [
        [f.name, f.size, hashlib.sha256(f.head).hexdigest(), f.tail is None]
        + [[r.name, r.offset, r.tensor.dtype, list(r.tensor.shape), r.copy] for r in f.regions]
        for f in files
    ]
    parts = None if ledger is None else sorted((n, k, list(s)) for n, (k, s) in ledger.parts.items())
    boot = None if durable else boot_id()
    read = sorted((path, stamp[1:]) for path, stamp in sources.items())  # without the device: each machine has its own
    text = json.dumps([dict(job), plan, parts, boot, read], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_complete(ledger: Ledger | None, dst: Path) -> None:
    if ledger is not None and (gaps := ledger.gaps()):
        raise LayoutError(f"not every element of every part was written exactly once: {some(gaps)}", file=dst)


def _check_names(files: Sequence[OutputFile]) -> None:
    names = Counter(f.name for f in files)
    folders = {n[:i] for n in names for i in range(len(n)) if n[i] == "/"}
    if twice := sorted(n for n in names if names[n] > 1 or n in folders):
        raise LayoutError(f"planned twice in one output: {some(twice)}")


def _sources(files: Sequence[OutputFile]) -> dict[str, Stamp]:
    """The files that are read, by path, as they were when they were opened.  Raises FileError."""
    stamps: dict[str, Stamp] = {}
    for file in {n.file for f in files for r in f.regions for n in walk(r.tensor) if isinstance(n, Extent)}:
        if stamps.setdefault(file.path, file.stamp) != file.stamp:
            raise FileError("was changed while it was read", file=file.path, hint=AGAIN)
    return stamps


def _check_sources(sources: Iterable[str], dst: Path) -> None:
    """Raise OutputError if replacing `dst` would remove what is read."""
    real = dst.resolve()
    for path in sorted(sources):
        if real in Path(path).resolve().parents:
            raise OutputError("holds the source, so it cannot be replaced", file=dst, hint="write elsewhere, then move")


def _check_space(tally: _Tally, files: Sequence[OutputFile]) -> Leave | None:
    """What takes files of weights when they are complete, if there is no room for all.  Raises OutputError."""
    need, free, leave = tally.total - tally.resumed, free_space(tally.dst), leave_of(tally.dst)
    if need <= free:
        return None
    staying = sum(file.size for file in files if not may_leave(file.name))
    if leave and staying + max(file.size for file in files) <= free:
        what = f"of {human(need)} the disk had room for {human(free)}"
        tally.notes.append(f"{what}: each file of weights was sent when it was complete")
        return leave
    raise OutputError(
        f"{human(need)} are needed and {human(free)} are free: {human(need - free)} are missing",
        file=tally.dst,
        hint="make room, or choose a destination on another disk",
    )


def free_space(dst: Path) -> int:
    """Bytes that may be written where `dst` is to be."""
    info = os.statvfs(dst.parent)
    return info.f_bavail * info.f_frsize
