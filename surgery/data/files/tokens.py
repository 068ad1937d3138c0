"""A source of tokens: files one after the other as one long stream, with its documents and its label mask.

    source = TokenSource("math", files)                 # `readers.open_source` finds and checks the files
    source.tokens, source.documents
    source.windows(np.array([0, 4096]), 4096)           # int64 [2, 4096], from anywhere in the stream
    source.label_mask(np.array([0, 4096]), 4096)        # bool [2, 4096], or None: every token is a label
    source.starts_within(np.array([0, 4096]), 4096)     # where documents begin inside these windows

A window may span files.  Windows that lie inside one are gathered at once, by one call of NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from surgery.data.files.documents import Bounds, document_at, starts_within
from surgery.data.files.mapped import Array, Column
from surgery.errors import FileError

LARGEST = 1 << 63  # ids become int64
MASK_SUFFIX = ".mask"  # corpus.bin -> corpus.mask: a byte for each token, 1 where it is to be learnt


@dataclass(frozen=True, eq=False)
class TokenFile:
    """One file of token ids (or one batch of a table of them).

    ids      [tokens], of any integer dtype
    bounds   of its documents; None if nothing tells them
    mask     uint8 or bool [tokens], 1 where the token is to be learnt; None: everywhere
    files    every file that the content depends on: payload, index, mask
    """

    path: Path
    format: str
    ids: Column
    bounds: Bounds | None
    mask: Column | None
    files: tuple[Path, ...]

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Passage:
    """Where tokens come from: `document` of a file (None: unknown), and the tokens [start, stop) of that file."""

    path: Path
    document: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class _Column:
    """What of a file is read, and below which number all of it must be."""

    read: Callable[[TokenFile], Column | None]
    limit: int
    known: str = ""

    def check(self, values: Array, starts: Array, file: TokenFile) -> None:
        """Raise FileError if a value [n, length], read from these places, cannot be."""
        low, high = int(values.min()), int(values.max())
        if low >= 0 and high < self.limit:
            return
        row, column = np.argwhere((values < 0) | (values >= self.limit))[0]
        what = f"token {starts[row] + column} is {values[row, column]}"
        if self.read(file) is file.mask:
            raise FileError(f"the mask of {what}, neither 0 nor 1", file=getattr(file.mask, "path", file.path))
        hint = "the dtype is wrong, or the file was made with another tokenizer"
        raise FileError(what + self.known, file=file.path, hint=hint)


@dataclass(frozen=True, eq=False)
class TokenSource:
    """Files as one stream.  `vocab_size`: ids from there on are refused when they are read; None: not checked."""

    name: str
    files: tuple[TokenFile, ...]
    vocab_size: int | None = None

    @cached_property
    def firsts(self) -> Array:
        """int64 [files + 1], the first token of each file in the stream, and the end."""
        return np.cumsum([0, *(f.tokens for f in self.files)], dtype=np.int64)

    @property
    def tokens(self) -> int:
        return int(self.firsts[-1])

    @property
    def documents(self) -> int | None:
        """How many documents there are; None if some file does not tell."""
        counts = [len(f.bounds) for f in self.files if f.bounds is not None]
        return sum(counts) if len(counts) == len(self.files) else None

    @property
    def masked(self) -> bool:
        return any(f.mask is not None for f in self.files)

    def windows(self, starts: Array, length: int, out: Array | None = None, rows: Array | None = None) -> Array:
        """int64 [n, length], the tokens from each start on; put into the `rows` [n] of `out`, if these are given.

        Raises FileError on an id beyond the vocabulary.
        """
        out = np.empty((len(starts), length), np.int64) if out is None else out
        known = "" if self.vocab_size is None else f", but the vocabulary has {self.vocab_size} ids"
        self._gather(_Column(lambda file: file.ids, self.vocab_size or LARGEST, known), starts, out, rows)
        return out

    def label_mask(self, starts: Array, length: int) -> Array | None:
        """bool [n, length]; None if no file has a mask.  Raises FileError if a mask holds other bytes than 0 and 1."""
        if not self.masked:
            return None
        out = np.ones((len(starts), length), np.uint8)
        self._gather(_Column(lambda file: file.mask, 2), starts, out, None)
        return out.view(bool)

    def starts_within(self, starts: Array, length: int) -> tuple[Array, Array]:
        """(window, offset) of every place inside these windows where a document, or a file, begins."""
        rows, offsets = [], []
        for number, at in self._by_file(starts):
            file, inside = self.files[number], starts[at] - self.firsts[number]
            size = int(self.firsts[number + 1] - self.firsts[number])
            whole = inside + length <= size
            if file.bounds is not None:
                found, where = starts_within(file.bounds, inside[whole], length)
                rows.append(at[whole][found])
                offsets.append(where)
            for row in at[~whole]:
                where = self._starts_across(int(starts[row]), length)
                rows.append(np.full(len(where), row))
                offsets.append(where)
        return (np.concatenate(rows), np.concatenate(offsets)) if rows else (np.zeros(0, int), np.zeros(0, int))

    def passages(self, start: int, length: int) -> list[Passage]:
        """What `length` tokens from `start` on are made of, document by document."""
        found = []
        for number, begin, stop in self._pieces(start, length):
            file = self.files[number]
            if file.bounds is None:
                found.append(Passage(file.path, None, begin, stop))
                continue
            cuts = [begin, *(begin + starts_within(file.bounds, np.array([begin]), stop - begin)[1]), stop]
            numbers = document_at(file.bounds, np.array(cuts[:-1]))
            found += [
                Passage(file.path, int(d), int(a), int(b)) for d, a, b in zip(numbers, cuts, cuts[1:], strict=False)
            ]
        return found

    def _gather(self, column: _Column, starts: Array, out: Array, rows: Array | None) -> None:
        """Fill rows of out [rows, length] from a column of the files; what has none is left as it is."""
        length, rows = out.shape[1], np.arange(len(starts)) if rows is None else rows
        for number, at in self._by_file(starts):
            data = column.read(self.files[number])
            inside = starts[at] - self.firsts[number]
            whole = inside + length <= self.files[number].tokens
            if data is not None and whole.any():
                chosen = sliding_window_view(data.array, length)[inside[whole]]
                column.check(chosen, inside[whole], self.files[number])
                out[rows[at[whole]]] = chosen
            for i in at[~whole]:
                filled = 0
                for piece, begin, stop in self._pieces(int(starts[i]), length):
                    part = column.read(self.files[piece])
                    if part is not None:
                        column.check(part.array[None, begin:stop], np.array([begin]), self.files[piece])
                        out[rows[i], filled : filled + stop - begin] = part.array[begin:stop]
                    filled += stop - begin

    def _by_file(self, starts: Array) -> list[tuple[int, Array]]:
        """(file, which of the starts lie in it)."""
        if len(self.files) == 1:
            return [(0, np.arange(len(starts)))]
        numbers = np.searchsorted(self.firsts, starts, side="right") - 1
        return [(int(n), np.flatnonzero(numbers == n)) for n in np.unique(numbers)]

    def _pieces(self, start: int, length: int) -> list[tuple[int, int, int]]:
        """(file, first token in it, last + 1) of a window; its files are not empty."""
        assert 0 <= start and start + length <= self.tokens, (start, length, self.tokens)
        first = int(np.searchsorted(self.firsts, start, side="right")) - 1
        last = int(np.searchsorted(self.firsts, start + length, side="left"))
        ends = [(n, int(self.firsts[n]), int(self.firsts[n + 1])) for n in range(first, last)]
        return [(n, max(start, a) - a, min(start + length, b) - a) for n, a, b in ends if b > a]

    def _starts_across(self, start: int, length: int) -> Array:
        """Where documents and files begin in a window that spans files; its front is left out."""
        found: list[int] = []
        filled = 0
        for number, begin, stop in self._pieces(start, length):
            bounds = self.files[number].bounds
            inner = [] if bounds is None else starts_within(bounds, np.array([begin]), stop - begin)[1].tolist()
            found += [filled] * (filled > 0) + [filled + at for at in inner]
            filled += stop - begin
        return np.array(found, np.int64)
