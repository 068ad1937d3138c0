"""Checkpoints of a run: safetensors of every process, what JSON can say, and a manifest with digests.  No pickles.

    run/checkpoints/step000000500/
        shard-00001-model-00001-of-00001.safetensors     what the first process answers for, and its random state
        trainer.json                                     step, tokens, schedule, settings, versions, lineage ...
        MANIFEST.json                                    size and sha256 of these files, written last

    found = newest(Path("run/checkpoints"), world)       # every byte is looked at; Found(saved, [what is bad, and why])
    found.saved.tensors["model.lm_head.weight"].read(box)

Tensors are boxes of `model.NAME`, `optim.exp_avg.NAME`, `optim.exp_avg_sq.NAME`, `optim.step.NAME`, `rng.cpu.00000`
and others that a state holds; a file's header says where each begins, as torch's HuggingFaceStorageWriter does
(torch/distributed/checkpoint/hf_storage.py), so torch and transformers read them as well.  Together the boxes of all
processes are the whole, so any number of processes can go on from them, divided in any way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.containers.safetensors import METADATA, Safetensors, safetensors_file
from surgery.containers.text import parse_json, read_json
from surgery.data.strict import Strict, validated
from surgery.errors import FileError, SurgeryError, show, some
from surgery.midtraining import parallel
from surgery.midtraining.parallel import World
from surgery.tensors.files import File
from surgery.tensors.lazy import Concat, Lazy

FORMAT = "surgery-checkpoint-1"
FOLDER, MANIFEST, TRAINER = "checkpoints", "MANIFEST.json", "trainer.json"
NAME = re.compile(r"step(\d{9,18})")
OFFSETS = "DCP_SHARDING_INFO"  # torch/distributed/checkpoint/_hf_utils.py
CHUNK = 8 << 20


def name_of(step: int) -> str:
    """Of a checkpoint's folder."""
    return f"step{step:09d}"


def shard_name(rank: int) -> str:
    """Of a process's file, as torch names it."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


class Entry(Strict):
    """A file in the manifest."""

    bytes: int
    sha256: str


class Manifest(Strict):
    """MANIFEST.json."""

    format: str
    step: int
    files: dict[str, Entry]


class Trainer(Strict):
    """trainer.json: all of a run's state that is no tensor, and what it belongs to.

    state      by entry of the loop's state: progress, spikes ...
    data       `step` that comes next (from 0), `tokens` before it, and the `fingerprint` of where rows come from
    schedule   how learning rates follow from its `peak` and the other numbers
    choices    what `auto` came to: precision, experts, compile
    world      processes, and how the model was divided among them
    run        the settings, with every default                          spec       what the model is
    lineage    `model`: digest of the weights that the run began with, `source`: where they were
    """

    format: str
    step: int
    state: dict[str, Any]
    data: dict[str, Any]
    schedule: dict[str, Any]
    choices: dict[str, str]
    world: dict[str, Any]
    run: dict[str, Any]
    spec: dict[str, Any]
    versions: dict[str, str]
    lineage: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint whose files are what the manifest says."""

    folder: Path
    trainer: Trainer

    @property
    def step(self) -> int:
        return self.trainer.step

    @property
    def peak(self) -> tuple[float, str]:
        """The learning rate after the warm-up, and who says it."""
        peak = float(self.trainer.schedule["peak"])
        return peak, f"learning rate {peak:.4g}, as the run began"

    def choices(self, device: str) -> dict[str, str]:
        """What `auto` had come to, as far as it holds on this device."""
        same = self.trainer.world["device"] == device.partition(":")[0]
        return {name: choice for name, choice in self.trainer.choices.items() if same or name == "precision"}

    @property
    def digest(self) -> str:
        """Of the weights that the run began with."""
        return str(self.trainer.lineage["model"])

    @property
    def note(self) -> str:
        return f"weights and moments are those of {FOLDER}/{self.folder.name}, from which the run goes on"

    @cached_property
    def tensors(self) -> Mapping[str, Lazy]:
        """Every tensor as a whole, to be read by boxes.  Raises FileError if boxes do not make one up."""
        return stitched([self.folder / shard_name(rank) for rank in range(self.trainer.world["processes"])])


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint, if there is one, and what is wrong with each that is newer."""

    saved: Saved | None
    bad: Mapping[Path, str]


def newest(folder: Path, world: World) -> Found:
    """Look at every byte of checkpoints, from the newest on, until one is good; the processes share its files."""
    bad: dict[Path, str] = {}
    for name in parallel.first(world, [path.name for _, path in sorted(steps(folder).items(), reverse=True)]):
        path = folder / name
        try:
            saved: Saved | None = open_saved(path, world.rank, world.size)
            why = None
        except SurgeryError as error:
            saved, why = None, str(error)
        reasons = [said for said in parallel.everyone(world, why) if said]
        if not reasons:
            return Found(saved, bad)
        bad[path] = reasons[0]
    return Found(None, bad)


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder, by step, good or bad."""
    names = sorted(p for p in folder.iterdir() if not p.is_symlink() and p.is_dir()) if folder.is_dir() else []
    return {int(match[1]): path for path in names if (match := NAME.fullmatch(path.name))}


