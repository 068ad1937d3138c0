"""The plan of a run: which instances of which sources, in which order, on disk and checked when it is opened.

    plan = write_plan(draft_plan("mix.yaml"), "plan")       # the folder appears whole or not at all
    plan = open_plan("plan")                                # refuses if the data are not what they were
    plan = open_plan("plan", root="data")                   # a plan that was pushed does not say where they lie
    plan.order                                              # uint64 [instances], a memory map
    plan.check(saved)                                       # `saved`: the fingerprint that a checkpoint kept

Memory: 8 bytes for each instance, for the order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgery.data.files.mapped import Array, Mapped, mapped
from surgery.data.files.tokens import TokenSource
from surgery.data.plans.draft import Draft
from surgery.data.plans.fingerprint import check_same, digest_of, sampled
from surgery.data.plans.mixture import Mixture
from surgery.data.plans.order import Taken, make_order, split
from surgery.data.plans.packing import Instances
from surgery.data.plans.plan_file import FILES, NAME, ORDER, PlanFile, little, plan_bytes, read_plan_file
from surgery.data.plans.plan_sources import found_ends, located, open_entries, stored_instances, tables
from surgery.data.plans.text_cache import load_tokenizer
from surgery.errors import ConfigError, FileError, shown, some
from surgery.storage.address import is_address
from surgery.storage.copies import here
from surgery.writing.folder import write_folder

HEADLESS = ("dolma", "datatrove")
SETTINGS = ("sequence_length", "packing", "isolate", "pad_id", "seed", "sample_seed")
CHUNK = 1 << 20


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
            e.model_copy(update={"ends": names.get(i), "dtype": dtypes.get(located(e.path, draft.root), e.dtype)})
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
    folder = here(folder, only=FILES)
    file = read_plan_file(folder)
    base = _base(file, folder, root)
    sources = tuple(open_entries(s.name, s.entries, base, file.vocab_size, folder) for s in file.sources)
    now = {"tokenizer": _tokenizer_now(file, base), **{s.name: facts_of(s) for s in sources}}
    check_same(_facts_before(file, folder), now, str(folder))
    instances = tuple(stored_instances(s, file.mixture, folder) for s in sources)
    plan = Plan(folder, base, file, sources, instances, mapped(folder / ORDER, "u8"))
    _check_order(plan)
    return plan


def _base(file: PlanFile, folder: Path, root: str | os.PathLike[str] | None) -> Path:
    """Where the files of a plan lie: `root` or the plan says it, else beside it.  Raises ConfigError."""
    base = Path(os.path.abspath(root if root is not None else file.root or folder.parent))
    paths = [entry.path for source in file.sources for entry in source.entries if not is_address(entry.path)]
    if not file.root and (missing := [path for path in paths if not (base / path).exists()]):
        where = "" if root is None and is_address(shown(folder)) else f", and in {base} there is no {some(missing)}"
        raise ConfigError(f"does not say where its files lie{where}", file=folder / NAME,
                          hint="put them beside the plan's folder, here; --root names another")  # fmt: skip
    return base


def _facts_before(file: PlanFile, folder: Path) -> dict[str, Any]:
    try:
        sources = {s.name: file.fingerprint["sources"][s.name]["files"] for s in file.sources}
        return {"tokenizer": file.fingerprint["tokenizer"], **sources}
    except (KeyError, TypeError):
        raise FileError("its fingerprint does not name its sources", file=folder / NAME) from None


def _tokenizer_now(file: PlanFile, root: Path) -> str | None:
    """The SHA-256 of the tokenizer; what it was, if it is not on this machine: training needs none."""
    try:
        vocabulary = load_tokenizer(file.mixture, root)
    except FileError:
        return file.fingerprint.get("tokenizer")
    return vocabulary.sha256 if vocabulary else None


def _check_order(plan: Plan) -> None:
    """Raise FileError unless every entry is an instance of a source, and the sources have what the plan says."""
    sizes = np.array([len(i) for i in plan.instances], np.int64)
    if sizes.tolist() != [s.have + s.heldout for s in plan.file.sources]:
        raise FileError("says other numbers of instances than there are", file=plan.folder / NAME)
    for first in range(0, len(plan.entries), CHUNK):
        source, instance = split(plan.order[first : first + CHUNK])
        if (source >= len(sizes)).any() or (instance >= sizes[np.minimum(source, len(sizes) - 1)]).any():
            raise FileError("names instances that are not there", file=plan.folder / ORDER, hint="make the plan again")
