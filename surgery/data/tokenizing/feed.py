"""The encoded blocks of many files, made ahead of their use and handed out file by file, each in its order.

    feed = Feed(sources, order, settings, workers, ring=1)
    stream = feed.take()                        # the next file, or None
    while piece := feed.next(stream):
        piece.result.documents
    stream.damage                               # what was wrong with it, if it had no pieces for that reason

Which blocks are made first depends on the machine; what is handed out does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from surgery.data.tokenizing.encoder import Result
from surgery.data.tokenizing.job import Cursor
from surgery.data.tokenizing.settings import Settings
from surgery.data.tokenizing.sources import Source
from surgery.data.tokenizing.text import Block, Broken, Damage, blocks
from surgery.data.tokenizing.workers import Workers, explained
from surgery.errors import FileError


@dataclass(frozen=True, eq=False)
class Piece:
    """What became of the block at a cursor, and the cursor of the next one.  `cursor.skip` documents are done."""

    cursor: Cursor
    result: Result
    stop: Cursor


@dataclass(eq=False)
class Stream:
    """A file whose blocks are read, encoded and handed out."""

    start: Cursor
    source: Source
    check: Future[Damage | None] | None
    blocks: Iterator[Block] | None = None
    pending: deque[tuple[Block, Future[Result]]] = field(default_factory=deque)
    read: bool = False  # to its end
    damage: Damage | None = None
    last: Cursor | None = None  # where what was handed out ended

    @property
    def ready(self) -> bool:
        """Can blocks be read?  Not before it is known that the file unpacks."""
        if self.read or self.damage is not None:
            return False
        check = self.check
        return check is None or (check.done() and check.exception() is None and check.result() is None)


class Feed:
    """`order`: the numbers of the sources from the next one on; `ring`: how many are in use at a time."""

    def __init__(
        self, sources: Sequence[Source], order: Sequence[int], settings: Settings, workers: Workers, ring: int
    ) -> None:
        self.sources, self.settings, self.workers, self.ring = sources, settings, workers, ring
        self.order = iter(order)
        self.ahead = 2 * workers.count + 4  # blocks that are made but not handed out
        self.used: list[Stream] = []
        self.coming: deque[Stream] = deque()

    def open(self, cursor: Cursor) -> Stream:
        """A file from a place on.  What is packed is checked first, unless that was done when it was begun."""
        source = self.sources[cursor.file]
        unseen = cursor.at == 0 and cursor.skip == 0 and (source.packing or source.format == "parquet")
        return Stream(cursor, source, self.workers.check(source) if unseen else None)

    def use(self, stream: Stream) -> Stream:
        self.used.append(stream)
        return stream

    def take(self) -> Stream | None:
        """The next file in the order."""
        if not self.coming and not self._open_next():
            return None
        return self.use(self.coming.popleft())

    def next(self, stream: Stream) -> Piece | None:
        """The next block of a file that was taken, or None at its end, or if it is damaged."""
        self._fill()
        if stream.check is not None:
            with explained():
                stream.damage, stream.check = stream.check.result(), None
            self._fill()
        if stream.damage is not None or not (stream.pending or self._submit(stream)):
            self.used.remove(stream)
            return None
        block, future = stream.pending.popleft()
        with explained():
            result = future.result()
        read = stream.start.read if stream.last is None else stream.last.read
        skip = stream.start.skip if block.at == stream.start.at else 0
        cursor = Cursor(block.file, block.at, block.line, skip, read)
        stream.last = Cursor(block.file, block.stop, block.line + result.lines, 0, block.read)
        return Piece(cursor, result, stream.last)

    def _fill(self) -> None:
        """Submit blocks until enough are on their way: of the files in use first, evenly, then of those that follow."""
        while sum(len(s.pending) for s in (*self.used, *self.coming)) < self.ahead:
            ready = [s for s in self.used if s.ready]
            stream = min(ready, key=lambda s: len(s.pending)) if ready else self._following()
            if stream is None:
                return
            self._submit(stream)

    def _following(self) -> Stream | None:
        """A file that is not in use yet and can be read."""
        while True:
            for stream in self.coming:
                if stream.ready:
                    return stream
            if len(self.coming) >= self.ahead or not self._open_next():
                return None

    def _open_next(self) -> bool:
        for file in self.order:
            self.coming.append(self.open(Cursor(file)))
            return True
        return False

    def _submit(self, stream: Stream) -> bool:
        """Have the next block of a file encoded; False at its end."""
        if stream.read:
            return False
        if stream.blocks is None:
            start, keys = stream.start, self.settings.columns
            stream.blocks = blocks(stream.source, start.file, keys, self.settings.txt, start.at, start.line)
        try:
            block = next(stream.blocks, None)
        except Broken as broken:
            what = f"{broken}, though it was whole a moment ago"
            raise FileError(what, file=stream.source.path, hint="does someone write to it?") from None
        if block is None:
            stream.read, stream.blocks = True, None
            return False
        stream.pending.append((block, self.workers.encode(block)))
        return True
