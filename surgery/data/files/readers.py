"""Open any token file: Megatron, dolma, datatrove, plain NumPy, folders of Hugging Face `datasets`.

    files = open_tokens("corpus.idx")                                 # recognised by name and content
    files = open_tokens("part-0-00000.npy", dtype="uint32")           # dolma's have no header: say the dtype
    files = open_tokens("ids.npy", eos=0)                             # documents end with id 0, because you say so

Where a document ends comes from the index beside the ids (`.idx`, `.csv.gz`, `.ds.index`); from the end-of-text id only
on request, for texts may hold that id inside.  A dtype is never guessed: it is stated, or the index proves it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from surgery.data.files.arrow import is_dataset, open_dataset
from surgery.data.files.documents import Bounds, EndBounds, IndexBounds
from surgery.data.files.dolma_rows import read_ends
from surgery.data.files.idx import read_index
from surgery.data.files.mapped import Array, Column, Held, Mapped, mapped
from surgery.data.files.npy import is_npy, open_npy
from surgery.data.files.tokens import MASK_SUFFIX, TokenFile
from surgery.errors import ConfigError, FileError, UsageError, show
from surgery.storage.copies import here
from surgery.tensors.files import File, read_small

INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}  # dolma and datatrove know no others
SUFFIXES = (".bin", ".npy", ".ds")  # of the files that hold the ids
CHUNK = 1 << 22  # tokens looked at at once
WINDOWS, WINDOW = 16, 4096  # how many places of a file are looked at for ids beyond the vocabulary, and how far


@dataclass(frozen=True)
class Ways:
    """How to read one file where its name and content do not say.

    dtype   of ids without a header
    eos     the id that ends documents, where no index tells their ends
    mask    the file of the label mask, or the column of a dataset; "none": no mask, even if one lies beside
    ends    document ends that were found before, so that they need not be looked for again
    """

    dtype: str | None = None
    eos: int | None = None
    mask: str | None = None
    ends: Mapped | None = None


def open_tokens(
    path: str | os.PathLike[str],
    format: str = "auto",
    *,
    dtype: str | None = None,
    eos: int | None = None,
    mask: str | None = None,
    ends: Mapped | None = None,
    vocab_size: int | None = None,
) -> list[TokenFile]:
    """The token files of a path: one, or one for each batch of a dataset.  See `Ways` for the options.

    Raises FileError if a file contradicts its index, its dtype or the vocabulary (some thousand ids are looked at), and
    ConfigError if it cannot be read without more being said.
    """
    path = found_at(path)
    found = recognise(path) if format == "auto" else format
    if found not in OPENERS:
        raise UsageError(f"there is no format {format!r}", hint=f"known: auto, {', '.join(OPENERS)}")
    if dtype is not None and dtype not in INTEGERS:
        raise UsageError(f"there is no dtype {show(dtype)} of token ids", hint=f"known: {', '.join(INTEGERS)}")
    files = OPENERS[found](path, Ways(dtype, eos, mask, ends))
    for file in files:
        if dtype is not None and file.ids.dtype != np.dtype(dtype):
            raise ConfigError(f"holds {file.ids.dtype.name}, not {dtype}", file=path, hint="leave out dtype")
        check_vocabulary(file, vocab_size)
    return files


def recognise(path: Path) -> str:
    """The name of a format.  Raises ConfigError if it is none that is known, FileError if there is nothing."""
    if path.is_dir():
        if is_dataset(path):
            return "datasets"
        hint = f"name its files, for example {path.name}/*.bin"
        raise ConfigError("is no folder of `datasets`", file=path, hint=hint)
    if not path.exists():
        raise FileError("there is no such file or folder", file=path)
    if path.suffix == ".npy":
        return "npy" if is_npy(path) else "dolma"
    for suffix, name in ((".idx", "megatron"), (".bin", "megatron"), (".ds", "datatrove")):
        if path.suffix == suffix:
            return name
    hint = f"say its format: {', '.join(OPENERS)}"
    raise ConfigError("is no token file that is known by its name", file=path, hint=hint)


def sidecars(name: str) -> list[str]:
    """The names of what may lie beside a token file, for who has to bring them here."""
    stem = name.rpartition(".")[0]
    return [*(f"{stem}{end}" for end in (".bin", ".idx", ".csv.gz", MASK_SUFFIX)),
            *(f"{name}{end}" for end in (".index", ".metadata", ".loss"))]  # fmt: skip


def found_at(path: str | os.PathLike[str]) -> Path:
    """Where a token file lies; of an address, the copy of it and of what lies beside it.  Raises SurgeryError."""
    return here(path, sidecars(os.path.basename(path)))


def check_vocabulary(file: TokenFile, vocab_size: int | None) -> None:
    """Raise FileError if the dtype is too small for the vocabulary, or some id that is looked at is not in it."""
    ids = file.ids.array
    if vocab_size is not None and np.iinfo(ids.dtype).max < vocab_size - 1:
        what = f"{ids.dtype.name} cannot hold a vocabulary of {vocab_size} ids"
        raise FileError(what, file=file.path, hint="the dtype is wrong, or the file was made with another tokenizer")
    for start in np.linspace(0, max(len(ids) - WINDOW, 0), WINDOWS, dtype=np.int64):
        window = ids[start : start + WINDOW]
        low, high = int(window.min(initial=0)), int(window.max(initial=0))
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            bad = f"id {low}" if low < 0 else f"id {high}, but the vocabulary has {vocab_size} ids"
            hint = f"{file.ids.dtype.name} is the wrong dtype, or the file was made with another tokenizer"
            raise FileError(f"holds {bad}, near token {start}", file=file.path, hint=hint)


def _megatron(path: Path, ways: Ways) -> list[TokenFile]:
    if path.suffix == ".bin" and path.is_file() and not path.with_suffix(".idx").exists():
        hint = f"make one: surgery data index {path.name} --dtype NAME --eos ID"
        raise ConfigError("has no .idx beside it, which tells its dtype and its documents", file=path, hint=hint)
    index = read_index(path)
    told = Told(IndexBounds(index), index.tokens, index.dtype.name, (index.path,))
    return [_file(index.payload, "megatron", mapped(index.payload, index.dtype), told, ways)]


def _dolma(path: Path, ways: Ways) -> list[TokenFile]:
    rows = path.with_suffix(".csv.gz")
    limit = File(path).size // np.dtype(ways.dtype or "uint8").itemsize
    return [_headless(path, "dolma", _told(path, ways, rows, lambda: Held(read_ends(rows, limit))), ways)]


def _datatrove(path: Path, ways: Ways) -> list[TokenFile]:
    index, note = Path(f"{path}.index"), Path(f"{path}.metadata")
    told = _told(path, ways, index, lambda: mapped(index, "i8"))
    if note.is_file():
        size = read_small(note, 1 << 16, "metadata").split(b"\n")[0].rpartition(b"|")[2]
        if size not in (b"2", b"4"):
            raise FileError(f"says tokens of {show(size)} bytes; datatrove writes 2 or 4", file=note)
        told = replace(told, dtype=UNSIGNED[int(size)])
    return [_headless(path, "datatrove", told, ways)]


def _npy(path: Path, ways: Ways) -> list[TokenFile]:
    ids, shape = open_npy(path)
    if len(shape) != 1 or ids.dtype == bool:
        raise FileError(f"holds {show(str(shape))} {ids.dtype.name}, not one row of ids", file=path)
    return [_file(path, "npy", ids, _told(path, ways), ways)]


def _datasets(path: Path, ways: Ways) -> list[TokenFile]:
    return open_dataset(path, ways.mask)


OPENERS: Mapping[str, Callable[[Path, Ways], list[TokenFile]]] = {
    "megatron": _megatron,
    "dolma": _dolma,
    "datatrove": _datatrove,
    "npy": _npy,
    "datasets": _datasets,
}


@dataclass(frozen=True)
class Told:
    """What the `files` beside a file of ids say of it: its documents, how many tokens, their dtype."""

    bounds: Bounds | None = None
    tokens: int | None = None
    dtype: str | None = None
    files: tuple[Path, ...] = ()


def _told(path: Path, ways: Ways, own: Path | None = None, read: Callable[[], Column] | None = None) -> Told:
    """By document ends that were found before, by the format's `own` index, which `read` reads, or by an `.idx`."""
    files = (own,) if own is not None and own.is_file() else ()
    if ways.ends is not None:
        return Told(EndBounds(ways.ends), _last(ways.ends), files=files)
    if files and read is not None:
        return _told_by(files[0], read(), path)
    if path.with_suffix(".idx").is_file():
        index = read_index(path.with_suffix(".idx"), payload=path)
        return Told(IndexBounds(index), index.tokens, index.dtype.name, (index.path,))
    return Told()


