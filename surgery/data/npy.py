"""NumPy's `.npy` and `.npz`, read strictly: plain integers, no pickles, no sizes that the file does not hold.

    read_header(data, "order.npy")                 # Header(dtype('<i4'), (445, 2), 128), from the first bytes of a file
    open_npy("ids.npy")                            # a `Mapped` of one dimension and the shape it stands for
    with open_npz("batches.npz") as arrays:
        arrays["input_ids"]                        # read when it is asked for

Format: numpy/lib/format.py (magic `\\x93NUMPY`, a version, the length of a Python literal, the literal, the data).
"""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.data.mapped import Array, Mapped, mapped
from surgery.errors import FileError, show
from surgery.tensors.files import File

MAGIC = b"\x93NUMPY"
HEADER_LIMIT = 10_000  # bytes; the literal of a plain array has about 100
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
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=HEADER_LIMIT)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream, max_header_size=HEADER_LIMIT)
        else:
            raise FileError(f"is version {version} of .npy; 1.0 and 2.0 are known", file=file, byte=6)
    except FileError:
        raise
    except (ValueError, TypeError, SyntaxError, EOFError, OverflowError, RecursionError, MemoryError) as error:
        raise FileError(f"has no readable .npy header: {show(str(error))}", file=file, byte=0) from None
    if dtype.kind not in "iub" or dtype.itemsize > 8 or dtype.byteorder == ">":
        raise FileError(f"holds {show(dtype.str)}, not little-endian integers", file=file, byte=0)
    if any(n < 0 for n in shape) or (fortran and len(shape) > 1):
        raise FileError(f"has shape {show(str(shape))}{' in Fortran order' if fortran else ''}", file=file, byte=0)
    return Header(dtype, shape, stream.tell())


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
