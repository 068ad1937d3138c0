"""What a token file is: format, dtype, documents, tokens, the largest id, how it begins.

    found = inspect_tokens("tokens/tokens.bin", vocabulary=vocabulary)
    found[0].longest, found[0].largest_id, found[0].begins       # 4211, 599, "Four score and seven ..."

All ids are looked at, so that one that cannot be is found: beyond the vocabulary, or of a dtype that does not fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np

from surgery.containers.text import read_json
from surgery.data.files.arrow import is_dataset
from surgery.data.files.documents import Bounds
from surgery.data.files.mapped import Array
from surgery.data.files.readers import SUFFIXES, found_at, open_tokens, sidecars
from surgery.data.files.tokens import TokenFile
from surgery.data.tokenizing.tokenize import NOTE
from surgery.data.tokenizing.vocabulary import Vocabulary
from surgery.errors import FileError, show, shown
from surgery.storage.address import is_address
from surgery.storage.copies import bring
from surgery.storage.listing import matching

CHUNK = 1 << 22  # tokens or documents looked at at once
BEGINNING = 64  # tokens that are shown
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Inspection:
    """Of one file.  What nothing tells is None; lengths are in tokens.

    begins   the text of the first tokens, given a tokenizer        learnt   tokens that the label mask keeps
    """

    path: str
    format: str
    dtype: str
    bytes: int
    tokens: int
    documents: int | None
    empty: int | None
    shortest: int | None
    longest: int | None
    smallest_id: int | None
    largest_id: int | None
    mask: str | None
    learnt: int | None
    begins: str | None
    first_ids: tuple[int, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def token_files(place: str | os.PathLike[str]) -> list[Path]:
    """The token files of a path: itself, or all in a folder or of a pattern of addresses, in the order of their names.

    Raises FileError if there are none.
    """
    if is_address(place) and has_magic(os.fspath(place)):
        names = [name for name in matching(os.fspath(place)) if name.endswith(SUFFIXES)]
        bring(names, sidecars)
        return [found_at(name) for name in names]
    path = found_at(place)
    if not path.is_dir() or is_dataset(path):
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise FileError("holds no token files", file=path, hint="they end in .bin, .npy or .ds")
    return found


def inspect_tokens(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    dtype: str | None = None,
    eos: int | None = None,
    vocabulary: Vocabulary | None = None,
    vocab_size: int | None = None,
    progress: Progress = lambda size: None,
) -> list[Inspection]:
    """Describe a file, or each of a folder; `format`, `dtype` and `eos` as `readers.open_tokens` takes them.

    progress: is told how many bytes of ids were looked at.  Raises FileError on ids beyond the vocabulary and on what
    contradicts itself, ConfigError if a file cannot be read without more being said.
    """
    size = vocab_size or (vocabulary.size if vocabulary else None)
    found = []
    for name in token_files(path):
        for file in open_tokens(name, format, dtype=dtype, eos=eos, vocab_size=size):
            found.append(_inspect(file, size, vocabulary, progress))
    return found


def _inspect(file: TokenFile, size: int | None, vocabulary: Vocabulary | None, progress: Progress) -> Inspection:
    ids = file.ids.array
    low, high, zeros = _extremes(file, size, progress)
    lengths = (None, None, None) if file.bounds is None else _lengths(file.bounds)
    first = tuple(int(i) for i in ids[:BEGINNING])
    return Inspection(
        path=shown(file.path),
        format=file.format,
        dtype=ids.dtype.name,
        bytes=len(ids) * ids.dtype.itemsize,
        tokens=len(ids),
        documents=None if file.bounds is None else len(file.bounds),
        empty=lengths[0],
        shortest=lengths[1],
        longest=lengths[2],
        smallest_id=low,
        largest_id=high,
        mask=None if file.mask is None else shown(getattr(file.mask, "path", file.path)),
        learnt=None if file.mask is None else _learnt(file),
        begins=vocabulary.tokenizer.decode(list(first), skip_special_tokens=False) if vocabulary else None,
        first_ids=first,
        notes=tuple(_notes(file, zeros, vocabulary)),
    )


def _extremes(file: TokenFile, size: int | None, progress: Progress) -> tuple[int | None, int | None, bool]:
    """The smallest and the largest id, and whether every second one is zero.

    Raises FileError at the first that is negative or not below `size`.
    """
    ids, low, high, zeros = file.ids.array, None, None, len(file.ids) > 1
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        a, b = int(chunk.min()), int(chunk.max())
        if a < 0 or (size is not None and b >= size):
            at = int(np.argmax((chunk < 0) | (chunk >= size if size is not None else False)))
            limit = f", but the vocabulary has {size} ids" if size is not None and chunk[at] >= 0 else ""
            hint = f"{ids.dtype.name} is the wrong dtype, or the file was made with another tokenizer"
            raise FileError(f"token {start + at} is {chunk[at]}{limit}", file=file.path, hint=hint)
        low, high = min(a, a if low is None else low), max(b, b if high is None else high)
        zeros = zeros and not chunk[1::2].any()  # chunks are of even length
        progress(chunk.nbytes)
    return low, high, zeros


def _lengths(bounds: Bounds) -> tuple[int, int | None, int | None]:
    """Empty documents, and the shortest and longest of all."""
    empty, low, high = 0, None, None
    for lengths in lengths_of(bounds):
        empty += int((lengths == 0).sum())
        a, b = int(lengths.min()), int(lengths.max())
        low, high = min(a, a if low is None else low), max(b, b if high is None else high)
    return empty, low, high


def lengths_of(bounds: Bounds) -> Iterator[Array]:
    """int64, the lengths of the documents in tokens, in chunks."""
    for first in range(0, len(bounds), CHUNK):
        yield np.diff(bounds.starts(np.arange(first, min(first + CHUNK, len(bounds)) + 1)))


def _learnt(file: TokenFile) -> int:
    assert file.mask is not None
    mask, total = file.mask.array, 0
    for start in range(0, len(mask), CHUNK):
        chunk = mask[start : start + CHUNK]
        if chunk.max(initial=0) > 1:
            at = start + int(np.argmax(chunk > 1))
            what = f"byte {at} is {mask[at]}: a label mask holds zeros and ones"
            raise FileError(what, file=getattr(file.mask, "path", file.path))
        total += int(chunk.sum(dtype=np.int64))
    return total


def _notes(file: TokenFile, zeros: bool, vocabulary: Vocabulary | None) -> list[str]:
    """What looks wrong but need not be."""
    notes, width = [], file.ids.array.dtype.itemsize
    if zeros and width < 8 and file.ids.array.any():
        notes.append(f"every second id is 0: is it uint{16 * width}, not {file.ids.array.dtype.name}?")
    if file.bounds is None:
        notes.append("nothing tells where documents end; with --eos, an id does")
    note = file.path.parent / NOTE
    if vocabulary and note.is_file():
        said = read_json(note, NOTE)
        made = said.get("tokenizer") if isinstance(said, dict) else None
        if isinstance(made, dict) and made.get("sha256") != vocabulary.sha256:
            notes.append(f"made with another tokenizer, {show(made.get('name'))}")
    return notes
