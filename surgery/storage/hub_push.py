"""Push to the hub: large files first, which nobody sees, then one commit, on the one that was looked at.

    place = look(parse("hf://me/moe"), items, generated=("README.md",), force=False)
    commit(place, items, "Push moe", False, told)       # the SHA of the commit, in a private repository

huggingface_hub does the sending.  What it sent of large files before a kill, the hub has and does not take again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from surgery.errors import FileError, MismatchError, OutputError, UsageError, printable, some
from surgery.storage.address import Address
from surgery.storage.contents import Item
from surgery.storage.hub_repo import api, below, commit_of, said
from surgery.storage.store import Entry
from surgery.storage.together import Told
from surgery.tensors.files import File, check_unchanged

KEPT = (".gitattributes",)  # what the hub itself puts into a repository


@dataclass(frozen=True)
class Place:
    """A repository as it was looked at: its commit, None if it does not exist yet; the files `there` that are equal;
    those that a commit removes.
    """

    address: Address
    parent: str | None
    there: frozenset[str]
    removed: tuple[str, ...]


def look(address: Address, items: Sequence[Item], generated: Collection[str], force: bool) -> Place:
    """What a repository holds.  Raises OutputError for other files than those to push, without `force`.

    Files that are `generated` give way to those of the same names.
    """
    if address.revision and len(address.revision) == 40:
        raise UsageError(f"{address} is a commit, which nothing can be added to", hint="name a branch, or none")
    client = api()
    if not _exists(client, address):
        return Place(address, None, frozenset(), ())
    parent, every = commit_of(client, address)
    found = {n: e for n, e in below(every, address).items() if n not in KEPT}
    ours = {item.name: item for item in items}
    there = frozenset(n for n, e in found.items() if n in ours and (n in generated or is_equal(ours[n], e)))
    other = sorted(found.keys() - there)
    if other and not force:
        raise OutputError(f"holds other files: {some(other)}", file=str(address), hint="choose another repository or a "
                          "folder in it, or --force to replace them in the same commit")  # fmt: skip
    return Place(address, parent, there, tuple(n for n in other if n not in ours))


def _exists(client: Any, address: Address) -> bool:
    with said(address):
        return bool(client.repo_exists(address.place, repo_type=_kind(address)))


def _kind(address: Address) -> str:
    return "dataset" if address.kind == "datasets" else "model"


def is_equal(item: Item, entry: Entry, sha256: str | None = None) -> bool:
    """Whether the hub's digest is the file's: a SHA-256 of large files, git's SHA-1 of small ones."""
    if item.size != entry.size:
        return False
    if entry.etag and len(entry.etag) == 64 and sha256:
        return entry.etag == sha256
    found = hashlib.sha256()
    if not entry.etag or len(entry.etag) != 64:
        found = hashlib.sha1(b"blob %d\0" % item.size, usedforsecurity=False)
    for part in item.parts():
        found.update(part)
    return found.hexdigest() == entry.etag


def commit(place: Place, items: Sequence[Item], message: str, public: bool, told: Told) -> str:
    """Send and commit `items`, those that are not there; the SHA of the commit.  Raises SurgeryError."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    client, address, parent = api(), place.address, place.parent
    where = {"repo_id": address.place, "repo_type": _kind(address)}
    with said(address), _without_bars():
        if parent is None:
            client.create_repo(**where, private=not public, exist_ok=True)
            parent, _ = commit_of(client, address)
        adds = []
        for item in items:
            source = item.source.path if isinstance(item.source, File) else item.source
            adds.append(CommitOperationAdd(address.below(item.name), source))
            client.preupload_lfs_files(**where, additions=adds[-1:], revision=address.revision)
            told(item.size)
        check_unchanged({i.source.path: i.source.stamp for i in items if isinstance(i.source, File)})
        removed = [CommitOperationDelete(address.below(name)) for name in place.removed]
        failed = None
        try:
            with said(address):
                client.create_commit(**where, operations=[*adds, *removed], commit_message=message,
                                     revision=address.revision, parent_commit=parent)  # fmt: skip
        except FileError as error:
            failed = error
    sha256 = {i.name: a.upload_info.sha256.hex() for i, a in zip(items, adds, strict=True) if a.upload_info.is_hashed}
    return _checked(client, address, items, sha256, parent, failed)


def _checked(client: Any, address: Address, items: Sequence[Item], sha256: dict[str, str], parent: str,
             failed: FileError | None) -> str:  # fmt: skip
    """The commit that is there now, if it has the files; the answer may be all that was lost.  Raises SurgeryError."""
    sha, every = commit_of(client, address)
    found = below(every, address)
    wrong = [i.name for i in items if i.name not in found or not is_equal(i, found[i.name], sha256.get(i.name))]
    if not wrong:
        return sha
    if failed and sha != parent:
        raise OutputError(f"another commit, {sha[:10]}, was made meanwhile", file=str(address),
                          hint="look at it, then push again")  # fmt: skip
    if failed:
        raise failed
    raise MismatchError(f"{some(wrong)}: what the hub has is not what was sent", file=str(address),
                        hint="look at the repository's .gitignore and at its last commits")  # fmt: skip


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within, huggingface_hub draws no bars of its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def message_for(name: str, message: str | None) -> str:
    """The first line of a commit."""
    return message or f"Push {printable(name, 80)} with surgery"
