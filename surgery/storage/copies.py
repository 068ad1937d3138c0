"""Copies of what lies at an address, for who maps files into memory or hands them to other programs.

    here("plan")                                        # Path("plan"): what is no address is where it is
    here("s3://bucket/plan")                            # ~/.cache/surgery/copies/KEY/plan, pulled once per version
    here("s3://bucket/tokens/a.bin", ["a.idx"])         # a file, and of some names in its folder those that are there
    here("s3://bucket/run", only=["config.yaml"])       # a folder with that file alone
    bring(["s3://bucket/tokens/a.bin", ...], names)     # several at a time; their folder is listed once

A process keeps to the version that it has seen first.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from surgery.errors import OutputError, known_as
from surgery.storage.address import Address, is_address, parse
from surgery.storage.listing import Listing, fits, folder_of_some, with_sidecars
from surgery.storage.mirror import cache, key_of
from surgery.storage.pull import Pull, Pulling, carried_out
from surgery.storage.together import together
from surgery.units import human
from surgery.writing.locking import BUSY

AT_ONCE = 8  # files
LOG = logging.getLogger(__name__)
_known: dict[tuple[Address, tuple[str, ...], tuple[str, ...]], Path] = {}


def here(path: str | os.PathLike[str], names: Sequence[str] = (), only: Sequence[str] = ("**",)) -> Path:
    """A path of this machine; of an address that of the copy; of a folder there, of what fits patterns alone.

    Raises SurgeryError.
    """
    if not is_address(path):
        return Path(path)
    return _once(parse(path), tuple(names), tuple(only))


def bring(paths: Iterable[str], names: Callable[[str], Sequence[str]]) -> None:
    """Copy those of some files that lie at addresses, with what has some `names` beside each.  Raises SurgeryError."""
    files = [parse(path) for path in paths if is_address(path)]
    folders = {folder: folder_of_some(folder, n) for folder, n in Counter(file.folder for file in files).items()}
    together(lambda one, stop: _once(one, tuple(names(one.name)), folder=folders[one.folder]), files, AT_ONCE)


def _once(
    address: Address, names: tuple[str, ...], only: tuple[str, ...] = ("**",), folder: Listing | None = None
) -> Path:
    asked = address, names, only
    if asked not in _known or not _known[asked].exists():
        _known[asked] = _copied(address, names, only, folder)
    return _known[asked]


def _copied(address: Address, names: Sequence[str], only: Sequence[str], folder: Listing | None) -> Path:
    found, url = with_sidecars(address, names, folder), str(address)
    file = found.single or found.store.address != address
    if not file:
        wanted = {name: entry for name, entry in found.entries.items() if any(fits(name, p) for p in only)}
        found = replace(found, entries=wanted)
    place = cache() / "copies" / key_of(address, found) / ("files" if file else address.name)
    _bring(Pulling(address, found, place))
    known_as(str(place), url.rpartition("/")[0] if file else url)
    return place / address.name if file else place


def _bring(plan: Pulling) -> None:
    """Pull what is not there yet, or wait until another process or thread has."""
    if plan.bytes and not plan.dst.exists():
        LOG.info("bringing %s here: %s", plan.address, human(plan.bytes))
    while not plan.dst.exists():
        try:
            carried_out(plan, Pull())
        except OutputError as error:
            if error.what == BUSY:
                time.sleep(1)
            elif not plan.dst.exists():
                error.hint = "; ".join(
                    filter(None, (error.hint, f"copies are kept in {cache()}, or where SURGERY_CACHE says"))
                )
                raise
