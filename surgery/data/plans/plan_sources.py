"""The sources of a plan: their files found, opened, and divided into instances.

entries = find_entries(source, root)                     # what the paths, folders and globs of a mixture name
opened = open_entries("math", entries, root, vocab_size=100_278)
instances = divide(opened, mixture)                      # cut, or packed
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from surgery.data.files.arrow import DATASET, is_dataset
from surgery.data.files.documents import EndBounds
from surgery.data.files.mapped import Array, Held, Mapped, mapped
from surgery.data.files.readers import SUFFIXES, found_at, open_tokens, recognise, sidecars
from surgery.data.files.tokens import TokenFile, TokenSource
from surgery.data.plans.mixture import Mixture, Source
from surgery.data.plans.packing import Cut, Instances, Packed, pack
from surgery.data.plans.plan_file import Entry, relative
from surgery.data.plans.turns import whole_turns
from surgery.data.tokenizing.sources import KNOWN, files_below, is_url, kind_of
from surgery.errors import ConfigError, FileError, some
from surgery.storage.address import is_address
from surgery.storage.copies import bring
from surgery.storage.listing import matching

TEXT = "text"
TABLES = ("firsts", "starts", "lengths")


def find_entries(source: Source, root: Path) -> list[Entry]:
    """The files of a source, each once, in the order of their names.  Raises ConfigError if a path names nothing."""
    found = [path for given in source.paths for path in _named(given, root, source.name)]
    same = Counter(map(identity, found))
    if twice := sorted({path for path in found if same[identity(path)] > 1}):
        raise ConfigError(
            f"{source.name} names {some(twice)} twice", hint="use multiplier or weight to repeat a source"
        )
    bring([path for path in found if path.endswith(SUFFIXES)], sidecars)
    masks = _masks(source, root, found)
    kinds = [source.format if source.format != "auto" else _kind(path) for path in found]
    return [
        Entry(path=relative(p, root), format=kind, dtype=source.dtype, eos=source.eos, mask=mask)
        for p, kind, mask in zip(found, kinds, masks, strict=True)
    ]


def _named(given: str, root: Path, name: str) -> list[str]:
    """A file, dataset or URL itself, the token files of a folder or address, or what matches a pattern.

    `x.idx` stands for `x.bin`, and of several names of one file the first counts.
    """
    if is_address(given):
        return _at_address(given, name)
    if is_url(given):
        return [given]
    path = root / os.path.expanduser(given)
    if path.is_dir() and not is_dataset(path):
        inside = list(files_below(path, (".",)))
        found = [p for p in inside if p.suffix in SUFFIXES] or [p for p in inside if kind_of(p.name)]
    else:
        found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        raise ConfigError(
            f"{name}: {given} names no file", file=root, hint="paths are relative to the mixture's folder"
        )
    payloads = (str(p.with_suffix(".bin") if p.suffix == ".idx" else p) for p in found)
    return list({identity(p): p for p in reversed(list(payloads))}.values())[::-1]


def _at_address(given: str, name: str) -> list[str]:
    """A file or dataset, the token files of a folder, else its texts, or what matches a pattern.

    Raises ConfigError if there are none.
    """
    found = list(matching(given))
    if any(os.path.basename(p) in DATASET for p in found):
        return [given]
    if len(found) > 1 and not glob.has_magic(given):
        seen = [p for p in found if "/." not in os.path.dirname(p).removeprefix(given.rstrip("/"))]
        found = [p for p in seen if p.endswith(SUFFIXES)] or [p for p in seen if kind_of(p)]
    if not found:
        raise ConfigError(f"{name}: {given} holds no token files and no texts",
                          hint=f"names must end in {', '.join(SUFFIXES)}, or in {KNOWN}")  # fmt: skip
    return list(dict.fromkeys(p.removesuffix(".idx") + ".bin" if p.endswith(".idx") else p for p in found))


def located(path: str, root: Path) -> Path:
    """Where a file of a source lies: below the root, or the copy of what is at an address."""
    return found_at(path if is_address(path) else root / path)


def identity(path: str) -> Hashable:
    """What two names of one file have in common: hard links and symbolic ones."""
    if is_url(path) or not os.path.exists(path):
        return path
    info = os.stat(path)
    return info.st_dev, info.st_ino


def _kind(path: str) -> str:
    unseen = is_url(path) and not is_address(path)  # token files are mapped, so they have to be on this machine
    return TEXT if unseen or (kind_of(path) and not os.path.isdir(path)) else recognise(found_at(path))


def _masks(source: Source, root: Path, files: Sequence[str]) -> list[str | None]:
    """The label mask of each file: "none", a column, or a path."""
    given = source.label_mask
    if given is None or given == ("none",):
        return [given and "none"] * len(files)
    if all(is_dataset(found_at(f)) for f in files):
        if len(given) != 1:
            raise ConfigError(f"{source.name}: label_mask names {len(given)} columns", hint="name one")
        return [given[0]] * len(files)
    masks = [path for pattern in given for path in _named(pattern, root, source.name)]
    if len(masks) != len(files):
        what = f"{source.name}: label_mask names {len(masks)} files for {len(files)} of tokens"
        raise ConfigError(what, file=root, hint="each file of tokens needs one, in the order of their names")
    if both := {identity(m) for m in masks} & {identity(f) for f in files}:
        raise ConfigError(f"{source.name} names {len(both)} files both as tokens and as label masks")
    return [relative(m, root) for m in masks]


def open_entries(
    name: str,
    entries: Sequence[Entry],
    root: Path,
    vocab_size: int | None,
    own: Path | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> TokenSource:
    """`own`: the plan's folder, for the document ends that it holds.  Raises what the readers raise."""
    files: list[TokenFile] = []
    bring([entry.path for entry in entries], sidecars)
    for entry in entries:
        mask = entry.mask
        if mask is not None and mask != "none" and entry.format != "datasets":
            mask = str(located(mask, root))
        ends: Mapped | None = mapped(own / entry.ends, "i8") if own and entry.ends else None
        path, dtype, eos = located(entry.path, root), entry.dtype, entry.eos
        files += open_tokens(path, entry.format, dtype=dtype, eos=eos, mask=mask, ends=ends, vocab_size=vocab_size)
        progress(stored_size(entry, root))
    return TokenSource(name, tuple(files), vocab_size)


