"""The order in which documents are written: that of the input, or shuffled as `dolma tokens` does it.

    for portion in portions(feed, state, settings.shuffle):
        portion.documents                       # to be written; `state` then says where to go on behind them

In dolma's order the files are shuffled, `ring` of them are read side by side, a document from each in turn, and every
`batch` documents are shuffled.  dolma itself gives another order at each run (its processes draw from a random state of
their own); here the seed alone decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgery.data.files.mapped import Array
from surgery.data.tokenizing.bad_lines import BROKEN, Bad
from surgery.data.tokenizing.encoded import Encoded, join
from surgery.data.tokenizing.feed import Feed, Piece, Stream
from surgery.data.tokenizing.job import Cursor, State, Tally
from surgery.data.tokenizing.settings import Shuffle
from surgery.tensors.hashing import splitmix64

MOST = 1 << 26  # tokens that are shuffled together, lest documents of a book each fill the memory
Lines = list[tuple[int, Bad]]  # bad lines, with the number of their file


@dataclass(frozen=True, eq=False)
class Portion:
    """Documents to write next (None: none), the bad lines that were met, and how many bytes were read."""

    documents: Encoded | None
    bad: Lines
    read: int


def order_of(count: int, shuffle: Shuffle | None) -> Sequence[int]:
    """The order of the files."""
    return range(count) if shuffle is None else [int(i) for i in permutation(count, shuffle.seed, 0)]


def permutation(count: int, seed: int, number: int) -> Array:
    """int64 [count], the `number`-th permutation of a seed: the same everywhere and for ever."""
    key = int(splitmix64(np.array([number], np.uint64), seed % 2**64)[0])
    return np.argsort(splitmix64(np.arange(count, dtype=np.uint64), key), kind="stable")


def portions(feed: Feed, state: State, shuffle: Shuffle | None) -> Iterator[Portion]:
    """All that is left to write.  `state` is brought forward before each portion is handed out."""
    return _in_order(feed, state) if shuffle is None else _shuffled(feed, state, shuffle)


def _in_order(feed: Feed, state: State) -> Iterator[Portion]:
    streams = [feed.use(feed.open(cursor)) for cursor in state.cursors]
    while stream := streams.pop() if streams else _begun(feed, state):
        while piece := feed.next(stream):
            state.cursors = [piece.stop]
            yield Portion(piece.result.documents, _tallied(piece, state), piece.stop.read - piece.cursor.read)
        state.cursors = []
        yield Portion(None, _ended(stream, state), _rest(stream))


def _begun(feed: Feed, state: State) -> Stream | None:
    stream = feed.take()
    state.opened += stream is not None
    return stream


class _Slot:
    """A file of the ring: the documents of its current block, and how many of them are taken."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.piece: Piece | None = None
        self.lengths: list[int] = []
        self.first = self.used = 0

    @property
    def cursor(self) -> Cursor:
        """Where it goes on; the documents of a block that was begun are found again by `skip`."""
        if self.piece is None:
            return self.stream.start
        if self.used == len(self.lengths):
            return self.piece.stop
        return replace(self.piece.cursor, skip=self.used)

    def hold(self, piece: Piece) -> None:
        self.piece, self.lengths = piece, piece.result.documents.lengths.tolist()
        self.first = self.used = piece.cursor.skip

    def taken(self) -> list[Encoded]:
        """What was taken of the current block since the last time."""
        if self.piece is None or self.first == self.used:
            return []
        first, self.first = self.first, self.used
        return [self.piece.result.documents.cut(first, self.used)]


class _Batch:
    """Documents that are gathered to be shuffled together, from the slots of the ring in turn."""

    def __init__(self, feed: Feed, state: State, slots: list[_Slot]) -> None:
        self.feed, self.state, self.slots = feed, state, slots
        self.parts: list[Encoded] = []
        self.bad: Lines = []
        self.count = self.tokens = self.read = 0

    def gather(self, most: int) -> None:
        turn = 0
        while self.count < most and self.tokens < MOST:
            while len(self.slots) < self.feed.ring and (stream := _begun(self.feed, self.state)):
                self.slots.append(_Slot(stream))
            if not self.slots:
                break
            turn %= len(self.slots)
            slot = self.slots[turn]
            if slot.used == len(slot.lengths) and not self._renew(slot):
                self.slots.remove(slot)
                continue
            self.tokens += slot.lengths[slot.used]
            slot.used += 1
            self.count += 1
            turn += 1
        for slot in self.slots:
            self.parts += slot.taken()

    def _renew(self, slot: _Slot) -> bool:
        """Go on to the next block of a file that has documents; False at its end."""
        self.parts += slot.taken()
        while piece := self.feed.next(slot.stream):
            self.bad += _tallied(piece, self.state) if not piece.cursor.skip else []
            self.read += piece.stop.read - piece.cursor.read
            slot.hold(piece)
            if slot.used < len(slot.lengths):
                return True
        self.bad += _ended(slot.stream, self.state)
        self.read += _rest(slot.stream)
        return False


def _shuffled(feed: Feed, state: State, shuffle: Shuffle) -> Iterator[Portion]:
    slots = [_Slot(feed.use(feed.open(cursor))) for cursor in state.cursors]
    while True:
        batch = _Batch(feed, state, slots)
        batch.gather(shuffle.batch)
        state.cursors = [slot.cursor for slot in slots]
        state.batch += 1
        documents = join(batch.parts) if batch.parts else None
        if documents is not None:  # in an order that does not depend on where blocks end, then in a random one
            order = np.lexsort((documents.lines, documents.files))
            documents = documents.take(order[permutation(len(documents), shuffle.seed, state.batch)])
        yield Portion(documents, batch.bad, batch.read)
        if not slots:
            return


def _tallied(piece: Piece, state: State) -> Lines:
    """Count a block; its bad lines."""
    result, documents, file = piece.result, piece.result.documents, piece.cursor.file
    learnt = 0 if documents.mask is None else int(documents.mask.sum())
    tally = Tally(result.lines, len(documents), len(documents.ids), learnt, result.blank, len(result.bad))
    state.add(file, tally)
    return [(file, bad) for bad in result.bad]


def _ended(stream: Stream, state: State) -> Lines:
    """A file that does not unpack counts as bad lines, all up to where it breaks off."""
    if stream.damage is None:
        return []
    line, what = stream.damage.line, stream.damage.what
    state.add(stream.start.file, Tally(lines=line, bad=line))
    return [(stream.start.file, Bad(line, BROKEN, what))]


def _rest(stream: Stream) -> int:
    """Bytes of a file that no block was made of."""
    return stream.source.size - (stream.start.read if stream.last is None else stream.last.read)
