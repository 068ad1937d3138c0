"""What a folder holds to be pushed: plain files by name, in the order in which they may be seen, with their digests.

    items = contents(Path("SmolLM2"))
    [item.name for item in items]               # model.safetensors, tokenizer.json, config.json, surgery.json
    etag_of(items[0])                           # what S3 will call it

Weights come first, then what belongs to them, then indexes, configs and trackers, without which no program takes a
folder for a checkpoint, and surgery.json last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.errors import FileError, UsageError, show
from surgery.storage.listing import MOST, UNFINISHED
from surgery.storage.published import RECORDS, published
from surgery.storage.together import Told
from surgery.tensors.files import File
from surgery.writing.replaceable import PROVENANCE, WEIGHTS, is_junk

PART = 16 << 20  # bytes of one part of an upload, unless there would be too many
PARTS = 9000  # S3 takes 10,000
INDEXES = ("*.index.json", ".metadata", "metadata.json", ".metadata.json")
CONFIGS = ("config.json", "params.json", "config.yaml", "latest", "latest_checkpointed_iteration.txt", "plan.json",
           "tokens.json")  # fmt: skip
# the later, the more a folder is taken for what it will be; what is in none of them comes second
ORDER = (WEIGHTS, (), INDEXES, CONFIGS, (PROVENANCE,))
NAME = re.compile(r"[\w.+=@,() -]{1,255}", re.A)


@dataclass(frozen=True)
class Item:
    """A file to push: its path below the folder, its place in ORDER, and where it lies (or its bytes)."""

    name: str
    rank: int
    source: File | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.size

    def read(self, start: int, stop: int) -> bytes:
        """Raises FileError if the file is another by now."""
        return self.source[start:stop] if isinstance(self.source, bytes) else self.source.read(start, stop - start)

    def parts(self) -> Iterator[bytes]:
        """Its bytes as they are uploaded."""
        step = part_size(self.size)
        for start in range(0, self.size, step):
            yield self.read(start, min(start + step, self.size))


def contents(folder: Path, made: Sequence[tuple[str, bytes]] = ()) -> list[Item]:
    """The files of a folder, and others that are `made` for it.  Raises SurgeryError for links and odd names."""
    if not folder.is_dir():
        raise UsageError(f"{show(os.fspath(folder))} is no folder", hint="push the folder that holds the files")
    names = sorted(_names(folder, ""))
    if not names:
        raise FileError("holds no files", file=folder)
    if len(names) > MOST:
        raise FileError(f"holds more than {MOST} files", file=folder)
    items = [Item(name, rank(name), _source(folder / name)) for name in names]
    return sorted([*items, *(Item(name, rank(name), data) for name, data in made)], key=lambda item: item.rank)


def _source(path: Path) -> File | bytes:
    """A file as it is; of a record what is published of it."""
    said = published(path) if path.name in RECORDS else None
    return File(path) if said is None else said


def size_of_folder(folder: str | os.PathLike[str]) -> int:
    """Bytes of its files, for a bar; 0 if it is no folder."""
    return sum(item.size for item in contents(Path(folder))) if os.path.isdir(folder) else 0


def rank(name: str) -> int:
    """The place of a file in ORDER."""
    base = name.rpartition("/")[2]
    return next((i for i in range(len(ORDER) - 1, -1, -1) if any(fnmatchcase(base, p) for p in ORDER[i])), 1)


def _names(folder: Path, above: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        name = f"{above}{entry.name}"
        if is_junk(entry.name) or name in (".cache", ".git"):  # what git and the hub's client keep for themselves
            continue
        if entry.is_symlink():
            raise FileError("is a link, and only plain files are pushed", file=folder / entry.name,
                            hint="make a copy without links: cp -rL")  # fmt: skip
        if not NAME.fullmatch(entry.name) or entry.name == UNFINISHED:
            raise FileError(f"{show(entry.name)} is no name for an object", file=folder,
                            hint="letters, digits and . _ - + = @ , ( ) are; rename it or move it away")  # fmt: skip
        if entry.is_dir():
            yield from _names(folder / entry.name, f"{name}/")
        else:
            yield name


def part_size(size: int) -> int:
    """Bytes of each part of an upload but the last."""
    mebibyte = 1 << 20
    return max(PART, -(-size // PARTS // mebibyte) * mebibyte)


def etag_of(item: Item, told: Told = lambda n: None) -> str:
    """The ETag that S3 gives what is uploaded in these parts: an MD5, or that of the parts' MD5s and their number."""
    digests = []
    for part in item.parts():
        digests.append(hashlib.md5(part, usedforsecurity=False).digest())
        told(len(part))
    if len(digests) == 1:
        return f'"{digests[0].hex()}"'
    whole = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
    return f'"{whole}-{len(digests)}"' if digests else f'"{whole}"'


def digest_of(items: Sequence[Item], etags: Sequence[str]) -> str:
    """What tells these files from others."""
    listed = sorted((item.name, item.size, etag) for item, etag in zip(items, etags, strict=True))
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
