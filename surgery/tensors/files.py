"""Regular files, read at given offsets with `pread` and nothing else.

    File("model.safetensors").read(offset=8, size=100)

No mmap: a file that is truncated while we read it ends in a FileError, not in a signal, and the memory that a
process occupies stays what it asked for.  Descriptors are opened when needed and at most `MAX_OPEN` are kept, so a
checkpoint may have any number of shards.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path

from surgery.errors import FileError, show

MAX_OPEN = 128
IO: Counter[str] = Counter()  # bytes and calls of all reads in this process, so that claims can be measured

_open: OrderedDict[str, _Handle] = OrderedDict()
_lock = threading.Lock()


class _Handle:
    """An open descriptor, closed when the last reader lets go: never while another thread reads from it."""

    __slots__ = ("fd",)

    def __init__(self, path: str) -> None:
        # O_NONBLOCK: opening a pipe must not wait for a writer
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class File:
    """A regular file of a known size.  Pipes, devices and directories are refused before anything is read."""

    __slots__ = ("path", "size")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            handle = _Handle(self.path)
        except OSError as error:
            raise FileError(f"cannot be opened: {error.strerror}", file=self.path) from None
        except ValueError:
            raise FileError(f"{show(self.path)} is not a usable file name") from None
        info = os.fstat(handle.fd)
        if not stat.S_ISREG(info.st_mode):
            kind = "a directory" if stat.S_ISDIR(info.st_mode) else "no regular file (a pipe, device or socket)"
            raise FileError(f"is {kind}", file=self.path)
        self.size = info.st_size
        _keep(self.path, handle)

    def __repr__(self) -> str:
        return f"File({self.path!r}, size={self.size})"

    def read(self, offset: int, size: int, what: str = "data") -> bytes:
        """Exactly `size` bytes at `offset`.  Raises FileError if the file does not hold them."""
        self.check(offset, size, what)
        out = bytearray(size)
        self.read_into(offset, memoryview(out), what)
        return bytes(out)

    def check(self, offset: int, size: int, what: str) -> None:
        """Raise FileError unless bytes [offset, offset + size) lie inside the file."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise FileError(
                f"{what}: bytes {show(offset)} to {show(offset + size)} lie outside the file of {self.size} bytes",
                file=self.path,
                hint="the file is truncated or damaged; copy or download it again",
            )

    def read_into(self, offset: int, out: memoryview, what: str = "data") -> None:
        """Fill a writable buffer of bytes from `offset` on.  Raises FileError if the file ends before."""
        got, calls, size, handle = 0, 0, len(out), _handle(self.path)
        while got < size:
            try:
                n = os.preadv(handle.fd, [out[got:]], offset + got)
            except OSError as error:
                raise FileError(
                    f"{what}: reading failed: {error.strerror}", file=self.path, byte=offset + got
                ) from None
            if n == 0:
                raise FileError(
                    f"{what}: the file ends before byte {offset + size}",
                    file=self.path,
                    byte=offset + got,
                    hint="the file was truncated while it was read; copy or download it again",
                )
            got += n
            calls += 1
        _count(got, calls)

    def read_runs(self, offsets: Iterable[int], size: int, out: memoryview, what: str = "data") -> None:
        """Fill a writable buffer with runs of `size` bytes, one at each offset.  Raises FileError as `read_into`."""
        handle, at, preadv = _handle(self.path), 0, os.preadv
        try:
            for offset in offsets:
                if preadv(handle.fd, (out[at : at + size],), offset) != size:
                    self.read_into(offset, out[at : at + size], what)  # the rest of a short read, or what is wrong
                    _count(-size, -1)
                at += size
        except OSError as error:
            raise FileError(f"{what}: reading failed: {error.strerror}", file=self.path) from None
        _count(at, at // size)


def _count(size: int, calls: int) -> None:
    with _lock:
        IO["bytes"] += size
        IO["calls"] += calls


def _handle(path: str) -> _Handle:
    with _lock:
        handle = _open.get(path)
        if handle is not None:
            _open.move_to_end(path)
            return handle
    try:
        return _keep(path, _Handle(path))
    except OSError as error:
        raise FileError(f"cannot be opened again: {error.strerror}", file=path) from None


def _keep(path: str, handle: _Handle) -> _Handle:
    with _lock:
        _open[path] = handle
        _open.move_to_end(path)
        while len(_open) > MAX_OPEN:
            _open.popitem(last=False)
    return handle


def read_small(path: str | os.PathLike[str], limit: int, what: str) -> bytes:
    """A whole small file.  Raises FileError if it is larger than `limit` bytes."""
    file = File(path)
    if file.size > limit:
        raise FileError(f"{what} of {file.size} bytes is over the limit of {limit}", file=file.path)
    return file.read(0, file.size, what)


def plain_name(name: object, what: str, file: str | os.PathLike[str]) -> str:
    """`name` if it is a plain file name in the same folder, else FileError: no path leaves a checkpoint."""
    if (
        type(name) is not str
        or not name
        or len(name) > 255
        or name in (".", "..")
        or any(c in name for c in '/\\:\0"')
        or any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in name)
        or name != Path(name).name
    ):
        raise FileError(
            f"{what} names the file {show(name)}, which is not a plain file name",
            file=file,
            hint="shards must lie next to their index",
        )
    return name
