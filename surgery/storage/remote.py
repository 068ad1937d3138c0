"""Ranges of one version of an object, for `File` and for who reads a file from front to end.

stand_in("/cache/model.safetensors", remote_of(found, "model.safetensors"))
opened("s3://bucket/web/a.jsonl.gz", version)       # a binary file, to read and to seek
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO, cast

from surgery.errors import FileError
from surgery.storage.address import Address, parse
from surgery.storage.listing import Listing, listing
from surgery.storage.store import Entry, open_store
from surgery.tensors.elsewhere import BLOCK, Remote
from surgery.tensors.files import AGAIN
from surgery.tensors.stamp import Stamp


def remote_of(found: Listing, name: str) -> Remote:
    """What stands behind the path of a file.  Each request asks for the version that was listed."""
    entry, key, store = found.entries[name], found.key(name), found.store

    def fetch(start: int, stop: int) -> bytes:
        return bytes(store.fetch(key, start, stop, entry))

    def now() -> Stamp | None:
        if store.pinned:
            return stamp_of(entry)
        seen = store.head(key)
        return None if seen is None else stamp_of(seen)

    return Remote(store.url(key), stamp_of(entry), fetch, now)


def stamp_of(entry: Entry) -> Stamp:
    """What tells this version from others."""
    tag = int.from_bytes(hashlib.blake2b((entry.etag or "").encode(), digest_size=7).digest())
    when = 0 if entry.modified is None else int(entry.modified.timestamp()) * 10**9  # listings say fractions, HEAD none
    return Stamp(0, tag, entry.size, when, when)


def opened(url: str, version: str) -> BinaryIO:
    """An object as a file, read in ranges.  Raises FileError if it is not of this version (`version_of` its entry)."""
    found, name = _listed(parse(url), version)
    if version_of(found.entries[name]) != version:
        raise FileError("has changed since the work on it began", file=url, hint=AGAIN)
    return cast(BinaryIO, io.BufferedReader(_Stream(remote_of(found, name)), BLOCK))


def _listed(address: Address, version: str) -> tuple[Listing, str]:
    """A listing that has an object, and its name there; of a repository one that is known, if it has this version."""
    if address.scheme != "hf":  # its version is known, and nothing else is wanted
        store = open_store(address)
        entry = store.head(address.key)
        found = Listing(store, {} if entry is None else {address.name: replace(entry, name=address.name)}, True)
    elif (found := listing(address, first=True)).single and version_of(found.entries[address.name]) != version:
        found = listing(address)
    if not found.single or not found.entries:
        raise FileError("is no file any more", file=str(address), hint=AGAIN)
    return found, address.name


def version_of(entry: Entry) -> str:
    """Words that are others for another version of an object."""
    return f"{entry.size} {entry.etag or entry.modified}"


def fingerprint(found: Mapping[str, Entry]) -> str:
    """What tells what lies at an address now from what may lie there later: names, sizes and ETags."""
    seen = sorted((name, version_of(entry)) for name, entry in found.items())
    return hashlib.sha256(repr(seen).encode()).hexdigest()


class _Stream(io.RawIOBase):
    """An object at a place that moves on."""

    def __init__(self, remote: Remote) -> None:
        self.remote, self.at = remote, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.remote.stamp.size}[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        out = memoryview(buffer).cast("B")
        out = out[: max(0, min(len(out), self.remote.stamp.size - self.at))]
        if len(out):
            self.remote.read_into(self.at, out, "data")
        self.at += len(out)
        return len(out)
