"""Plan a run: which instances of which sources, in which order, before anything is trained.

    draft = draft_plan("mix.yaml")              # opens the sources and apportions: what `surgery data plan` shows
    for row in draft.sources:
        print(row.name, row.have, row.take)
    write_plan(draft, "plan")                   # the order, on disk; the folder appears whole or not at all
    plan = open_plan("plan")                    # refuses if the data are not what they were
    plan.order                                  # uint64 [instances], a memory map

Token counts come from the indexes.  `fingerprint` of a plan is what a checkpoint should keep: `plan.check(saved)` names
what changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgery.data.amounts import Amount, amounts
from surgery.data.fingerprint import check_same, digest_of, sampled
from surgery.data.mapped import Array, Mapped, mapped
from surgery.data.mixture import Mixture, read_mixture
from surgery.data.order import Taken, make_order, split
from surgery.data.packing import Instances
from surgery.data.plan_file import NAME, ORDER, Entry, PlanFile, PlannedSource, little, plan_bytes, read_plan_file
from surgery.data.plan_sources import (
    check_bounds,
    check_pad,
    divide,
    filled,
    find_entries,
    found_ends,
    identity,
    open_entries,
    stored_instances,
    stored_size,
    tables,
)
from surgery.data.text_cache import load_tokenizer, tokenized
from surgery.data.tokens import TokenSource
from surgery.errors import FileError
from surgery.writing.folder import write_folder

HEADLESS = ("dolma", "datatrove")
SETTINGS = ("sequence_length", "packing", "isolate", "pad_id", "seed", "sample_seed")
CHUNK = 1 << 20
Begin = Callable[[str, int | None], Callable[[int], None]]  # what is done, bytes -> to be told of bytes


@dataclass(frozen=True, eq=False)
class Opened:
    """A source that is open and divided."""

    entries: tuple[Entry, ...]
    tokens: TokenSource
    instances: Instances


@dataclass(frozen=True, eq=False)
class Draft:
    """A plan that is not written yet: all but the order."""

    root: Path
    mixture: Mixture
    vocab_size: int | None
    tokenizer: str | None  # its SHA-256
    opened: tuple[Opened, ...]
    sources: tuple[PlannedSource, ...]
    notes: tuple[str, ...]

    @property
    def instances(self) -> int:
        return sum(s.take for s in self.sources)


def draft_plan(
    path: str | os.PathLike[str],
    *,
    seed: int | None = None,
    rows_per_step: int | None = None,
    strict: bool = False,
    cache: Path | None = None,
    begin: Begin = lambda what, total: lambda n: None,
) -> Draft:
    """Open the sources of a mixture and apportion.

    seed, rows_per_step, strict  in place of what the file says
    cache                        where text is tokenized to
    begin                        makes a progress bar
    Raises ConfigError if the mixture cannot be, FileError if a file is broken.
    """
    given = {"seed": seed, "rows_per_step": rows_per_step, "strict": strict or None}
    mixture = read_mixture(path).model_copy(update={k: v for k, v in given.items() if v is not None})
    root = Path(os.path.abspath(path)).parent
    vocabulary = load_tokenizer(mixture, root)
    size = mixture.vocab_size or (vocabulary.size if vocabulary else None)
    check_pad(mixture, size)
    opened = []
    for source in mixture.sources:
        entries = tokenized(find_entries(source, root), source, root, vocabulary, cache, begin)
        advance = begin(f"open {source.name}", sum(stored_size(e, root) for e in entries))
        tokens = open_entries(source.name, entries, root, size, progress=advance)
        check_bounds(tokens, mixture)
        opened.append(Opened(tuple(entries), tokens, divide(tokens, mixture)))
    given_amounts, notes = amounts(mixture, {o.tokens.name: len(o.instances) for o in opened})
    sources = tuple(_planned(o, a, mixture) for o, a in zip(opened, given_amounts, strict=True))
    notes += [*_shared_files(opened), *(note for o in opened for note in _packing_notes(o, mixture))]
    sha = vocabulary.sha256 if vocabulary else None
    return Draft(root, mixture, size, sha, tuple(opened), sources, tuple(notes))


def _planned(opened: Opened, amount: Amount, mixture: Mixture) -> PlannedSource:
    return PlannedSource(
        name=amount.name,
        entries=opened.entries,
        tokens=opened.tokens.tokens,
        documents=opened.tokens.documents,
        masked=opened.tokens.masked,
        heldout=amount.heldout,
        have=amount.have,
        take=amount.take,
        asked=amount.asked,
        filled=filled(opened.instances, mixture.sequence_length),
    )


def _shared_files(opened: Sequence[Opened]) -> list[str]:
    owners: dict[object, dict[str, str]] = {}
    for o in opened:
        for file in o.tokens.files:
            owners.setdefault(identity(str(file.path)), {})[o.tokens.name] = file.path.name
    shared = [names for names in owners.values() if len(names) > 1]
    return [
        f"{next(iter(names.values()))} is in {', '.join(names)}: what one holds out the others may train on"
        for names in shared
    ]


def _packing_notes(opened: Opened, mixture: Mixture) -> list[str]:
    name, length = opened.tokens.name, mixture.sequence_length
    notes = []
    share = filled(opened.instances, length)
    if mixture.packing == "document" and (cut := opened.tokens.tokens - round(share * length * len(opened.instances))):
        notes.append(f"{name}: documents longer than {length:,} tokens are cut off; {cut:,} tokens are lost")
    if share < 0.9:
        notes.append(f"{name}: {1 - share:.0%} of its instances is padding, which counts towards the budget")
    return notes


def write_plan(draft: Draft, dst: str | os.PathLike[str], *, force: bool = False) -> Plan:
    """Fix the order and write the folder.  Raises OutputError if `dst` holds something and not `force`."""
    write_folder(dst, _files(draft), force)
    return open_plan(dst)


def _files(draft: Draft) -> Iterator[tuple[str, bytes | memoryview]]:
    """Names and contents; plan.json, which lists the others, comes last."""
    sources, digests = [], {}
    for opened, source in zip(draft.opened, draft.sources, strict=True):
        ends = found_ends(opened.tokens, opened.entries, draft.root)
        names = {i: f"{source.name}.{i}.ends.i64" for i in ends}
        dtypes = {f.path: f.ids.dtype.name for f in opened.tokens.files if f.format in HEADLESS}
        entries = tuple(
            e.model_copy(update={"ends": names.get(i), "dtype": dtypes.get(draft.root / e.path, e.dtype)})
            for i, e in enumerate(source.entries)
        )
        sources.append(source.model_copy(update={"entries": entries}))
        arrays = {names[i]: array for i, array in ends.items()} | tables(source.name, opened.instances)
        for name, array in arrays.items():
            digests[name] = hashlib.sha256(data := little(array)).hexdigest()
            yield name, data
    taken = [Taken(s.name, s.have, s.heldout, s.take) for s in sources]
    data = little(make_order(taken, draft.mixture.seed, draft.mixture.sample_seed))
    digests[ORDER] = hashlib.sha256(data).hexdigest()
    yield ORDER, data
    plan = PlanFile(
        root=str(draft.root),
        mixture=draft.mixture,
        vocab_size=draft.vocab_size,
        sources=tuple(sources),
        notes=draft.notes,
        fingerprint=_fingerprint(draft, digests[ORDER]),
        files=digests,
    )
    yield NAME, plan_bytes(plan)


def _fingerprint(draft: Draft, order: str) -> dict[str, Any]:
    """All that a run must find as it was."""
    mixture = draft.mixture
    settings = {key: getattr(mixture, key) for key in SETTINGS}
    sources = {
        s.name: {"instances": s.have, "held out": s.heldout, "taken": s.take, "files": facts_of(o.tokens)}
        for o, s in zip(draft.opened, draft.sources, strict=True)
    }
    return {**settings, "tokenizer": draft.tokenizer, "order": order, "sources": sources}


def facts_of(source: TokenSource) -> dict[str, Any]:
    """Of the files of a source: what they hold, and a sample of their bytes and of those beside them."""
    found: dict[Path, dict[str, Any]] = {}
    for file in source.files:
        if file.path not in found:
            beside = {path.name: sampled(path) for path in file.files[1:]}
            found[file.path] = {**sampled(file.path), "dtype": file.ids.dtype.name, "tokens": 0, **beside}
        found[file.path]["tokens"] += file.tokens
    return {f"{i} {path.name}": facts for i, (path, facts) in enumerate(found.items())}


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan that is open: its sources are what they were when it was made."""

    folder: Path
    root: Path
    file: PlanFile
    sources: tuple[TokenSource, ...]
    instances: tuple[Instances, ...]
    entries: Mapped

    @property
    def order(self) -> Array:
        """uint64 [instances], `source << 40 | instance`."""
        return self.entries.array

    @property
    def mixture(self) -> Mixture:
        return self.file.mixture

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.file.fingerprint

    @cached_property
    def digest(self) -> str:
        """One name for the fingerprint."""
        return digest_of(self.fingerprint)

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raise ConfigError, naming what changed, unless a run that kept `saved` used this very plan."""
        check_same(saved, self.fingerprint, "the data of this run")


def open_plan(folder: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Plan:
    """A plan whose data are checked.  `root`: where the data lie now, if not where they were.

    Raises FileError if the plan or a file is damaged or missing, ConfigError naming what changed since it was made.
    """
    folder = Path(folder)
    file = read_plan_file(folder)
    base = Path(os.path.abspath(root)) if root is not None else Path(file.root)
    sources = tuple(open_entries(s.name, s.entries, base, file.vocab_size, folder) for s in file.sources)
    check_same(_files_before(file, folder), {s.name: facts_of(s) for s in sources}, str(folder))
    instances = tuple(stored_instances(s, file.mixture, folder) for s in sources)
    plan = Plan(folder, base, file, sources, instances, mapped(folder / ORDER, "u8"))
    _check_order(plan)
    return plan


def _files_before(file: PlanFile, folder: Path) -> dict[str, Any]:
    try:
        return {s.name: file.fingerprint["sources"][s.name]["files"] for s in file.sources}
    except (KeyError, TypeError):
        raise FileError("its fingerprint does not name its sources", file=folder / NAME) from None


def _check_order(plan: Plan) -> None:
    """Raise FileError unless every entry is an instance of a source."""
    sizes = np.array([len(i) for i in plan.instances], np.int64)
    for first in range(0, len(plan.entries), CHUNK):
        source, instance = split(plan.order[first : first + CHUNK])
        if (source >= len(sizes)).any() or (instance >= sizes[np.minimum(source, len(sizes) - 1)]).any():
            raise FileError("names instances that are not there", file=plan.folder / ORDER, hint="make the plan again")
