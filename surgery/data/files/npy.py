"""NumPy's `.npy` and `.npz`, read strictly: plain integers, no pickles, no sizes that the file does not hold.

    read_header(data, "order.npy")                 # Header(dtype('<i4'), (445, 2), 128), from the first bytes of a file
    open_npy("ids.npy")                            # a `Mapped` of one dimension and the shape it stands for
    with open_npz("batches.npz") as arrays:
        arrays["input_ids"]                        # read when it is asked for

Format: numpy/lib/format.py (magic `\\x93NUMPY`, a version, the length of a Python literal, the literal, the data).
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.data.files.mapped import Array, Mapped, mapped
from surgery.errors import FileError, show
from surgery.tensors.files import File

MAGIC = b"\x93NUMPY"
LENGTHS = {1: struct.Struct("<H"), 2: struct.Struct("<I")}  # version -> how long the literal is
HEADER = re.compile(  # numpy writes nothing else; what is no literal of this form is not parsed at all
    r"\{\s*'descr':\s*'([^']{1,16})',\s*'fortran_order':\s*(True|False),"
    r"\s*'shape':\s*\(\s*((?:\d{1,18}(?:\s*,\s*\d{1,18})*)?)\s*,?\s*\),?\s*\}\s*"
)
KINDS = {f"{order}{kind}" for kind in ("i2", "i4", "i8", "u2", "u4", "u8") for order in "<="} | {"|u1", "|i1", "|b1"}
HEADER_LIMIT = 10_000  # bytes; that of a plain array has 128
RATIO = 1032  # deflate makes data at most that much smaller
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a `.npy` says of its array, which begins at byte `start`."""

    dtype: np.dtype[Any]
    shape: Shape
    start: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def is_npy(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as NumPy's do.  dolma's `.npy` does not: it is the ids and nothing else."""
    file = File(path)
    return file.read(0, min(len(MAGIC), file.size), "magic") == MAGIC


def read_header(data: bytes, file: str) -> Header:
    """The header in the first bytes of a `.npy`.  Raises FileError unless it is of plain integers, in C order."""
    major = data[len(MAGIC)] if data.startswith(MAGIC) and len(data) > len(MAGIC) + 6 else 0
    if major not in LENGTHS:
        raise FileError("does not begin as a .npy of version 1.0 or 2.0", file=file, byte=0)
    start = len(MAGIC) + 2 + LENGTHS[major].size
    (length,) = LENGTHS[major].unpack(data[len(MAGIC) + 2 : start])
    literal = HEADER.fullmatch(data[start : start + length].decode("latin-1"))
    if literal is None or len(data) < start + length:
        raise FileError("has no readable .npy header", file=file, byte=start, hint="it is damaged, or holds no array")
    kind, order, sizes = literal.groups()
    if kind not in KINDS:
        raise FileError(f"holds {show(kind)}, not little-endian integers", file=file, byte=start)
    shape = tuple(int(size) for size in sizes.replace(",", " ").split())
    if order == "True" and len(shape) > 1:
        raise FileError(f"has shape {show(str(shape))} in Fortran order", file=file, byte=start)
    return Header(np.dtype(kind), shape, start + length)


def open_npy(path: str | os.PathLike[str]) -> tuple[Mapped, Shape]:
    """The array of a `.npy`, flat, and its shape.  Raises FileError if the file is longer or shorter than it says."""
    file = File(path)
    header = read_header(file.read(0, min(file.size, HEADER_LIMIT + 16), "header"), file.path)
    size = header.count * header.dtype.itemsize
    if header.start + size != file.size:
        what = f"its header promises {size} bytes of {show(str(header.shape))} {header.dtype.name}"
        raise FileError(f"{what}; {file.size - header.start} follow", file=file.path, hint="it is damaged or truncated")
    return mapped(path, header.dtype, header.start, header.count), header.shape


class Npz(Mapping[str, Array]):
    """The arrays of an open `.npz`, each read when it is asked for."""

    def __init__(self, path: str, archive: zipfile.ZipFile) -> None:
        self.path, self._archive = path, archive
        self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> Array:
        info = self._members[name]
        if info.file_size > RATIO * info.compress_size + HEADER_LIMIT:
            raise FileError(f"promises {info.file_size} bytes in {info.compress_size}", file=self.path, member=name)
        try:
            data = self._archive.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise FileError(f"cannot be read: {show(str(error))}", file=self.path, member=name) from None
        header = read_header(data[: HEADER_LIMIT + 16], f"{self.path}!{name}")
        if header.start + header.count * header.dtype.itemsize != len(data):
            what = f"its header promises {show(str(header.shape))}, which it has not"
            raise FileError(what, file=self.path, member=name)
        return np.frombuffer(data, header.dtype, header.count, header.start).reshape(header.shape)


@contextmanager
def open_npz(path: str | os.PathLike[str]) -> Iterator[Npz]:
    """The arrays of a `.npz`.  Raises FileError if it is none."""
    file = File(path)
    try:
        archive = zipfile.ZipFile(file.path)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise FileError(f"is no .npz: {show(str(error))}", file=file.path) from None
    with archive:
        yield Npz(file.path, archive)
