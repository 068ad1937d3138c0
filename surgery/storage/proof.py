"""Whether a file is what a store's digest says, where that is one.

    agrees(Path("config.json"), entry, hub=True)        # True; FileError if a digest of the hub says otherwise

The hub tells a SHA-256 of large files, and git's SHA-1 of small ones.  ETags of S3 are MD5s where the bucket is not
encrypted with a key of its own, over parts whose size is for whoever uploaded them to choose: one that agrees proves
the file, one that does not says nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import FileError
from surgery.storage.contents import part_size
from surgery.storage.store import Entry

MIB = 1 << 20
PARTS = (5 * MIB, 8 * MIB, 16 * MIB, 50 * MIB, 64 * MIB, 100 * MIB)  # obstore's, boto3's, ours, s3fs's, and of others


def agrees(path: Path, entry: Entry, hub: bool) -> bool:
    """Whether there is a digest, and it is the file's.  Raises FileError if it is another."""
    tag = (entry.etag or "").strip('"')
    if hub:
        return _of_hub(path, entry, tag)
    if re.fullmatch(r"[0-9a-f]{32}", tag):
        return _md5(path) == tag
    if match := re.fullmatch(r"[0-9a-f]{32}-(\d{1,5})", tag):
        sizes = {part_size(entry.size), *PARTS}
        return any(_in_parts(path, n) == tag for n in sorted(sizes) if -(-entry.size // n) == int(match[1]))
    return False


def _of_hub(path: Path, entry: Entry, tag: str) -> bool:
    if len(tag) == 64:
        found = hashlib.sha256()
    elif len(tag) == 40:
        found = hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)
    else:
        return False
    for piece in _pieces(path, MIB):
        found.update(piece)
    if found.hexdigest() != tag:
        what = f"what came of {entry.name} is not what the hub's digest says"
        raise FileError(what, file=path, hint="remove the hidden folder that it is in, and pull again")
    return True


def _md5(path: Path) -> str:
    found = hashlib.md5(usedforsecurity=False)
    for piece in _pieces(path, MIB):
        found.update(piece)
    return found.hexdigest()


def _in_parts(path: Path, size: int) -> str:
    digests = [hashlib.md5(piece, usedforsecurity=False).digest() for piece in _pieces(path, size)]
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(size):
            yield piece
