"""One file becomes one object, which is compared with it.

    upload(store, "model/config.json", item, etag, told, stop)      # the object as it is there

An object of several parts (`multipart.py`) appears when all of them are there.  Its ETag says that it is the file's
bytes where the store computes ETags as S3 does; elsewhere it is read back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from surgery.errors import FileError
from surgery.storage import multipart
from surgery.storage.contents import Item, part_size
from surgery.storage.refusals import Busy, Refused
from surgery.storage.store import TRIES, Entry, Store
from surgery.storage.together import Stopped, Told
from surgery.tensors.files import AGAIN

READ_BACK = 8 << 20  # bytes of one request


def upload(store: Store, key: str, item: Item, etag: str, told: Told, stop: threading.Event) -> tuple[Entry, bool]:
    """The object, and whether it had to be read back to compare it.  Raises SurgeryError."""
    sent = 0

    def advance(n: int) -> None:
        nonlocal sent
        sent += n
        told(n)

    def put() -> None:
        advance(-sent)
        _put(store, key, item, advance, stop)

    for attempt in range(1, TRIES + 1):
        failed = None
        try:
            store.patiently(put)
        except FileError as error:
            if error.hint == AGAIN or isinstance(error, (Refused, Busy)):
                raise
            failed = error  # the answer may be all that was lost
        entry = store.head(key)
        if entry is not None and holds(store, key, item, entry, etag):
            return entry, entry.etag != etag
        if failed and attempt == TRIES:
            raise failed
    raise FileError("is not what was sent", file=store.url(key), hint="look at the store and the network")


def holds(store: Store, key: str, item: Item, entry: Entry, *etags: str | None) -> bool:
    """Whether an object is a file: by one of the ETags that the file is known to have, else by its bytes, read back."""
    if entry.size != item.size:
        return False
    return (entry.etag is not None and entry.etag in etags) or _same_bytes(store, key, item, entry)


def _put(store: Store, key: str, item: Item, told: Told, stop: threading.Event) -> None:
    import obstore

    if item.size > part_size(item.size) and store.address.scheme in multipart.LISTED:
        return multipart.send(store, key, item, told, stop)

    def parts() -> Iterator[bytes]:
        for part in item.parts():
            if stop.is_set():
                raise Stopped("stopped")
            yield part
            told(len(part))

    with store.said(key):
        if item.size <= part_size(item.size):
            obstore.put(store.raw, key, b"".join(parts()), use_multipart=False)
        else:
            obstore.put(store.raw, key, parts(), use_multipart=True, chunk_size=part_size(item.size),
                        max_concurrency=multipart.TOGETHER)  # fmt: skip


def _same_bytes(store: Store, key: str, item: Item, entry: Entry) -> bool:
    """Whether what is there is what was sent, byte by byte."""
    for start in range(0, item.size, READ_BACK):
        end = min(start + READ_BACK, item.size)
        if store.fetch(key, start, end, entry) != item.read(start, end):
            return False
    return True
