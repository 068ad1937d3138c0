"""A folder that stands for an address: small files are copied, weights are read where they lie.

    folder = folder_of("s3://bucket/Llama-2-7b")        # ~/.cache/surgery/remote/KEY/Llama-2-7b
    open_checkpoint(folder)                             # a few requests a file; nothing of the weights is copied

KEY is made of the address and of all names, sizes and ETags in it: what has changed gets another folder, and what was
copied once serves again.  In place of weights lies a line of text that says where they are.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import FileError, known_as
from surgery.storage.address import Address, is_address, parse
from surgery.storage.listing import PARALLEL, Listing, check_files, listing
from surgery.storage.remote import fingerprint, remote_of
from surgery.tensors.elsewhere import POINTER, stand_in

COPIED = (".json", ".txt", ".model", ".yaml", ".yml", ".jinja", ".py", ".tiktoken", ".jsonl", ".chk", ".md")
LARGEST = 64 << 20  # bytes of a file that is copied
TOGETHER = 1 << 30
BELOW = 50  # files; of more, those that are wanted are read where they lie
FRESH = 5.0  # seconds that a listing counts: one command looks at the same place several times

_known: dict[Address, tuple[float, Path]] = {}


def folder_of(url: str | os.PathLike[str]) -> Path:
    """The folder (or file) on this machine that stands for an address.  Raises SurgeryError."""
    address = parse(url)
    when, path = _known.get(address, (-FRESH, None))
    if path is None or time.monotonic() - when > FRESH:
        path = _made(address)
    _known[address] = time.monotonic(), path
    return path


def place_of(path: str | os.PathLike[str]) -> Path:
    """A path of this machine; of an address what stands for it.  Raises SurgeryError."""
    return folder_of(path) if is_address(path) else Path(path)


def cache() -> Path:
    """Where copies are kept: $SURGERY_CACHE, else ~/.cache/surgery."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("SURGERY_CACHE") or os.path.join(base, "surgery"))


def _made(address: Address) -> Path:
    found = listing(address)
    check_files(found)
    folder = (
        cache()
        / "remote"
        / key_of(address, found)
        / (address.place.rpartition("/")[2] if found.single else address.name)
    )
    copied = _small(found)
    with caching(folder):
        for parent in {(folder / name).parent for name in found.entries}:
            parent.mkdir(parents=True, exist_ok=True)
    for name in found.entries:
        path = folder / name
        if name not in copied:
            remote = remote_of(found, name)
            if not path.exists():
                _write(path, POINTER + remote.name.encode() + b"\n")
            stand_in(str(path), remote)
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda name: _copy(found, name, folder / name), sorted(copied)))
    known_as(str(folder), str(address).rpartition("/")[0] if found.single else str(address))
    return folder / address.name if found.single else folder


def _small(found: Listing) -> set[str]:
    """The files that are copied: the small ones, but none below folders if these are many, as in a run."""
    small = [e for e in found.entries.values() if e.name.endswith(COPIED) and e.size <= LARGEST]
    if len([e for e in small if "/" in e.name]) > BELOW:
        small = [e for e in small if "/" not in e.name]
    return {e.name for e in small} if sum(e.size for e in small) <= TOGETHER else set()


def key_of(address: Address, found: Listing) -> str:
    """The name of a folder for what lies at an address now."""
    return hashlib.sha256(f"{address} {fingerprint(found.entries)}".encode()).hexdigest()[:20]


def _copy(found: Listing, name: str, path: Path) -> None:
    entry = found.entries[name]
    if path.is_file() and path.stat().st_size == entry.size:
        return
    data = found.store.fetch(found.key(name), 0, entry.size, entry) if entry.size else b""
    _write(path, bytes(data))


def _write(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all, also if several processes write it."""
    with caching(path):
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as file:
            file.write(data)
        os.replace(file.name, path)


@contextmanager
def caching(path: Path) -> Iterator[None]:
    """Within, whoever cannot write to the cache is told which folder it is.  Raises FileError."""
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot be written: {error.strerror}", file=path, hint="SURGERY_CACHE says where copies are "
                        "kept") from None  # fmt: skip
