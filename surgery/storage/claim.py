"""A prefix of a bucket for one push at a time: an object that is made only if there is none says whose it is.

    begun = claim(store, plan, files=9, size=1 << 30)   # True: one of the same files began here
    release(store)

While it is there, what lies below the prefix is not read as a checkpoint (`listing.py`).
"""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from surgery.errors import FileError, OutputError, show
from surgery.storage.listing import UNFINISHED
from surgery.storage.store import TRIES, Store

LIMIT = 1 << 16  # bytes of the object


def claim(store: Store, plan: str, files: int, size: int, supersedes: Sequence[str] = ()) -> bool:
    """Make the object, or find that of the same plan, or put it in the place of one that it `supersedes`.

    Raises OutputError if the prefix is another push's.
    """
    key, run = store.address.below(UNFINISHED), uuid.uuid4().hex
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"plan": plan, "run": run, "begun": begun, "host": platform.node(), "files": files, "bytes": size}
    text = json.dumps(record, indent=1).encode()
    for attempt in range(1, TRIES + 1):
        try:
            if store.patiently(lambda: _put(store, key, text, "create")):
                return False
        except FileError:
            if attempt == TRIES:
                raise
        if there := standing(store):
            if there.get("run") == run:  # the answer was lost, and the client has tried again
                return False
            if there.get("plan") == plan:
                return True
            if there.get("plan") in supersedes:
                return store.patiently(lambda: _put(store, key, text, "overwrite"))
            raise taken(store, there)
    raise FileError("comes and goes: another push is at work", file=store.url(key))


def _put(store: Store, key: str, text: bytes, mode: str) -> bool:
    """Write the object; False if there is one that may not be overwritten.  Raises FileError."""
    import obstore

    with store.said(key):
        try:
            obstore.put(store.raw, key, text, mode=mode, use_multipart=False)
        except obstore.exceptions.AlreadyExistsError:
            return False
    return True


def standing(store: Store) -> Mapping[str, Any]:
    """What the object says; nothing if there is none.  Raises FileError if it cannot be read."""
    key = store.address.below(UNFINISHED)
    entry = store.head(key)
    if entry is None:
        return {}
    if entry.size > LIMIT:
        raise FileError("is no record of a push", file=store.url(key))
    try:
        found = json.loads(store.fetch(key, 0, entry.size, entry)) if entry.size else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) and found else {"plan": None}


def taken(store: Store, there: Mapping[str, Any]) -> OutputError:
    """Another push has the prefix."""
    who = "".join(f" {word} {show(there[key])}" for word, key in (("on", "host"), ("at", "begun")) if there.get(key))
    return OutputError(
        f"another push, of other files, began here{who} and has not ended",
        file=str(store.address),
        hint=f"wait for it, or choose another place; if it was killed, push its folder again, or remove what is there "
        f"and, last, {UNFINISHED}",
    )


def release(store: Store) -> None:
    """Remove the object: from now on what is there is complete.  Raises FileError."""
    key = store.address.below(UNFINISHED)
    for attempt in range(1, TRIES + 1):
        try:
            return store.patiently(lambda: _delete(store, key))
        except FileError:
            if store.head(key) is None:
                return
            if attempt == TRIES:
                raise


def _delete(store: Store, key: str) -> None:
    import obstore

    with store.said(key):
        obstore.delete(store.raw, key)
