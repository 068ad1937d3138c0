"""Regular files, read at given offsets with `pread` and nothing else.

    file = File("model.safetensors")
    file.read(offset=8, size=100)
    check_unchanged({file.path: file.stamp})       # FileError if it was written or replaced meanwhile

No mmap: a file that is truncated while we read it ends in a FileError, not in a signal, and the memory that a
process occupies stays what it asked for.  Descriptors are opened when needed and few are kept, so a checkpoint may
have any number of shards; one that is opened again must still be the same file.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from surgery.errors import ADVICE, FileError, UsageError, show, some
from surgery.tensors import elsewhere
from surgery.tensors.stamp import Stamp

MAX_OPEN = 128
IO: Counter[str] = Counter()  # bytes and calls of all reads in this process, so that claims can be measured
AGAIN = "wait until whatever writes it is done, then run the same command again"
BRING = "only files of this machine are read here: surgery pull ADDRESS FOLDER brings what lies at an address"
SEND = "write to a folder of this machine: surgery push FOLDER ADDRESS sends it"

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.I)
_open: OrderedDict[tuple[str, Stamp], _Handle] = OrderedDict()
_lock = threading.Lock()
_seen: ContextVar[tuple[dict[str, Stamp], ...]] = ContextVar("seen", default=())


@contextmanager
def watched() -> Iterator[dict[str, Stamp]]:
    """The stamps, by path, of all files that are opened within; filled while it runs."""
    stamps: dict[str, Stamp] = {}
    token = _seen.set((*_seen.get(), stamps))
    try:
        yield stamps
    finally:
        _seen.reset(token)


def check_unchanged(stamps: Mapping[str, Stamp]) -> None:
    """Raise FileError unless every file is what it was when it was opened: neither written nor replaced nor removed."""
    changed = [path for path, stamp in stamps.items() if _stamp(path) != stamp]
    if changed:
        more = f" (and so were {some(changed[1:])})" if changed[1:] else ""
        raise FileError(f"was changed while it was read{more}", file=changed[0], hint=AGAIN)


def _stamp(path: str) -> Stamp | None:
    if (remote := elsewhere.at(path)) is not None:
        return remote.now()
    try:
        return Stamp.of(os.stat(path))
    except OSError:
        return None


class _Handle:
    """An open descriptor, closed when the last reader lets go: never while another thread reads from it."""

    __slots__ = ("fd", "info")

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.fd = _descriptor(path)
        self.info = os.fstat(self.fd)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _descriptor(path: str) -> int:
    """An open descriptor; where no more may be open, what is kept here is let go."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: opening a pipe must not wait for a writer
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
    with _lock:
        _open.clear()
    return os.open(path, flags)


