"""Pull what lies at an address into a folder: in parallel ranges, resumed after a kill, and there whole or not at all.

    pull("s3://bucket/moe", "moe").files                    # 7

Everything goes into a hidden folder beside the destination first.  Each range is of the version that was listed; what
an earlier run has is kept if its digest still says so.  Other files of the destination are left alone.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import OutputError, UsageError, some
from surgery.settings import Checked, setting, taking
from surgery.storage.address import Address, is_address, parse
from surgery.storage.contents import rank
from surgery.storage.landing import Landing, landing
from surgery.storage.listing import Listing, check_files, listing
from surgery.storage.proof import agrees
from surgery.storage.together import Told, from_threads, together
from surgery.units import human
from surgery.writing.sink import os_errors

RANGE = 16 << 20  # bytes of one request
REQUESTS = 8  # at a time
Path_ = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Pull(Checked):
    """How it is pulled.  `progress` is told numbers of bytes."""

    force: bool = setting(False, "Replace files of the same names; others are left alone.")
    progress: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Pulling:
    """What a pull would fetch."""

    address: Address
    found: Listing
    dst: Path

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.found.entries.values())


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    resumed_bytes   of those, had by an earlier run
    checked         files whose digest the store told; all others were compared by size and version alone
    """

    address: str
    output: str
    files: int
    bytes: int
    resumed_bytes: int
    checked: int
    seconds: float


@taking(Pull)
def pull(src: Path_, dst: Path_, request: Pull) -> Pulled:
    """Pull what lies at an address into a folder; every keyword is a flag of `surgery pull`.

    surgery.pull("hf://HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M")

    Raises SurgeryError; a pull that was killed is gone on with by the same call.
    """
    return carried_out(prepare(src, dst), request)


def prepare(src: Path_, dst: Path_) -> Pulling:
    """Look at what is there; nothing is written.  Raises SurgeryError if it cannot be pulled."""
    if not is_address(src) or is_address(dst):
        raise UsageError("surgery pull takes an address and a folder of this machine",
                         hint="surgery pull s3://BUCKET/PREFIX FOLDER")  # fmt: skip
    address, place = parse(src), Path(os.path.abspath(dst))
    found = listing(address)
    if os.path.lexists(place) and not place.is_dir():
        raise OutputError("is no folder", file=dst, hint="choose another destination")
    return Pulling(address, found, place)


def carried_out(plan: Pulling, request: Pull) -> Pulled:
    """Pull what `prepare` has looked at."""
    check_files(plan.found)
    began, told = time.monotonic(), request.progress or (lambda n: None)
    sizes = {name: (entry.size, entry.etag) for name, entry in plan.found.entries.items()}
    with os_errors(plan.dst), landing(plan.dst, str(plan.address), sizes) as place:
        _refuse(plan, place, request.force)
        resumed = place.had()
        told(resumed)
        if not place.complete:
            _room(plan, place, resumed)
            _fetched(plan, place, told)
        checked = sum([agrees(place.path(name), plan.found.entries[name], plan.address.scheme == "hf")
                       for name in sizes if place.path(name).exists()])  # fmt: skip
        place.publish(sorted(sizes, key=rank), request.force)
    return Pulled(str(plan.address), os.fspath(plan.dst), len(sizes), plan.bytes, resumed, checked,
                  time.monotonic() - began)  # fmt: skip


def _refuse(plan: Pulling, place: Landing, force: bool) -> None:
    """Raise OutputError for files that are there already."""
    taken = [n for n in plan.found.entries if os.path.lexists(plan.dst / n) and not place.published(n)]
    if taken and not force:
        raise OutputError(f"has {some(taken)} already", file=plan.dst,
                          hint="choose another destination, or --force to replace them")  # fmt: skip


def _room(plan: Pulling, place: Landing, resumed: int) -> None:
    """Raise OutputError if the disk has not the room."""
    free, need = shutil.disk_usage(place.hidden).free, plan.bytes - resumed
    if need > free:
        raise OutputError(f"{human(need)} are to come and {human(free)} are free", file=plan.dst,
                          hint="make room on the disk")  # fmt: skip


def _fetched(plan: Pulling, place: Landing, told: Told) -> None:
    """Fetch the ranges that are not there yet; if one fails, the others end with the range that they are at."""
    store, found, advance = plan.found.store, plan.found, from_threads(told)

    def one(piece: tuple[str, int, int], stop: threading.Event) -> None:
        name, start, end = piece
        place.write(name, start, bytes(store.fetch(found.key(name), start, end, found.entries[name])))
        advance(end - start)

    together(one, place.missing(RANGE), REQUESTS)
    place.finish()
