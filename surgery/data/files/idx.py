"""Megatron's `.idx` (version 1): where the documents of a `.bin` of token ids begin and end.

    index = read_index("corpus.idx")                          # checked against the sizes of corpus.idx and corpus.bin
    index.tokens, index.dtype, len(index.documents) - 1       # 3939, dtype('<u2'), 120

    with IndexedWriter("corpus", "uint16") as writer:         # corpus.bin and corpus.idx appear whole, or not at all
        writer.add([5, 6, 7, 0])                              # a document
        writer.extend([5, 0, 6, 7, 0], lengths=[2, 3])        # many

    write_index("part.idx", "uint16", lengths=[4, 9])         # for a payload that exists already

Layout, little endian (Megatron-core `datasets/indexed_dataset.py`): `MMIDIDX\\0\\0`, u64 version, u8 dtype, u64 number
of sequences, u64 number of documents + 1, i32 lengths in tokens, i64 offsets in bytes, i64 first sequence of each
document and the end, and i8 modes where there are any.  A document is one sequence unless its writer split it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from surgery.data.files.mapped import Array, Mapped, mapped
from surgery.errors import ConfigError, FileError, show
from surgery.tensors.files import File
from surgery.writing.atomic import atomic_file

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are floats, in another order in NeoX than in Megatron: no token ids.
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODES = {name: code for code, name in DTYPES.items()} | {"uint32": 4}  # the same bytes while ids are below 2^31
CHUNK = 1 << 20  # entries read or written at a time
LONGEST = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Index:
    """What a checked `.idx` says; the arrays are memory maps.

    lengths     int32 [sequences], tokens
    offsets     int64 [sequences], bytes into `payload`; without holes, from 0 to its end
    documents   int64 [documents + 1], the first sequence of each document, then the number of sequences
    modes       int8 [sequences], or None: Megatron's mark of multimodal sequences
    """

    path: Path
    payload: Path
    dtype: np.dtype[Any]
    tokens: int
    sections: tuple[Mapped, ...]

    @property
    def lengths(self) -> Array:
        return self.sections[0].array

    @property
    def offsets(self) -> Array:
        return self.sections[1].array

    @property
    def documents(self) -> Array:
        return self.sections[2].array

    @property
    def modes(self) -> Array | None:
        return self.sections[3].array if len(self.sections) > 3 else None


def read_index(path: str | os.PathLike[str], payload: str | os.PathLike[str] | None = None) -> Index:
    """An index, every entry checked.  `path`: `x.idx`, `x.bin` or `x`; `payload`: the token file, by default `x.bin`.

    Raises FileError if the header, the counts, the lengths, the offsets or the documents contradict each other or the
    sizes of the two files.  Memory is bounded: the entries are checked in chunks.
    """
    path = Path(path)
    path = path if path.suffix == ".idx" else path.with_suffix(".idx") if path.suffix == ".bin" else _add(path, ".idx")
    file = File(path)
    dtype, sequences, documents, has_modes = _header(file)
    tokens_file = File(payload if payload is not None else path.with_suffix(".bin"))
    at = HEADER.size
    lengths, offsets = mapped(path, "i4", at, sequences), mapped(path, "i8", at + 4 * sequences, sequences)
    firsts = mapped(path, "i8", at + 12 * sequences, documents)
    modes = [mapped(path, "i1", at + 12 * sequences + 8 * documents, sequences)] if has_modes else []
    tokens = _check_sequences(file, lengths, offsets, dtype.itemsize)
    if tokens * dtype.itemsize != tokens_file.size:
        what = f"holds {tokens_file.size} bytes, but {path.name} lists {tokens} tokens of {dtype.itemsize} bytes"
        raise FileError(what, file=tokens_file.path, hint="the two files do not belong together, or one is truncated")
    _check_documents(file, firsts, sequences)
    return Index(path, Path(tokens_file.path), dtype, tokens, (lengths, offsets, firsts, *modes))


def _header(file: File) -> tuple[np.dtype[Any], int, int, bool]:
    """dtype, sequences, entries of the list of documents, and whether modes follow."""
    magic, version, code, sequences, documents = HEADER.unpack(file.read(0, HEADER.size, "header"))
    if magic != MAGIC:
        raise FileError(f"begins with {show(magic)}, not with {show(MAGIC)}: no Megatron index", file=file.path)
    if version != 1:
        raise FileError(f"is version {show(version)}; only version 1 is known", file=file.path, byte=9)
    if code not in DTYPES:
        kind = "floating-point numbers, no token ids" if code in (6, 7) else "unknown"
        raise FileError(f"dtype code {code} is {kind}", file=file.path, byte=17)
    size = HEADER.size + 12 * sequences + 8 * documents
    if file.size not in (size, size + sequences) or documents < 1:
        what = f"{show(sequences)} sequences and {show(documents)} entries for documents need {show(size)} bytes"
        raise FileError(f"{what}; the file has {file.size}", file=file.path, byte=18, hint="it is truncated or damaged")
    return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents, file.size > size


def _check_sequences(file: File, lengths: Mapped, offsets: Mapped, itemsize: int) -> int:
    """The number of tokens.  Each sequence must begin where the one before it ends."""
    tokens = at = 0
    for some_lengths, some_offsets in zip(_chunks(file, lengths), _chunks(file, offsets), strict=True):
        ends = tokens + np.cumsum(some_lengths, dtype=np.int64)
        right = np.concatenate([[tokens], ends[:-1]]) * itemsize
        for bad, what in ((some_lengths < 0, "has a negative length"), (some_offsets != right, "is out of its place")):
            if bad.any():
                i = int(np.argmax(bad))
                said = f"{some_lengths[i]} tokens at byte {some_offsets[i]}"
                byte = lengths.offset + 4 * (at + i)
                raise FileError(f"sequence {at + i} {what}: {said}", file=file.path, byte=byte, hint="it is damaged")
        tokens, at = int(ends[-1]), at + len(ends)
    return tokens


def _check_documents(file: File, section: Mapped, sequences: int) -> None:
    """They must go from 0 to the number of sequences and never back; equal entries are empty documents."""
    last, at = 0, 0
    for firsts in _chunks(file, section):
        bad = np.diff(firsts, prepend=last) < 0
        bad[0] |= at == 0 and firsts[0] != 0
        if bad.any():
            i = int(np.argmax(bad))
            what = f"document {at + i} begins with sequence {firsts[i]}, after {last if i == 0 else firsts[i - 1]}"
            raise FileError(what, file=file.path, byte=section.offset + 8 * (at + i), hint="it is damaged")
        last, at = int(firsts[-1]), at + len(firsts)
    if last != sequences:
        raise FileError(f"the documents end with sequence {last} of {sequences}", file=file.path, hint="it is damaged")


def _chunks(file: File, section: Mapped) -> Iterator[Array]:
    """The entries, read and not mapped: memory stays bounded, and a file that shrinks is an error."""
    size = section.dtype.itemsize
    for first in range(0, section.count, CHUNK):
        n = min(CHUNK, section.count - first)
        yield np.frombuffer(file.read(section.offset + first * size, n * size, "entries"), section.dtype)


def _add(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def index_code(dtype: npt.DTypeLike) -> int:
    """The code of a dtype in an index.  Raises ConfigError if it has none."""
    name = np.dtype(dtype).name
    if name not in CODES:
        raise ConfigError(f"a Megatron index cannot say {name}", hint=f"known: {', '.join(CODES)}")
    return CODES[name]


def write_index(
    path: str | os.PathLike[str],
    dtype: npt.DTypeLike,
    lengths: Iterable[int] | Array,
    documents: Sequence[int] | Array | None = None,
    modes: Sequence[int] | Array | None = None,
    force: bool = True,
) -> None:
    """Write an index for a payload that exists or will; it replaces another one only with `force`.

    lengths: of the sequences, in tokens.  documents: [documents + 1] as in `Index`; by default each sequence is one.
    Raises ConfigError if a length is negative or over 2^31 - 1, or `documents` does not fit; OutputError.
    """
    if documents is not None:
        documents = np.asarray(documents, "<i8")
    with atomic_file(path, force) as file:
        file.write(bytes(HEADER.size))
        lengths = lengths if isinstance(lengths, np.ndarray) else np.fromiter(lengths, np.int64)
        for first in range(0, len(lengths), CHUNK):
            _write_lengths(file, lengths[first : first + CHUNK])
        _finish(file, dtype, documents, None if modes is None else np.asarray(modes, "i1"))


def _write_lengths(file: BinaryIO, lengths: Array) -> None:
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= LONGEST:
        raise ConfigError(f"a sequence of {lengths.min() if lengths.min() < 0 else lengths.max()} tokens has no index")
    file.write(lengths.astype("<i4").tobytes())


def _finish(file: BinaryIO, dtype: npt.DTypeLike, documents: Array | None, modes: Array | None = None) -> None:
    """Complete a file that holds an empty header and the lengths."""
    code, itemsize = index_code(dtype), np.dtype(dtype).itemsize
    sequences = (file.tell() - HEADER.size) // 4
    entries = sequences + 1 if documents is None else len(documents)
    if documents is not None and not _fits(documents, sequences):
        raise ConfigError(f"documents must rise from 0 to the number of sequences, {sequences}")
    if modes is not None and len(modes) != sequences:
        raise ConfigError(f"{len(modes)} modes for {sequences} sequences")
    at = 0
    for first in range(0, sequences, CHUNK):
        file.seek(HEADER.size + 4 * first)
        lengths = np.frombuffer(file.read(4 * min(CHUNK, sequences - first)), "<i4")
        ends = at + np.cumsum(lengths, dtype=np.int64) * itemsize
        file.seek(HEADER.size + 4 * sequences + 8 * first)
        file.write(np.concatenate([[at], ends[:-1]]).astype("<i8").tobytes())
        at = int(ends[-1])
    file.seek(0, os.SEEK_END)
    for first in range(0, entries, CHUNK):
        stop = min(first + CHUNK, entries)
        chunk = np.arange(first, stop) if documents is None else documents[first:stop]
        file.write(chunk.astype("<i8").tobytes())
    file.write(b"" if modes is None else modes.tobytes())
    file.seek(0)
    file.write(HEADER.pack(MAGIC, 1, code, sequences, entries))


def _fits(documents: Array, sequences: int) -> bool:
    ends_right = len(documents) > 0 and documents[0] == 0 and documents[-1] == sequences
    return bool(ends_right and (np.diff(documents) >= 0).all())


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`, each document as one sequence; both appear when the block ends well.

    Memory does not grow with the documents.  `tokens` and `count` say how many tokens and documents were added.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(DTYPES[index_code(dtype)]).newbyteorder("<")
        self.tokens = self.count = 0
        self._stack = ExitStack()

    def __enter__(self) -> IndexedWriter:
        self._index = self._stack.enter_context(atomic_file(_add(self.prefix, ".idx")))  # published last
        self._payload = self._stack.enter_context(atomic_file(_add(self.prefix, ".bin")))
        self._index.write(bytes(HEADER.size))
        return self

    def add(self, tokens: Sequence[int] | Array) -> None:
        """One document.  Raises ConfigError if an id does not fit."""
        self.extend(tokens, [len(tokens)])

    def extend(self, tokens: Sequence[int] | Array, lengths: Sequence[int] | Array) -> None:
        """Documents one after the other.  Raises ConfigError if an id does not fit."""
        ids, sizes = np.asarray(tokens), np.asarray(lengths, np.int64)
        if int(sizes.sum()) != len(ids):
            raise ConfigError(f"documents of {sizes.sum()} tokens in all, but {len(ids)} tokens")
        self._payload.write(fitting(ids, self.dtype).tobytes())
        _write_lengths(self._index, sizes)
        self.tokens, self.count = self.tokens + len(ids), self.count + len(sizes)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            try:
                _finish(self._index, self.dtype, None)
            except BaseException as mine:
                self._stack.__exit__(type(mine), mine, mine.__traceback__)
                raise
        self._stack.__exit__(kind, error, at)


def fitting(ids: Array, dtype: np.dtype[Any]) -> Array:
    """Token ids as `dtype`.  Raises ConfigError if one does not fit."""
    if not len(ids):
        return np.zeros(0, dtype)
    limits = np.iinfo(dtype)
    low, high = int(ids.min()), int(ids.max())
    if ids.dtype.kind not in "iu" or low < limits.min or high > limits.max:
        hint = "choose a dtype that holds the vocabulary"
        raise ConfigError(f"ids from {low} to {high} do not fit {dtype.name}", hint=hint)
    return ids.astype(dtype)
