"""Ranges of one version of an object, for `File`.

stand_in("/cache/model.safetensors", remote_of(found, "model.safetensors"))
"""

from __future__ import annotations

import hashlib

from surgery.storage.listing import Listing
from surgery.storage.store import Entry
from surgery.tensors.elsewhere import Remote
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
