"""Outputs whose destination is an address: written to a folder of the cache like any other, then pushed.

    with outgoing("s3://bucket/moe", request) as place:     # ~/.cache/surgery/outgoing/KEY/moe, or a path as it is
        write(place)

The place is looked at before anything is written.  A run that was killed while it wrote goes on there; one that was
killed while it pushed writes again, and sends what is not there yet.  Where the disk is too small for all, each file of
weights is sent when it is complete (`streamed.py`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import OutputError, UsageError, known_as, some
from surgery.storage.address import BUCKETS, Address, is_address
from surgery.storage.claim import standing, taken
from surgery.storage.listing import MOST, UNFINISHED
from surgery.storage.mirror import cache, caching
from surgery.storage.push import Push, carried_out, check_no_object, destination, digest, prepare
from surgery.storage.store import open_store
from surgery.storage.streamed import Streamed
from surgery.writing.leaving import leaving
from surgery.writing.locking import locked

PLANS = "plans"  # beside the folder: what was begun to be pushed from it
Path_ = str | os.PathLike[str]
Bar = Callable[[int], AbstractContextManager[Any]]


class Request(Protocol):
    """What is asked of every command that writes."""

    @property
    def force(self) -> bool: ...


@contextmanager
def outgoing(dst: Path_, request: Request, bar: Bar = lambda total: nullcontext()) -> Iterator[Path]:
    """The folder to write; what lies in it when the block ends well is pushed.  Raises SurgeryError."""
    if not is_address(dst):
        yield Path(dst)
        return
    address = destination(dst)
    if getattr(request, "shard", None):
        raise UsageError("--shard writes to a folder of this machine", hint="surgery push, when all are written")
    if request.force and address.scheme in BUCKETS:
        raise UsageError("--force replaces nothing in a bucket", hint="choose another place, or remove what is there")
    base = cache() / "outgoing" / hashlib.sha256(str(address).encode()).hexdigest()[:20]
    with caching(base):
        base.parent.mkdir(parents=True, exist_ok=True)
    fd, lock = locked(base)
    try:
        place, plans = base / address.name, base / PLANS
        earlier = tuple(plans.read_text().split()) if plans.is_file() else ()
        _vacant(address, earlier, request.force)
        shutil.rmtree(place, ignore_errors=True)
        known_as(str(place), str(address))
        sent = Streamed(address, plans, earlier)
        with _room(), leaving(place, sent.leave) if address.scheme in BUCKETS else nullcontext():
            yield place
        with sent.standing_in(place):
            asked = Push(force=request.force, supersedes=sent.begun)
            plan = prepare(place, dst, asked, sent.etags)
            with open(plans, "a") as file:
                file.write(f"{digest(plan)}\n")
            with bar(plan.bytes_to_send) as advance:
                carried_out(plan, place, replace(asked, progress=advance))
        shutil.rmtree(base)
    finally:
        if base.exists() and os.listdir(base) == ["lock"]:  # nothing to go on with
            shutil.rmtree(base)
        os.close(lock)
        os.close(fd)


@contextmanager
def _room() -> Iterator[None]:
    """Within, whoever lacks room on the disk is told which disk it is."""
    try:
        yield
    except OutputError as error:
        if (error.hint or "").startswith("make room"):
            error.hint = f"it is written to {cache()} first: make room there, or name another disk by SURGERY_CACHE"
        raise


def _vacant(address: Address, earlier: tuple[str, ...], force: bool) -> None:
    """Raise OutputError if what is at an address is not from an earlier run of this one."""
    if address.scheme == "hf":
        from surgery.storage.hub_push import look

        look(address, [], (), force)
        return
    store = open_store(address)
    found = [e.name for e in store.list(address.key, MOST) if e.name and not e.name.endswith("/")]
    if UNFINISHED not in found and found:
        raise OutputError(f"holds other objects: {some(found)}", file=str(address),
                          hint="choose another place, or remove what is there")  # fmt: skip
    there = standing(store) if found else {}
    if there and there.get("plan") not in earlier:
        raise taken(store, there)
    check_no_object(store)
