"""Files of text, cut into blocks of whole documents of about a megabyte.

    for block in blocks(source, number=0, keys=("text",)):
        block.line, len(block.payload)              # the number of its first line; lines of JSON, a text, or Arrow rows

    check(source, ("text",))                        # None: every byte unpacks; else what is wrong with it

A file is read once from front to end, or from the place where a block begins.  What is packed or has an inner structure
is checked as a whole before anything in it is believed: a damaged gzip file may unpack to wrong letters long before its
checksum says so.
"""

from __future__ import annotations

import gzip
import importlib
import io
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from surgery.data.extra import needs
from surgery.data.tokenizing.sources import Source
from surgery.errors import FileError, show, some

BLOCK = 1 << 20  # bytes of text
LONGEST = 256 << 20  # bytes of a line, or of a file that is one document
ROWS = 4096  # of a block, at most
WINDOW = 31  # 2^31 bytes of memory may a zstd file ask for: some are packed with --long=31


@dataclass(frozen=True, eq=False)
class Block:
    """Documents of one file.

    file      its number        at     where the block begins: a byte of the unpacked file, or a row
    line      number of its first line, row or document, from 1
    stop      where the next one begins
    kind      "jsonl" (whole lines), "lines" (each a document), "text" (one document), "arrow" (an IPC stream)
    read      bytes of the stored file that were read by the end of the block
    """

    file: int
    at: int
    stop: int
    line: int
    kind: str
    payload: bytes
    read: int


class Broken(Exception):
    """A file does not unpack, or is not what its name says: what is wrong."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file that does not unpack, and the number of the line or row where it shows."""

    line: int
    what: str


def blocks(
    source: Source, number: int, keys: Sequence[str], txt: str = "file", at: int = 0, line: int = 1
) -> Iterator[Block]:
    """The blocks from place `at` on, whose first line is number `line`.

    keys: the columns of Parquet that are wanted.  txt: what is a document of a .txt file, "file" or "line".
    Raises FileError if the file cannot be read or lacks a column, Broken if it does not unpack.
    """
    with source.open() as raw:
        if source.format == "parquet":
            yield from _rows(source, raw, number, keys, at)
            return
        stream = _unpacked(source, raw)
        with _told_apart(source):
            if at:
                stream.seek(at)
            if source.format == "txt" and txt == "file":
                yield from _whole(source, stream, raw, number, at)
            else:
                kind = "jsonl" if source.format == "jsonl" else "lines"
                yield from _lines(source, stream, raw, Block(number, at, at, line, kind, b"", 0))


def check(source: Source, keys: Sequence[str]) -> Damage | None:
    """Unpack a whole file: what is wrong with it, if anything.  Files that are not packed are not looked at.

    Raises FileError if it cannot be read.
    """
    line = 1
    try:
        if source.format == "parquet":
            with source.open() as raw:
                for start, batch, _ in _batches(source, raw, keys, 0):
                    line = start + batch.num_rows + 1
        elif source.packing:
            if not source.size:
                return Damage(line, f"broken {source.packing}: not even a header")
            with source.open() as raw, _told_apart(source):
                stream: Any = _unpacked(source, raw)
                while chunk := stream.read1(BLOCK):  # `read` would lose what comes before the damage
                    line += chunk.count(b"\n")
    except Broken as broken:
        return Damage(line, str(broken))
    return None


def _unpacked(source: Source, raw: BinaryIO) -> BinaryIO:
    if source.packing == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if source.packing == "zstd":
        library = zstd()
        longest = {library.DecompressionParameter.window_log_max: WINDOW}
        return cast(BinaryIO, library.ZstdFile(raw, options=longest))
    return raw


def zstd() -> Any:
    """The standard library's `compression.zstd`, or its backport."""
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    needs(module, "reading .zst")
    return importlib.import_module(module)


@contextmanager
def _told_apart(source: Source) -> Iterator[None]:
    """Damage in the file is Broken; that it cannot be read is a FileError."""
    damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    if source.packing == "zstd":
        damage += (zstd().ZstdError,)
    try:
        yield
    except damage as error:
        raise Broken(f"broken {source.packing}: {show(str(error), 200)}") from None
    except OSError as error:
        raise FileError(f"reading failed: {error.strerror or show(str(error), 200)}", file=source.path) from None


def _lines(source: Source, stream: BinaryIO, raw: BinaryIO, first: Block) -> Iterator[Block]:
    """Blocks of whole lines.  Each ends with the last line before a multiple of BLOCK, wherever reading begins."""
    at, line, parts, size = first.at, first.line, list[bytes](), 0
    while chunk := stream.read(BLOCK - (at + size) % BLOCK):
        cut = chunk.rfind(b"\n") + 1
        if not cut:
            parts.append(chunk)
            size += len(chunk)
            if size > LONGEST:
                what = f"line {line} has more than {LONGEST} bytes"
                raise FileError(what, file=source.path, hint="is it a file of lines at all?")
            continue
        payload = b"".join([*parts, chunk[:cut]])
        yield Block(first.file, at, at + len(payload), line, first.kind, payload, raw.tell())
        at, line, parts, size = at + len(payload), line + payload.count(b"\n"), [chunk[cut:]], len(chunk) - cut
    if payload := b"".join(parts):
        yield Block(first.file, at, at + len(payload), line, first.kind, payload, raw.tell())


def _whole(source: Source, stream: BinaryIO, raw: BinaryIO, number: int, at: int) -> Iterator[Block]:
    """The file as one document."""
    payload = stream.read(LONGEST + 1)
    if len(payload) > LONGEST:
        what = f"has more than {LONGEST} bytes, too many for one document"
        raise FileError(what, file=source.path, hint="--txt line makes each line a document")
    if payload:
        yield Block(number, at, at + len(payload), 1, "text", payload, raw.tell())


def _rows(source: Source, raw: BinaryIO, number: int, keys: Sequence[str], at: int) -> Iterator[Block]:
    """Rows of Parquet, as Arrow streams."""
    import pyarrow as pa

    for start, batch, rows in _batches(source, raw, keys, at):
        buffer = io.BytesIO()
        with pa.ipc.new_stream(buffer, batch.schema) as writer:
            writer.write_batch(batch)
        stop = start + batch.num_rows
        yield Block(number, start, stop, start + 1, "arrow", buffer.getvalue(), source.size * stop // rows)


def _batches(source: Source, raw: BinaryIO, keys: Sequence[str], at: int) -> Iterator[tuple[int, Any, int]]:
    """(first row, a record batch, rows of the file) from row `at` on, a row group at a time."""
    needs("pyarrow", "reading Parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(raw, page_checksum_verification=True, memory_map=False)
        columns = _columns(source, file.schema_arrow.names, keys)
        groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        total, size = file.metadata.num_rows, sum(group.total_byte_size for group in groups)
        step, start = min(ROWS, max(1, BLOCK * total // max(1, size))), 0
        for i, group in enumerate(groups):
            end = start + group.num_rows
            for batch in file.iter_batches(step, [i], columns) if end > at else ():
                skip = min(max(0, at - start), batch.num_rows)
                if skip < batch.num_rows:
                    yield start + skip, batch.slice(skip), total
                start += batch.num_rows
            start = end
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise Broken(f"broken Parquet: {show(str(error), 200)}") from None


def _columns(source: Source, held: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Those of `keys` that are there; the first one must be."""
    if keys[0] not in held:
        what = f"has no column {show(keys[0])}, only {some(map(show, held))}"
        raise FileError(what, file=source.path, hint="name the one to read with --text-key or --messages-key")
    return [key for key in keys if key in held]