def open_saved(folder: Path, part: int = 0, parts: int = 1) -> Saved:
    """A checkpoint, checked: every `parts`-th file from `part` on by its digest, all others by size.

    Raises FileError for the first thing that is wrong.
    """
    manifest = _read(folder / MANIFEST, Manifest)
    if wrong := [
        name for name in manifest.files if name != TRAINER and not re.fullmatch(r"shard-[\w-]+\.safetensors", name)
    ]:
        raise FileError(f"lists {some(map(show, wrong))}, which is no file of a checkpoint", file=folder / MANIFEST)
    if TRAINER not in manifest.files:
        raise FileError(f"lists no {TRAINER}", file=folder / MANIFEST)
    for number, (name, entry) in enumerate(sorted(manifest.files.items())):
        file = File(folder / name)
        if file.size != entry.bytes:
            raise FileError(f"has {file.size:,} bytes, and the manifest says {entry.bytes:,}", file=folder / name)
        if number % parts == part and digest(file) != entry.sha256:
            raise FileError("has another sha256 than the manifest says: its bytes have changed", file=folder / name)
    trainer = _read(folder / TRAINER, Trainer)
    if manifest.format != FORMAT or trainer.format != FORMAT or manifest.step != trainer.step:
        raise FileError(f"is of the format {show(trainer.format)}, or its files are not of one step", file=folder)
    wanted = {shard_name(rank) for rank in range(_whole(trainer.world.get("processes")))}
    if wanted != manifest.files.keys() - {TRAINER}:
        raise FileError("does not list the files of all processes", file=folder / MANIFEST)
    return Saved(folder, trainer)


def _whole(value: object) -> int:
    return value if type(value) is int and 0 < value < 1 << 20 else 0


def _read(path: Path, kind: Any) -> Any:
    value = read_json(path)
    try:
        return validated(value, kind, file=path)
    except SurgeryError as error:
        raise FileError(f"is no {path.name} of a checkpoint: {error.what}", file=path) from None


def digest(file: File) -> str:
    """sha256 of all its bytes."""
    sha = hashlib.sha256()
    for start in range(0, file.size, CHUNK):
        sha.update(file.read(start, min(CHUNK, file.size - start), "checkpoint"))
    return sha.hexdigest()


def stitched(paths: Sequence[Path]) -> dict[str, Lazy]:
    """Tensors of which each file holds boxes, as wholes.  Boxes differ in where they begin along the first dimension.

    Raises FileError if some are missing, or overlap.
    """
    pieces: dict[str, dict[int, Lazy]] = {}
    for path in paths:
        for name, start, tensor in _boxes(path):
            if start in pieces.setdefault(name, {}):
                raise FileError(f"holds {show(name)} from {start} on, which another file holds, too", file=path)
            pieces[name][start] = tensor
    out: dict[str, Lazy] = {}
    for name, boxes in pieces.items():
        ordered = sorted(boxes.items())
        ends = [0, *(start + (tensor.shape[0] if tensor.shape else 0) for start, tensor in ordered)]
        if [start for start, _ in ordered] != ends[:-1]:
            raise FileError(f"the boxes of {show(name)} do not make up a whole", file=paths[0].parent)
        out[name] = ordered[0][1] if len(ordered) == 1 else Concat([tensor for _, tensor in ordered], 0)
    return out


def _boxes(path: Path) -> Iterator[tuple[str, int, Lazy]]:
    file = Safetensors(File(path))
    told = parse_json(file.metadata.get(OFFSETS, "{}").encode(), str(path), OFFSETS)
    for name, tensor in file.tensors.items():
        entry = told.get(name) if isinstance(told, dict) else None
        at = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if (
            not isinstance(at, list)
            or len(at) != len(tensor.shape)
            or any(type(n) is not int for n in at)
            or any(at[1:])
        ):
            raise FileError(f"does not say where {show(name)} begins", file=path)
        yield name, at[0] if at else 0, tensor


# ------------------------------------------------------------------------------------------------------------- writing


def shard_head(name: str, boxes: Mapping[str, tuple[Lazy, Sequence[int]]]) -> tuple[bytes, list[Lazy]]:
    """A file's header for tensors that begin at these places of their wholes, and the tensors in the order in which
    their bytes follow."""
    offsets = {key: {"saved_offsets": list(at)} for key, (_, at) in boxes.items()}
    metadata = {**METADATA, "DCP_VERSION": "1.0", OFFSETS: json.dumps(offsets)}
    file = safetensors_file(name, {key: tensor for key, (tensor, _) in boxes.items()}, metadata)
    return file.head, [region.tensor for region in file.regions]
