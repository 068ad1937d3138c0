"""Arrays that lie in files, mapped when they are used: any number of them with few open at a time.

    ids = mapped("corpus.bin", "uint16", offset=0, count=3939)
    ids.array[:4]                                           # a memory map; nothing else is read

A map costs a file descriptor while it is open, and a source may have thousands of shards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.errors import FileError
from surgery.tensors.files import File

Array = npt.NDArray[Any]
MAX_OPEN = 256


@dataclass(frozen=True)
class Mapped:
    """`count` entries of a dtype from byte `offset` of a file on; made by `mapped`, which checks it."""

    path: str
    dtype: np.dtype[Any]
    offset: int
    count: int
    stamp: tuple[int, ...]  # which file it was: a path that comes to mean another one is mapped anew

    @property
    def array(self) -> Array:
        """[count], read-only.  Raises FileError if the file is not the one it was."""
        return _open(self)

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True, eq=False)
class Held:
    """An array in memory (or mapped by someone else) in the place of a `Mapped`."""

    array: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def __len__(self) -> int:
        return len(self.array)


Column = Mapped | Held


def mapped(path: str | os.PathLike[str], dtype: npt.DTypeLike, offset: int = 0, count: int | None = None) -> Mapped:
    """An array of a file; by default all of it.  Raises FileError if the file does not hold whole entries."""
    file, kind = File(path), np.dtype(dtype).newbyteorder("<")
    if count is None:
        count, rest = divmod(file.size - offset, kind.itemsize)
        if rest:
            what = f"{file.size - offset} bytes are no whole number of {kind.name} of {kind.itemsize} bytes"
            raise FileError(what, file=file.path, hint="the dtype is wrong, or the file is truncated")
    file.check(offset, count * kind.itemsize, "array")
    return Mapped(file.path, kind, offset, count, _stamp(file.path))


def _stamp(path: str) -> tuple[int, ...]:
    try:
        info = os.stat(path)
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", file=path) from None
    return info.st_dev, info.st_ino, info.st_size


@lru_cache(maxsize=MAX_OPEN)
def _open(what: Mapped) -> Array:
    if not what.count:
        return np.zeros(0, what.dtype)
    if _stamp(what.path) != what.stamp:
        raise FileError("is another file than before, or has another size", file=what.path, hint="open it anew")
    try:
        return np.asarray(np.memmap(what.path, what.dtype, "r", what.offset, (what.count,)))
    except (OSError, ValueError) as error:
        raise FileError(f"cannot be mapped: {error}", file=what.path) from None
