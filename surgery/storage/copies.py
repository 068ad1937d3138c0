"""Copies of what lies at an address, for who maps files into memory or hands them to other programs.

    here("plan")                                        # Path("plan"): what is no address is where it is
    here("s3://bucket/plan")                            # ~/.cache/surgery/copies/KEY/plan, pulled once per version
    here("s3://bucket/tokens/a.bin", ["a.idx"])         # a file, and of some names in its folder those that are there

A process keeps to the version that it has seen first.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import OutputError, known_as
from surgery.storage.address import Address, is_address, parse
from surgery.storage.listing import beside, listing
from surgery.storage.mirror import cache, key_of
from surgery.storage.pull import Pull, Pulling, carried_out
from surgery.units import human
from surgery.writing.locking import BUSY

LOG = logging.getLogger(__name__)
_known: dict[tuple[Address, tuple[str, ...]], Path] = {}


def here(path: str | os.PathLike[str], names: Sequence[str] = ()) -> Path:
    """A path of this machine; of an address that of the copy.  Raises SurgeryError."""
    if not is_address(path):
        return Path(path)
    asked = parse(path), tuple(names)
    if asked not in _known or not _known[asked].exists():
        _known[asked] = _copied(*asked)
    return _known[asked]


def _copied(address: Address, names: Sequence[str]) -> Path:
    found = listing(address)
    file, url = found.single, str(address)
    if file and names:
        found = beside(address, names)
    place = cache() / "copies" / key_of(address, found) / ("files" if file else address.name)
    _bring(Pulling(address, found, place))
    known_as(str(place), url.rpartition("/")[0] if file else url)
    return place / address.name if file else place


def _bring(plan: Pulling) -> None:
    """Pull what is not there yet, or wait until another process or thread has."""
    if not plan.dst.exists():
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
