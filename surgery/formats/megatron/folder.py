"""Megatron's folders: the run with its tracker file, its iterations, and the folders of the legacy ranks.

    iteration_folder(Path("run"))            # run/iter_0001000, as run/latest_checkpointed_iteration.txt says
    rank_folder(Rank(tp=1, pp=3), topology)  # "mp_rank_01_003"

Source: megatron/training `checkpointing.py` (get_checkpoint_name, read_metadata).
"""

from __future__ import annotations

import re
from pathlib import Path

from surgery.containers.text import read_json, read_tracker
from surgery.errors import FileError, LayoutError, UsageError, show, some
from surgery.formats.base import Options
from surgery.formats.table import Rank, Topology

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")  # the second: older runs with a distributed optimizer
_ITERATION = re.compile(r"iter_\d{7,}|release")


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


def stage_counts(layers: list[int], total: int, file: Path) -> tuple[int, ...]:
    """How many layers each (chunk, stage) holds; () if all hold the same.  Raises LayoutError if the sum is wrong."""
    if sum(layers) != total:
        raise LayoutError(f"{file}: the pipeline stages hold {layers} layers, but args say num_layers {total}",
                          hint="stages are missing, or of several saves")  # fmt: skip
    return () if len(set(layers)) == 1 else tuple(layers)


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
