"""What was written, read from the disk again and compared with the plan: all that a reader of weights does not look at.

    kept = unproven(files, ledger)             # file -> its regions whose CRC-32 is to be kept while they are written
    with proven(stage, files, kept, crcs):     # Spoilt, if a file is not, byte for byte, what was planned
        ...

Who opens the output as a model digests every part, and so proves the bytes of the weights.  That leaves configs,
tokenizers, headers, indices, the structure of archives, gaps, padding rows, replicas, and what was changed on its way
into the file.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from surgery.containers.output import OutputFile, Region
from surgery.errors import MismatchError, SurgeryError, some
from surgery.tensors import elsewhere
from surgery.tensors.axes import Rearrange
from surgery.tensors.files import File
from surgery.tensors.fingerprint import SOURCE, Ledger, Tap
from surgery.tensors.gather import Gather
from surgery.tensors.lazy import Concat, Lazy, Slice
from surgery.writing.staging import Staging, data_of

CHUNK = 1 << 20
FAULTY = "the disk or the memory is faulty; the output was not published, and the next run writes it anew"
MOVES = (Slice, Concat, Rearrange, Gather)  # these put elements elsewhere and change none
Crcs = Mapping[int, int]  # region -> CRC-32 of its bytes


class Spoilt(MismatchError):
    """What was read back is not what was written; the unfinished output is discarded."""


def unproven(files: Sequence[OutputFile], ledger: Ledger | None) -> dict[str, frozenset[int]]:
    """For every file, its regions that digesting the parts does not prove; without a ledger, all of them."""
    replicas = (region.tensor for file in files for region in file.regions if region.copy)
    copied = {name for tensor in replicas for name in _parts(tensor) or ()}

    def blind(region: Region) -> bool:
        if ledger is None or region.copy:
            return True
        parts = _parts(region.tensor)
        return parts is None or not parts.isdisjoint(copied)

    return {f.name: frozenset(i for i, region in enumerate(f.regions) if blind(region)) for f in files}


def _parts(tensor: Lazy) -> set[str] | None:
    """The parts that a tensor consists of; None if it holds anything else, or something that was computed from them."""
    names, todo = set[str](), [tensor]
    while todo:
        node = todo.pop()
        if isinstance(node, Tap) and not node.name.startswith(SOURCE):
            names.add(node.name)
        elif isinstance(node, MOVES):
            todo.extend(node.sources())
        else:
            return None
    return names


@contextmanager
def proven(
    stage: Staging, files: Sequence[OutputFile], kept: Mapping[str, Collection[int]], crcs: Mapping[str, Crcs]
) -> Iterator[None]:
    """Read `files` when the block has ended, well or by an error of ours, and discard the output if they are spoilt.

    `crcs` are of what was written, by file and region.  Raises Spoilt.
    """

    def compare() -> None:
        if bad := [f.name for f in files if not _intact(stage, f, kept.get(f.name, ()), crcs.get(f.name, {}))]:
            what = f"{len(bad)} files read back differently from what was written: {some(bad)}"
            raise Spoilt(what, file=stage.dst, hint=FAULTY)

    try:
        try:
            yield
        except SurgeryError as error:
            if not isinstance(error, Spoilt):
                compare()
            raise
        compare()
    except Spoilt:
        stage.discard()
        raise


def _intact(stage: Staging, file: OutputFile, kept: Collection[int], crcs: Crcs) -> bool:
    path = os.fspath(data_of(stage.dst) / file.name)
    if elsewhere.at(path) is not None:
        left = File(path)
        return left.size == file.size and all(_same(left.read, *span) for span in _spans(file, kept, crcs))
    try:
        fd = stage.reopen(file.name)
    except FileNotFoundError:
        return False
    try:
        return os.fstat(fd).st_size == file.size and all(
            _same(lambda at, size: os.pread(fd, size, at), *span) for span in _spans(file, kept, crcs)
        )
    finally:
        os.close(fd)


def _spans(file: OutputFile, kept: Collection[int], crcs: Crcs) -> Iterator[tuple[int, int, bytes | int | None]]:
    """Start, stop and what is there: bytes, a CRC-32, or None for zeros."""
    literals = [(0, file.head)]
    if file.tail is not None:
        literals += file.tail([crcs.get(i, 0) for i in range(len(file.regions))])
    known: list[tuple[int, int, bytes | int | None]] = [(at, at + len(data), data) for at, data in literals]
    for i, region in enumerate(file.regions):
        known.append((region.offset, region.stop, crcs.get(i, 0) if i in kept else -1))
    at = 0
    for start, stop, what in sorted(known, key=lambda span: span[:2]):
        yield at, start, None
        if what != -1:  # proven by the digests
            yield start, stop, what
        at = max(at, stop)
    yield at, file.size, None


def _same(read: Callable[[int, int], bytes], start: int, stop: int, what: bytes | int | None) -> bool:
    crc = 0
    for at in range(start, stop, CHUNK):
        size = min(CHUNK, stop - at)
        data = read(at, size)
        if len(data) != size:
            return False
        if isinstance(what, int):
            crc = zlib.crc32(data, crc)
        elif data != (bytes(size) if what is None else what[at - start : at - start + size]):
            return False
    return not isinstance(what, int) or crc == what
