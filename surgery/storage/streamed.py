"""Outputs larger than the disk: weights are pushed as soon as they are complete, and read back from there.

    sent = Streamed(address, plans, earlier)
    with leaving(place, sent.leave):                # claims the place with the first file
        write(place)
    with sent.standing_in(place):                   # paths of the weights stand for what was sent
        push(place, sent.etags)                     # all else

A run that was killed begins its files anew; those that are there already and equal are not sent again.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from surgery.storage.address import Address
from surgery.storage.claim import claim
from surgery.storage.contents import Item, etag_of, rank
from surgery.storage.listing import Listing
from surgery.storage.remote import remote_of
from surgery.storage.store import Store, open_store
from surgery.storage.upload import holds, upload
from surgery.tensors import elsewhere
from surgery.tensors.files import File


class Streamed:
    """What has left for an address; `begun` are the claims of this run and of `earlier` ones, kept in a file."""

    def __init__(self, address: Address, plans: Path, earlier: Sequence[str]) -> None:
        self.address, self.plans, self.begun = address, plans, tuple(earlier)
        self.store: Store | None = None
        self.etags: dict[str, str] = {}
        self.remotes: dict[str, elsewhere.Remote] = {}

    def leave(self, name: str, path: Path) -> elsewhere.Remote:
        """Send a file, compare it with what is there then, and say where it is.  Raises SurgeryError."""
        store = self.store or self._claimed()
        key, item = self.address.below(name), Item(name, rank(name), File(path))
        etag = etag_of(item)
        entry = store.head(key)
        if entry is None or not holds(store, key, item, entry, etag):
            entry, _ = upload(store, key, item, etag, lambda n: None, threading.Event())
        self.etags[name] = entry.etag or etag
        self.remotes[name] = remote_of(Listing(store, {name: entry}), name)
        return self.remotes[name]

    def _claimed(self) -> Store:
        store, name = open_store(self.address), uuid.uuid4().hex
        with open(self.plans, "a") as file:
            file.write(f"{name}\n")
        claim(store, name, 0, 0, self.begun)
        self.begun, self.store = (*self.begun, name), store
        return store

    @contextmanager
    def standing_in(self, place: Path) -> Iterator[None]:
        """Within, the files of a folder are those that have left."""
        paths = {os.fspath(place / name): remote for name, remote in self.remotes.items()}
        for path, remote in paths.items():
            elsewhere.stand_in(path, remote)
        try:
            yield
        finally:
            for path in paths:
                elsewhere.forget(path)
