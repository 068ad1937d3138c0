"""What lies at an address: one listing of a bucket or repository, known names asked for one by one at a web server.

    found = listing(parse("s3://bucket/Llama-2-7b"))
    found.entries["config.json"].size

    with_sidecars(parse("s3://bucket/a.bin"), ["a.idx"])        # the file, and those of the names that lie beside it
    matching("s3://bucket/web/**/*.parquet")                    # {address: entry} of all that fits, or lies below

Names that would lead out of a folder are an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from glob import has_magic

from surgery.errors import FileError, SurgeryError, UsageError, show, some
from surgery.storage.address import BUCKETS, Address, parse
from surgery.storage.store import FEWER, PAGE, Entry, Store, open_store
from surgery.tensors.files import plain_name

MOST = 100_000  # objects of one checkpoint
UNFINISHED = ".surgery-push.json"  # lies where a push has begun and has not ended
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# what a checkpoint may consist of, for servers that list nothing
NAMES = (
    "config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin", *INDEXES,
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
    "config.yaml", "model.pt", "train.pt", "optim.pt", "optim.safetensors",
    "params.json", "checklist.chk", "consolidated.00.pth", "surgery.json", UNFINISHED,
)  # fmt: skip
INDEX_LIMIT = 64 << 20
_FILE = re.compile(r".+\.(safetensors|bin|pt|pth|json|ya?ml|txt|model|npy|npz|gguf|distcp|ckpt|idx|ds|mask|jsonl|"
                   r"ndjson|parquet|jinja|whl|gz|zst)", re.I)  # fmt: skip
_RANK = re.compile(r"consolidated\.\d\d\.pth")
PARALLEL = 8


@dataclass(frozen=True)
class Listing:
    """The files at an address by their paths below it, and the client that reads them; `single`: it is one file."""

    store: Store
    entries: Mapping[str, Entry]
    single: bool = False

    def key(self, name: str) -> str:
        """The key of a file in the store."""
        return self.store.address.key if self.single else self.store.address.below(name)


def listing(address: Address, first: bool = False) -> Listing:
    """What lies at an address; `first`: in a repository, what this process has seen there first.

    Raises FileError if nothing does, or a push there has not ended.
    """
    if address.scheme == "hf":
        from surgery.storage import hub_repo

        found = (hub_repo.first_seen if first else hub_repo.repository)(address)
    else:
        store = open_store(address)
        found = _on_server(store) if address.scheme in ("http", "https") else _in_bucket(store)
    if not found.entries:
        raise FileError("holds no files, or does not exist", file=str(address), hint=_near(address))
    if UNFINISHED in found.entries:
        hint = "wait until it has; if it was killed, push the same folder again, which ends it"
        raise FileError("is the output of a push that has not ended", file=str(address), hint=hint)
    for part in (part for name in found.entries for part in name.split("/")):
        plain_name(part, "the store", str(address))
    return found


def _near(address: Address) -> str:
    """What may have been meant by an address at which nothing lies."""
    if has_magic(address.key):
        return "patterns are for texts and tokens (surgery data, mixtures) and for inputs of recipes: name one place"
    folder, names = address.folder, set[str]()
    with suppress(SurgeryError):
        if address.scheme == "hf":
            from surgery.storage.hub_repo import first_seen

            names = set(first_seen(folder).entries)
        elif address.scheme in BUCKETS:
            names = set(open_store(folder).some(folder.key))
    if tops := sorted({name.partition("/")[0] for name in names}):
        near = get_close_matches(address.name, tops, 1)
        return f"did you mean {replace(folder, key=folder.below(near[0]))}?" if near else f"{folder} holds {some(tops)}"
    return "look at the address"


def with_sidecars(address: Address, names: Sequence[str], folder: Listing | None = None) -> Listing:
    """What lies at an address, as this process has seen it first; with a file, those of some names beside it.

    `folder`: its folder, if that was listed.  Raises FileError.
    """
    if folder is None or address.name not in folder.entries:
        found = listing(address, first=True)
        if not found.single or not names:
            return found
        if address.scheme == "hf":
            folder = listing(address.folder, first=True)
            if address.name not in folder.entries:  # it came later
                folder = listing(address.folder)
        else:
            store = open_store(address.folder)
            folder = Listing(store, {**found.entries, **_asked(store, names)})
    wanted = {address.name, *names}
    return Listing(folder.store, {name: entry for name, entry in folder.entries.items() if name in wanted})


def folder_of_some(folder: Address, files: int) -> Listing | None:
    """The folder of so many files, listed if that takes no more requests than there are files; else None."""
    if folder.scheme == "hf":
        return listing(folder, first=True)
    if files < 2 or folder.scheme not in BUCKETS:
        return None
    store = open_store(folder)
    try:
        return Listing(store, {e.name: e for e in store.list(folder.key, min(MOST, PAGE * files))})
    except FileError as error:
        if error.hint == FEWER:
            return None
        raise


def matching(place: str) -> dict[str, Entry]:
    """Of an address, or a pattern of addresses: the files that it names by their own, in the order of their names.

    Raises FileError if there are none.
    """
    parts = place.split("/")
    first = next((i for i, part in enumerate(parts) if has_magic(part)), len(parts))
    address, pattern = parse("/".join(parts[:first])), parts[first:]
    if pattern and address.scheme in ("http", "https"):
        raise UsageError(
            f"{place}: a web server lists nothing, so that no pattern finds anything", hint="name its files"
        )
    found = listing(address)
    if found.single and not pattern:
        return {str(address): next(iter(found.entries.values()))}
    names = sorted(name for name in found.entries if not pattern or fits(name, "/".join(pattern)))
    if not names:
        raise FileError("nothing there has such a name", file=place)
    return {str(replace(address, key=address.below(name))): found.entries[name] for name in names}


def fits(name: str, pattern: str) -> bool:
    """Whether a name is one of a pattern, in which ** stands for any number of folders."""
    return _fit(name.split("/"), pattern.split("/"))


def _fit(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fit(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fit(parts[1:], pattern[1:])


def folders_of(names: Iterable[str]) -> set[str]:
    """The folders that some names lie in."""
    parts = [name.split("/") for name in names]
    return {"/".join(part[:n]) for part in parts for n in range(1, len(part))}


def check_files(found: Listing) -> None:
    """Raise FileError if what is there cannot be files of a disk: an object that is a folder of others, too."""
    if both := folders_of(found.entries) & found.entries.keys():
        raise FileError(f"{some(sorted(both))}: both an object and a folder of others", file=str(found.store.address),
                        hint="name the folder in it that is wanted")  # fmt: skip


def _in_bucket(store: Store) -> Listing:
    """All objects below the prefix; if there are none, the object of that key."""
    if entries := {e.name: e for e in store.list(store.address.key, MOST) if e.name}:
        markers = folders_of(entries)  # empty objects that programs make where people see folders
        return Listing(store, {n: e for n, e in entries.items() if n not in markers or e.size})
    return Listing(store, _single(store), True)


def _single(store: Store) -> dict[str, Entry]:
    address = store.address
    entry = store.head(address.key) if address.key else None
    return {} if entry is None else {address.name: Entry(address.name, entry.size, entry.etag, entry.modified)}


def _on_server(store: Store) -> Listing:
    """One file, by its ending, or a folder: those of the known names that are there, and what an index names."""
    if _FILE.fullmatch(store.address.name):
        return Listing(store, _single(store), True)
    found = _asked(store, NAMES)
    more: list[str] = []
    for index in INDEXES:
        if index in found:
            more += _shards(store, store.address.below(index), found[index])
    if "consolidated.00.pth" in found:
        more += [f"consolidated.{i:02d}.pth" for i in range(1, 8)]
    return Listing(store, {**found, **_asked(store, more)})


def _asked(store: Store, names: Iterable[str]) -> dict[str, Entry]:
    """Those of some names that are there."""

    def ask(name: str) -> Entry | None:
        entry = store.head(store.address.below(name))
        return None if entry is None else Entry(name, entry.size, entry.etag, entry.modified)

    with ThreadPoolExecutor(PARALLEL) as pool:
        return {entry.name: entry for entry in pool.map(ask, names) if entry is not None}


def _shards(store: Store, key: str, index: Entry) -> list[str]:
    """The files that an index names.  Raises FileError."""
    url = store.url(key)
    if index.size > INDEX_LIMIT:
        raise FileError(f"index of {index.size} bytes is over the limit of {INDEX_LIMIT}", file=url)
    try:
        names = set(json.loads(store.fetch(key, 0, index.size, index))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FileError("is no index of shards", file=url) from None
    if bad := [n for n in names if not isinstance(n, str) or not re.fullmatch(r"[\w.-]{1,255}", n) or n in (".", "..")]:
        raise FileError(f"names {show(bad[0])}, which is not a plain file name", file=url)
    if len(names) > MOST:
        raise FileError(f"names more than {MOST} files", file=url)
    return sorted(names)