def stored_size(entry: Entry, root: Path) -> int:
    """Bytes of the ids, for a progress bar; a folder counts as one."""
    path = located(entry.path, root)
    return path.stat().st_size if path.is_file() else 1


def check_pad(mixture: Mixture, vocab_size: int | None) -> None:
    """Raise ConfigError if instances are filled up with an id that is none."""
    if mixture.packing != "concatenate" and vocab_size is not None and mixture.pad_id >= vocab_size:
        raise ConfigError(f"pad_id {mixture.pad_id} is beyond the vocabulary of {vocab_size} ids", hint="give another")


def check_bounds(source: TokenSource, mixture: Mixture) -> None:
    """Raise ConfigError if documents are to be kept apart and a file does not tell where they end."""
    if not mixture.isolate and mixture.packing == "concatenate":
        return
    if silent := [f.path.name for f in source.files if f.bounds is None]:
        what = f"{source.name}: nothing tells where the documents of {some(silent)} end"
        hint = "index them (surgery data index), give the id that ends documents (eos: ID), or say isolate: false"
        raise ConfigError(what, hint=hint)


def divide(source: TokenSource, mixture: Mixture) -> Instances:
    """The instances of a source."""
    if mixture.packing == "concatenate":
        return Cut(source.tokens, mixture.sequence_length)
    edges = [_edges(file, int(first)) for file, first in zip(source.files, source.firsts, strict=False)]
    starts, ends = (np.concatenate([e[i] for e in edges] or [np.zeros(0, np.int64)]) for i in (0, 1))
    if mixture.long == "turn":
        ends = whole_turns(source, starts, ends, mixture.sequence_length)
    return pack(starts, ends, mixture.sequence_length, mixture.packing)


def _edges(file: TokenFile, first: int) -> tuple[Array, Array]:
    """Where the documents of a file begin and end in the stream."""
    assert file.bounds is not None
    edges = first + file.bounds.starts(np.arange(len(file.bounds) + 1))
    return edges[:-1], edges[1:]


def tables(name: str, instances: Instances) -> dict[str, Array]:
    """The arrays that a plan keeps of packed instances, by their file names."""
    if not isinstance(instances, Packed):
        return {}
    return {f"{name}.{table}.i64": getattr(instances, table).array for table in TABLES}


def stored_instances(source: TokenSource, mixture: Mixture, own: Path) -> Instances:
    """The instances as a plan keeps them.  Raises FileError if its table points outside the source."""
    if mixture.packing == "concatenate":
        return Cut(source.tokens, mixture.sequence_length)
    firsts, starts, lengths = (mapped(own / f"{source.name}.{table}.i64", "i8") for table in TABLES)
    sound = (
        len(starts) == len(lengths)
        and len(firsts) > 0
        and firsts.array[0] == 0
        and firsts.array[-1] == len(starts)
        and (np.diff(firsts.array) > 0).all()
        and (starts.array >= 0).all()
        and (lengths.array > 0).all()
        and (starts.array + lengths.array <= source.tokens).all()
        and (lengths.array <= mixture.sequence_length).all()
    )
    if not sound:
        raise FileError(
            "the table of packed instances contradicts itself", file=firsts.path, hint="make the plan again"
        )
    return Packed(firsts, starts, lengths)


def held(instances: Instances, length: int) -> int:
    """How many tokens all instances hold, without padding."""
    return int(instances.lengths.array.sum()) if isinstance(instances, Packed) else len(instances) * length


def found_ends(source: TokenSource, entries: Sequence[Entry], root: Path) -> Mapping[int, Array]:
    """Document ends that were read into memory, by the number of the entry: a plan keeps them."""
    numbers = {located(entry.path, root): i for i, entry in enumerate(entries) if entry.format != "datasets"}
    found = ((numbers[f.path], f.bounds) for f in source.files if f.path in numbers)
    return {i: b.ends.array for i, b in found if isinstance(b, EndBounds) and isinstance(b.ends, Held)}