def _told_by(file: Path, ends: Column, payload: Path) -> Told:
    """By a list of document ends, which proves the dtype as well: the one in which the payload has so many tokens."""
    last = 0
    for first in range(0, len(ends), CHUNK):
        chunk = ends.array[first : first + CHUNK]
        bad = np.diff(chunk, prepend=last) < 0
        if bad.any():
            what = f"document {first + int(np.argmax(bad))} ends before it begins"
            raise FileError(what, file=file, hint="it is damaged")
        last = int(chunk[-1])
    size, rest = divmod(File(payload).size, last or 1)
    proven = None if rest else UNSIGNED.get(size or 1)  # without tokens, any dtype is right
    return Told(EndBounds(ends), last, proven, (file,))


def _last(ends: Column) -> int:
    return int(ends.array[-1]) if len(ends) else 0


def _headless(path: Path, format: str, told: Told, ways: Ways) -> TokenFile:
    """A file of bare ids."""
    dtype = ways.dtype or told.dtype
    if dtype is None:
        hint = "say it, for example dtype: uint16"
        raise ConfigError("has no header, and nothing beside it tells its dtype", file=path, hint=hint)
    return _file(path, format, mapped(path, dtype), told, ways)


def _file(path: Path, format: str, ids: Mapped, told: Told, ways: Ways) -> TokenFile:
    if told.tokens not in (None, len(ids)):
        beside = told.files[0].name if told.files else "what was found before"
        what = f"has {len(ids)} tokens of {ids.dtype.name}, but {beside} ends with token {told.tokens}"
        raise FileError(what, file=path, hint="the dtype is wrong, or one of the two files is truncated")
    bounds = told.bounds
    if bounds is None and ways.eos is not None:
        bounds = EndBounds(Held(ends_by_id(ids.array, ways.eos)))
    mask = _mask(path, len(ids), ways.mask)
    return TokenFile(path, format, ids, bounds, mask, (path, *told.files, *([Path(mask.path)] if mask else [])))


