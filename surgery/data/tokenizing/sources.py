"""The files of text that SRC arguments name: files, folders, globs, addresses and what else fsspec knows.

    sources, notes = find_sources(["docs/", "more/*.jsonl.zst", "s3://bucket/web/**/*.parquet"])
    sources[0]                                  # Source("docs/a.jsonl.gz", "jsonl", "gzip", size=4417, stamp=...)

A file's name tells its format.  In a folder, files in the order of their paths are taken whose names tell one; `notes`
name the others.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from surgery.data.extra import needs
from surgery.errors import FileError, UsageError, show, some
from surgery.storage.address import is_address
from surgery.storage.listing import matching
from surgery.storage.remote import opened, version_of
from surgery.tensors.files import File

FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".parquet": "parquet"}
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
KNOWN = ".jsonl, .json, .ndjson or .txt, each with or without .gz or .zst, and .parquet"
HIDDEN = (".", "_")  # names of files and folders that are left out begin so
OURS = ("tokens.json", "bad_lines.jsonl")  # what `tokenize` writes beside the tokens
STAMPS = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "created")  # of fsspec's systems


@dataclass(frozen=True)
class Source:
    """A file of text.  `packing` is "gzip", "zstd" or ""; `size` in bytes; `stamp` changes when the file does."""

    path: str
    format: str
    packing: str
    size: int
    stamp: str

    def open(self) -> BinaryIO:
        """The bytes as they are stored.  Raises FileError if it cannot be opened, or is another file than before."""
        if is_address(self.path):
            return opened(self.path, self.stamp)
        if is_url(self.path):
            return _remote(self.path)
        if _stamp(self.path) != self.stamp:
            raise FileError("has changed since the work on it began", file=self.path, hint="start again with --force")
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise FileError(f"cannot be opened: {error.strerror}", file=self.path) from None


def find_sources(places: Sequence[str]) -> tuple[list[Source], list[str]]:
    """All files of text, and what there is to say about the rest.

    Raises FileError if a place names nothing that can be read, UsageError if a file is named twice.
    """
    sources: list[Source] = []
    notes = []
    for place in places:
        found = list((_at_address if is_address(place) else _in_url if is_url(place) else _in_files)(place))
        known = [s for s in found if isinstance(s, Source)]
        others = [s for s in found if isinstance(s, str)]
        if not known:
            held = f"only {some(map(show, others))}" if others else "nothing"
            raise FileError(f"no text there: {held}", file=place, hint=f"names must end in {KNOWN}")
        if others:
            notes.append(f"left out of {place}, as no text: {some(map(show, others))}")
        sources += known
    names = Counter(s.path if is_url(s.path) else os.path.realpath(s.path) for s in sources)
    if twice := sorted(name for name, n in names.items() if n > 1):
        raise UsageError(
            f"named twice: {some(show(name, 300) for name in twice)}", hint="no document is to count twice"
        )
    return sources, notes


def is_url(place: str) -> bool:
    return "://" in place


def kind_of(name: str) -> tuple[str, str] | None:
    """The format and the packing that a file's name tells, or None."""
    if os.path.basename(name) in OURS:
        return None
    stem, last = os.path.splitext(name.lower())
    packing = PACKINGS.get(last, "")
    found = FORMATS.get(os.path.splitext(stem)[1] if packing else last)
    return None if found is None or (packing and found == "parquet") else (found, packing)


def _in_files(place: str) -> Iterator[Source | str]:
    """Of a path or a pattern: sources, and the names of what is none."""
    if os.path.isdir(place):
        paths: Iterable[str] = map(str, files_below(Path(place), HIDDEN))
    elif os.path.lexists(place) or not glob.has_magic(place):
        paths = [place]
        if kind_of(place) is None:
            File(place)  # it may not even exist
    else:
        paths = sorted(p for p in glob.glob(place, recursive=True) if os.path.isfile(p))
    for path in paths:
        kind = None if os.path.basename(path).startswith(HIDDEN) else kind_of(path)
        yield os.path.relpath(path, place) if kind is None else Source(path, *kind, File(path).size, _stamp(path))


def files_below(folder: Path, hidden: tuple[str, ...], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """What is no folder, in the order of the paths, also behind links; of `hidden` folders their own path alone."""
    above |= {os.path.realpath(folder)}
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", file=folder) from None
    for path in inside:
        if not path.is_dir() or path.name.startswith(hidden):
            yield path
        elif os.path.realpath(path) not in above:  # else a link leads back up
            yield from files_below(path, hidden, above)


def _stamp(path: str) -> str:
    try:
        info = os.stat(path)
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", file=path) from None
    return f"{info.st_size} {info.st_mtime_ns}"


def _at_address(place: str) -> Iterator[Source | str]:
    """Of an address or a pattern of addresses."""
    above = place if not glob.has_magic(place) else ""
    for name, entry in matching(place).items():
        below = name.removeprefix(above).strip("/").split("/") if above else [os.path.basename(name)]
        kind = None if any(part.startswith(HIDDEN) for part in below) else kind_of(name)
        yield name if kind is None else Source(name, *kind, entry.size, version_of(entry))


def _in_url(place: str) -> Iterator[Source | str]:
    needs("fsspec", f"reading {place.split('://')[0]}://")
    from fsspec.core import url_to_fs

    with _remote_errors(place):
        system, path = url_to_fs(place)
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
        elif system.isdir(path):
            found = system.find(path, detail=True)
        else:
            found = {path: system.info(path)}
        named = {str(system.unstrip_protocol(name)): info for name, info in sorted(found.items())}
    for name, info in named.items():
        if info.get("type") == "directory":
            continue
        kind = kind_of(name)
        if kind is None or not isinstance(info.get("size"), int):
            yield name
        else:
            yield Source(name, *kind, info["size"], _remote_stamp(info))


def _remote_stamp(info: Mapping[str, Any]) -> str:
    return " ".join([str(info["size"]), *(f"{key}={info[key]}" for key in STAMPS if info.get(key))])


def _remote(path: str) -> BinaryIO:
    import fsspec

    with _remote_errors(path):
        return cast(BinaryIO, fsspec.open(path, "rb").open())


@contextmanager
def _remote_errors(place: str) -> Iterator[None]:
    """Whatever a file system raises becomes a FileError: its kind is the file system's own."""
    try:
        yield
    except ImportError as error:
        raise FileError(f"cannot be opened: {error}", file=place, hint="install what it names") from None
    except Exception as error:
        what = f"cannot be opened: {type(error).__name__}: {show(str(error), 200)}"
        raise FileError(what, file=place) from None
