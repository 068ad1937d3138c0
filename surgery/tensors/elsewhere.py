"""Files whose bytes lie elsewhere: a path stands for them here, and they are read in ranges, through a cache.

    stand_in("/cache/model.safetensors", Remote("s3://bucket/model.safetensors", stamp, fetch, now))
    File("/cache/model.safetensors").read(offset=8, size=100)       # one request, of a block

A request costs as much as reading megabytes, so it asks for whole blocks, and for more and more of them while reading
goes on where it was: 256 KiB, 512 KiB, ... 8 MiB.  What was fetched is kept, the latest first, within a limit that all
remote files share (`limited`).  Who opens the path without `File` finds a text that says what it stands for.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from surgery.errors import FileError
from surgery.tensors.stamp import Stamp

BLOCK = 256 << 10  # bytes: the least that is asked for, and what positions are rounded to
LARGEST = 8 << 20  # bytes of one request
KEPT = 64 << 20  # bytes that are kept, unless `limited` says less
SHARE = 8  # of a memory budget: one part is for what is kept
REQUESTS: Counter[str] = Counter()  # ranges that were asked for, by name, so that claims can be measured
POINTER = b"surgery: a stand-in for "

Fetch = Callable[[int, int], bytes]


class Remote:
    """One version of an object: `fetch(start, stop)` gives exactly these bytes of it or raises FileError.

    name   what errors call it, an address       now   its stamp at this moment, None if it is gone
    """

    def __init__(self, name: str, stamp: Stamp, fetch: Fetch, now: Callable[[], Stamp | None]) -> None:
        self.name, self.stamp, self.fetch, self.now = name, stamp, fetch, now
        self.last = 0, BLOCK  # where the latest request ended, and how long it was

    def read_into(self, offset: int, out: memoryview, what: str) -> None:
        """Fill a writable buffer.  Raises FileError, also if the object ends before."""
        stop = offset + len(out)
        if offset < 0 or stop > self.stamp.size:
            raise FileError(f"{what}: bytes {offset} to {stop} lie outside the {self.stamp.size} there", file=self.name)
        done = 0
        while done < len(out):
            start, data = _cache.chunk(self, offset + done, stop)
            part = memoryview(data)[offset + done - start :][: len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    def window(self, at: int, stop: int) -> tuple[int, int]:
        """What to ask for when [at, stop) is wanted: whole blocks, and more if reading goes on where it was."""
        start = at // BLOCK * BLOCK
        ended, length = self.last
        size = -(-(stop - start) // BLOCK) * BLOCK
        if start == ended and start:
            size = max(size, 2 * length)
        size = min(size, _cache.largest())
        end = min(start + size, self.stamp.size)
        self.last = end, end - start
        return start, end


class _Cache:
    """What was fetched, by remote file and block; a chunk is what one request brought, or will bring."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.room = KEPT
        self.chunks: OrderedDict[tuple[int, int], tuple[Remote, int, int, Future[bytes]]] = OrderedDict()
        self.blocks: dict[tuple[int, int], int] = {}  # (remote, block) -> where its chunk starts
        self.size = 0

    def largest(self) -> int:
        """Bytes of one request: several must have room."""
        return max(BLOCK, min(LARGEST, self.room // 4 // BLOCK * BLOCK))

    def chunk(self, remote: Remote, at: int, stop: int) -> tuple[int, bytes]:
        """(start, bytes) of a chunk that holds byte `at`.  Other threads that want it wait for the same request."""
        with self.lock:
            key = id(remote), self.blocks.get((id(remote), at // BLOCK), -1)
            if key in self.chunks:
                _, start, _, future = self.chunks[key]
                self.chunks.move_to_end(key)
                mine = False
            else:
                start, end = remote.window(at, stop)
                end = self._free(remote, start, end)
                future, mine = Future(), True
                self._add(remote, start, end, future)
        if mine:
            self._fetch(remote, start, end, future)
        return start, future.result()

    def _free(self, remote: Remote, start: int, end: int) -> int:
        """Where a request that begins at `start` ends, so that nothing is asked for twice."""
        for at in range(start + BLOCK, end, BLOCK):
            if (id(remote), at // BLOCK) in self.blocks:
                return at
        return end

    def _add(self, remote: Remote, start: int, end: int, future: Future[bytes]) -> None:
        self.chunks[id(remote), start] = remote, start, end, future
        for at in range(start, end, BLOCK):
            self.blocks[id(remote), at // BLOCK] = start
        self.size += end - start
        REQUESTS[remote.name] += 1
        for key in [key for key, (*_, f) in self.chunks.items() if f.done()]:
            if self.size <= self.room:
                break
            self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
        remote, start, end, _ = self.chunks.pop(key)
        for at in range(start, end, BLOCK):
            del self.blocks[id(remote), at // BLOCK]
        self.size -= end - start

    def _fetch(self, remote: Remote, start: int, end: int, future: Future[bytes]) -> None:
        try:
            data = remote.fetch(start, end)
            if len(data) != end - start:
                raise FileError(
                    f"{len(data)} bytes came where {end - start} were asked for", file=remote.name, byte=start
                )
        except BaseException as error:
            with self.lock:
                self._drop((id(remote), start))
            future.set_exception(error)
        else:
            future.set_result(data)


_cache = _Cache()
_places: dict[str, Remote] = {}


def stand_in(path: str, remote: Remote) -> None:
    """From now on `path` is read as this object."""
    _places[path] = remote


def forget(path: str) -> None:
    """From now on `path` is what lies there."""
    _places.pop(path, None)


def at(path: str) -> Remote | None:
    """The object that a path stands for; None of a plain file."""
    return _places.get(path)


@contextmanager
def limited(memory: int) -> Iterator[int]:
    """Within, what is kept takes a part of this budget; yields the bytes that are left of it.

    Nothing is taken where no file lies elsewhere.
    """
    if not _places:
        yield memory
        return
    before, _cache.room = _cache.room, min(KEPT, max(4 * BLOCK, memory // SHARE))
    try:
        yield max(1, memory - _cache.room)
    finally:
        _cache.room = before
