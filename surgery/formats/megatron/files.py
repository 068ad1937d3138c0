"""Megatron's folders: the run with its tracker file, its iterations, the folders and files of the legacy ranks.

    iteration_folder(Path("run"))            # run/iter_0001000, as run/latest_checkpointed_iteration.txt says
    rank_folder(Rank(tp=1, pp=3), topology)  # "mp_rank_01_003"
    open_rank(path).chunks[0]                # the tensors of the first virtual-pipeline chunk by name

Source: megatron/training `checkpointing.py` (get_checkpoint_name, read_metadata).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.containers import open_file
from surgery.containers.pickles.records import Obj, flatten
from surgery.containers.text import read_json, read_tracker
from surgery.containers.torch_zip import Tree
from surgery.errors import FileError, LayoutError, UsageError, show, some
from surgery.formats.base import Options, Place
from surgery.formats.megatron.table import OLD_NAMES
from surgery.formats.topology import Rank, Topology
from surgery.tensors.extent import Extent
from surgery.tensors.lazy import Lazy

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")  # the second: older runs with a distributed optimizer
_ITERATION = re.compile(r"iter_\d{7,}|release")


@dataclass(frozen=True)
class RankFile:
    """One opened rank, and the tensors of each virtual-pipeline chunk."""

    path: Path
    tree: Tree
    chunks: tuple[dict[str, Lazy], ...]

    @property
    def root(self) -> Mapping[Any, Any]:
        found: Mapping[Any, Any] = self.tree.root
        return found


def is_legacy(folder: Path) -> bool:
    return any(p.is_dir() for p in folder.glob("mp_rank_*"))


def is_dist(folder: Path) -> bool:
    """Whether a folder is an iteration in one of the sharded formats (torch_dist, or an older one to be refused)."""
    if not (folder / "metadata.json").is_file():
        return False
    try:
        found = read_json(folder / "metadata.json")
    except FileError:
        return (folder / "common.pt").is_file()
    return isinstance(found, dict) and "sharded_backend" in found


def place(folder: Path, is_kind: Callable[[Path], bool]) -> Place | None:
    """The iteration that a path means, if it is of this kind; where that is unclear, another of the run tells."""
    found = latest(folder)
    known = found if found and found.is_dir() else next(iter(iterations(folder)), None)
    return Place(folder, found or folder) if known and is_kind(known) else None


def latest(folder: Path) -> Path | None:
    """The iteration that a path means: itself, what its tracker says, or the only one there is; None if unclear."""
    if is_legacy(folder) or is_dist(folder):
        return folder
    if (folder / TRACKER).is_file():
        try:
            return folder / read_tracker(folder / TRACKER)
        except FileError:
            return None
    found = iterations(folder)
    return found[0] if len(found) == 1 else None


def iterations(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if _ITERATION.fullmatch(p.name) and p.is_dir())


def iteration_folder(folder: Path) -> Path:
    """As `latest`.  Raises FileError saying why there is none."""
    found = latest(folder)
    if found is None:
        if (folder / TRACKER).is_file():
            read_tracker(folder / TRACKER)
        names = some(p.name for p in iterations(folder))
        raise FileError(f"has no {TRACKER} and several iterations: {names}", file=folder, hint="give one of them")
    if not found.is_dir():
        there = some(p.name for p in iterations(folder)) or "none"
        raise FileError(f"says {found.name}, but that folder is missing", file=folder / TRACKER,
                        hint=f"iterations that are there: {there}; give one of them")  # fmt: skip
    return found


def rank_folder(rank: Rank, topology: Topology) -> str:
    """The name has a pipeline rank only if there are several, and an expert rank likewise."""
    name = f"mp_rank_{rank.tp:02d}"
    name += f"_{rank.pp:03d}" if topology.pp > 1 else ""
    return name + (f"_{rank.ep:03d}" if topology.ep > 1 else "")


def rank_files(folder: Path, topology: Topology) -> dict[Rank, Path]:
    """The model file of every rank (of chunk 0).  Raises FileError if a folder is missing or belongs to nobody."""
    expected = {rank_folder(rank, topology): rank for rank in topology.ranks() if rank.chunk == 0}
    found = {p.name for p in folder.glob("mp_rank_*") if p.is_dir()}
    sizes = f"tp {topology.tp}, pp {topology.pp}, ep {topology.ep}"
    sizes += f", expert tp {topology.expert_tp}" if topology.expert_tp != topology.tp else ""
    if missing := [name for name in expected if name not in found]:
        raise FileError(f"{some(missing)} missing; its args say {sizes}", file=folder,
                        hint="copy the folders of all ranks")  # fmt: skip
    if extra := sorted(found - expected.keys()):
        raise FileError(f"{some(extra)} should not be there; its args say {sizes}", file=folder,
                        hint="folders of several saves were mixed")  # fmt: skip
    return {rank: model_file(folder / name) for name, rank in expected.items()}


def model_file(folder: Path) -> Path:
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileError(f"holds no {MODEL_FILES[0]}", file=folder, hint="copy or download it again")


def open_rank(path: Path) -> RankFile:
    file = open_file(path)
    if not isinstance(file, Tree) or not isinstance(file.root, dict):
        raise FileError("is no checkpoint of a Megatron rank", file=path)
    root = file.root
    keys = ["model"] if "model" in root else [f"model{i}" for i in range(len(root)) if f"model{i}" in root]
    if not keys:
        raise FileError(f"holds no model, only {show(', '.join(map(str, root)))}", file=path)
    return RankFile(path, file, tuple(tensors_of(root[key], path) for key in keys))


def tensors_of(model: object, file: Path) -> dict[str, Lazy]:
    """The tensors of a (nested) state dict by dotted name.  Raises FileError if one is no plain tensor."""
    out: dict[str, Lazy] = {}
    try:
        for name, leaf in flatten(model):
            name = name.removeprefix("module.")
            for old, new in OLD_NAMES if "language_model." in name else ():
                name = re.sub(old, new, name)
            if isinstance(leaf, Extent):
                out[name] = leaf
            elif leaf is not None and not re.search(r"_extra_state\d*$", name):
                what = leaf.path if isinstance(leaf, Obj) else leaf
                raise FileError(f"{show(name)} is no plain tensor but {show(what)}", file=file,
                                hint="weights kept in FP8 or in tensor subclasses are not read")  # fmt: skip
    except ValueError as error:
        raise FileError(str(error), file=file) from None
    return out


def check_one_save(ranks: Mapping[Rank, RankFile]) -> None:
    """Raise LayoutError if the files are of several iterations or have different numbers of chunks."""
    first = ranks[Rank()]
    for file in ranks.values():
        if file.root.get("iteration") != first.root.get("iteration") or len(file.chunks) != len(first.chunks):
            raise LayoutError(
                f"{file.path} is of iteration {show(file.root.get('iteration'))}, {first.path} of "
                f"{show(first.root.get('iteration'))}",
                hint="the ranks' files are from different saves",
            )


def iteration_name(iteration: int | None) -> tuple[str, str]:
    """The folder and the tracker's text; None is a release."""
    return ("release", "release") if iteration is None else (f"iter_{iteration:07d}", str(iteration))


def chosen_iteration(options: Options, carried: object) -> int | None:
    """From -O iteration; auto: the source's own if it has one, else 1.  None means release."""
    text = options.get("iteration", "auto")
    if text == "release":
        return None
    if text == "auto":
        return carried if type(carried) is int and 0 <= carried < 10**11 else 1
    if not (text.isdigit() and len(text) < 12):
        raise UsageError(f"-O iteration={show(text)} is neither a number nor release")
    return int(text)