def ends_by_id(ids: Array, eos: int) -> Array:
    """int64, one past each end-of-text id, and the end of the ids.  Reads all of them, a chunk at a time."""
    found = [first + 1 + np.flatnonzero(ids[first : first + CHUNK] == eos) for first in range(0, len(ids), CHUNK)]
    ends = np.concatenate([*found, np.zeros(0, np.int64)]).astype(np.int64)
    return ends if not len(ids) or (len(ends) and ends[-1] == len(ids)) else np.append(ends, len(ids))


def _mask(path: Path, tokens: int, given: str | None) -> Mapped | None:
    """The label mask that was named, or the one that lies beside a file."""
    if given == "none":
        return None
    beside = (p for p in (path.with_suffix(MASK_SUFFIX), Path(f"{path}.loss")) if p.is_file())  # .loss: datatrove's
    mask = Path(given) if given else next(beside, None)
    if mask is None:
        return None
    column = open_npy(mask)[0] if is_npy(mask) else mapped(mask, "u1")
    if column.dtype.itemsize != 1 or len(column) != tokens:
        what = f"is a label mask of {len(column)} {column.dtype.name} for {tokens} tokens"
        raise FileError(what, file=mask, hint="a mask has one byte for each token")
    return replace(column, dtype=np.dtype("u1"))