class File:
    """A regular file as it was when it was opened.  Pipes, devices and directories are refused before any reading.

    Where `path` stands for an object that lies elsewhere, it is read there (`elsewhere.py`).
    """

    __slots__ = ("path", "remote", "size", "stamp")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.remote = elsewhere.at(self.path)
        handle = None
        if self.remote is not None:
            self.stamp, self.size = self.remote.stamp, self.remote.stamp.size
        else:
            handle = self._open()
            self.stamp, self.size = Stamp.of(handle.info), handle.info.st_size
        for stamps in _seen.get():
            if stamps.setdefault(self.path, self.stamp) != self.stamp:
                raise FileError("was changed while it was read", file=self.path, hint=AGAIN)
        if handle is not None:
            _keep(self, handle)

    def _open(self) -> _Handle:
        """Raises FileError for all but regular files."""
        try:
            handle = _Handle(self.path)
        except OSError as error:
            hint = BRING if _ADDRESS.match(self.path) else ADVICE.get(error.errno or 0)
            raise FileError(f"cannot be opened: {error.strerror}", file=self.path, hint=hint) from None
        except ValueError:
            raise FileError(f"{show(self.path)} is not a usable file name") from None
        mode = handle.info.st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file (a pipe, device or socket)"
            raise FileError(f"is {kind}", file=self.path)
        return handle

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
        if self.remote is not None:
            self.remote.read_into(offset, out, what)
            return _count(len(out), 1)
        got, calls, size, handle = 0, 0, len(out), _handle(self)
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
        return _count(got, calls)

    def read_runs(self, offsets: Iterable[int], size: int, out: memoryview, what: str = "data") -> None:
        """Fill a writable buffer with runs of `size` bytes, one at each offset.  Raises FileError as `read_into`."""
        if self.remote is not None:
            for i, offset in enumerate(offsets):
                self.remote.read_into(offset, out[i * size : (i + 1) * size], what)
            return _count(len(out), 1)
        handle, at, preadv = _handle(self), 0, os.preadv
        try:
            for offset in offsets:
                if preadv(handle.fd, (out[at : at + size],), offset) != size:
                    self.read_into(offset, out[at : at + size], what)  # the rest of a short read, or what is wrong
                    _count(-size, -1)
                at += size
        except OSError as error:
            raise FileError(f"{what}: reading failed: {error.strerror}", file=self.path) from None
        return _count(at, at // size)


def _count(size: int, calls: int) -> None:
    with _lock:
        IO["bytes"] += size
        IO["calls"] += calls


def _handle(file: File) -> _Handle:
    key = file.path, file.stamp
    with _lock:
        handle = _open.get(key)
        if handle is not None:
            _open.move_to_end(key)
            return handle
    try:
        handle = _Handle(file.path)
    except OSError as error:
        raise FileError(f"cannot be opened again: {error.strerror}", file=file.path) from None
    if Stamp.of(handle.info) != file.stamp:
        raise FileError("was changed while it was read", file=file.path, hint=AGAIN)
    return _keep(file, handle)


def _keep(file: File, handle: _Handle) -> _Handle:
    with _lock:
        _open[file.path, file.stamp] = handle
        _open.move_to_end((file.path, file.stamp))
        while len(_open) > kept_open():
            _open.popitem(last=False)
    return handle


def kept_open() -> int:
    """How many descriptors may be kept: a quarter of what the process is allowed, at most MAX_OPEN."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if allowed == resource.RLIM_INFINITY else max(1, min(MAX_OPEN, allowed // 4))


def size_of(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, also of one that lies elsewhere.  Raises OSError if there is none."""
    remote = elsewhere.at(os.fspath(path))
    return os.stat(path).st_size if remote is None else remote.stamp.size


def read_small(path: str | os.PathLike[str], limit: int, what: str) -> bytes:
    """A whole small file.  Raises FileError if it is larger than `limit` bytes."""
    file = File(path)
    if file.size > limit:
        raise FileError(f"{what} of {file.size} bytes is over the limit of {limit}", file=file.path)
    return file.read(0, file.size, what)


def usable_path(path: object) -> Path:
    """A path that is to be written, made absolute.  Raises UsageError if it is none, or the working folder is gone."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(text := os.fspath(path), str):
        raise UsageError(f"a path is needed, not {show(path)}")
    if "\0" in text or not text:
        raise UsageError(f"{show(text)} is not a usable file name")
    check_local(text)
    try:
        return Path(os.path.abspath(text))
    except FileNotFoundError:
        what = "is a relative path, but the working folder has been removed"
        raise UsageError(what, file=text, hint="give an absolute path, or `cd` to a folder that exists") from None


def check_local(path: str | os.PathLike[str]) -> None:
    """Raise UsageError for an address, which would be the name of a folder here."""
    if _ADDRESS.match(text := os.fspath(path)):
        raise UsageError(f"{re.sub(':/+', '://', text, count=1)} is an address", hint=SEND)


def leads_out(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a link leads from `path` out of `folder`; a snapshot of a hub cache may link to its blobs."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs"  # .../models--owner--name/{blobs/,snapshots/REVISION/}
    return home not in real.parents and not (home.parent.name == "snapshots" and real.parent == blobs)


def check_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Raise FileError if `path` leads out of `folder`."""
    if leads_out(path, folder):
        raise FileError(
            f"is a link out of its folder, to {show(os.path.realpath(path), 200)}",
            file=path,
            hint="what lies elsewhere is not copied: if it belongs to the model, replace the link by the file",
        )


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
