"""Write checkpoints of a run, one at a time, in the background if that is wished: whole or not at all.

    saver = Saver(folder, world, run.checkpoint, group)
    saver.save(step, tensors, trainer)         # all processes; what is in memory is copied before this returns
    saver.wait()                               # raises OutputError if it could not be written, here or elsewhere

Every process writes and syncs its own file, then tells the others its size and sha256 (or what went wrong) through a
group of its own, as the others are training meanwhile; process 0 then adds trainer.json and the manifest, and gives the
folder its name.  A checkpoint that cannot be written leaves those before it as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surgery.errors import OutputError, SurgeryError, show
from surgery.midtraining import parallel
from surgery.midtraining.checkpoint import FORMAT, MANIFEST, NAME, TRAINER, name_of, shard_head, shard_name, steps
from surgery.midtraining.parallel import World
from surgery.midtraining.settings import Checkpoint
from surgery.midtraining.sharding import place_of
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import Lazy, bytes_of
from surgery.writing.atomic import sync_folder
from surgery.writing.sink import FULL

Boxes = Mapping[str, tuple[Lazy, Sequence[int]]]
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Saver:
    """Writes checkpoints into `folder`.  `group`: how processes talk while others train; None for one process."""

    def __init__(self, folder: Path, world: World, wanted: Checkpoint, group: Any = None) -> None:
        self.folder, self.world, self.wanted, self.group = folder, world, wanted, group
        self.error: SurgeryError | None = None
        self._thread: threading.Thread | None = None

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], trainer: Mapping[str, Any]) -> None:
        """Write what is in memory now.  Waits for the one before.  Raises OutputError where that failed."""
        self.wait()
        boxes = held(self.world, tensors, copied=self.wanted.in_background)
        if not self.wanted.in_background:
            self._write(step, boxes, trainer)
            return self.wait()
        self._thread = threading.Thread(target=self._write, args=(step, boxes, trainer), name="save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last one is written.  Raises OutputError if it could not be."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self.error:
            raise self.error

    def look(self) -> None:
        """Raises OutputError if the last one could not be written, as far as that is known by now."""
        if self.error:
            self.wait()

    def _write(self, step: int, boxes: Boxes, trainer: Mapping[str, Any]) -> None:
        try:
            write_checkpoint(self.folder, self.world, step, boxes, trainer, self.group)
            if self.world.main:
                prune(self.folder, self.wanted)
        except SurgeryError as error:
            self.error = error
        except OSError as error:
            self.error = _cannot(error, self.folder)
        except RuntimeError as error:  # of torch.distributed
            self.error = OutputError(f"checkpoint: another process is gone: {show(str(error))}", file=self.folder)


def held(world: World, tensors: Mapping[str, torch.Tensor], copied: bool = True) -> Boxes:
    """What this process answers for, on the CPU: tensors, and where each begins in its whole."""
    found: dict[str, tuple[Lazy, Sequence[int]]] = {}
    for name, tensor in tensors.items():
        place, here = place_of(world, tensor), parallel.local(tensor.detach())
        own = name.startswith("rng.")
        if (place.answers or own) and (here.numel() or not here.shape):
            data = here.to("cpu", copy=copied, memory_format=torch.contiguous_format)
            found[name] = (InMemory(data), [a for a, _ in place.box])
    return found


def write_checkpoint(
    folder: Path, world: World, step: int, boxes: Boxes, trainer: Mapping[str, Any] | None, group: Any = None
) -> Path:
    """A checkpoint of this step, by all processes; without `trainer` only tensors, which nobody can resume from.

    Raises OutputError on every process if one of them cannot write its part.
    """
    partial, place, name = folder / f".{name_of(step)}.partial", folder / name_of(step), shard_name(world.rank)
    try:
        _together(world, group, folder, lambda: _fresh(partial), main=True)
        files = _together(world, group, folder, lambda: [name, *write_shard(partial / name, boxes)])
        _together(world, group, folder, lambda: _publish(partial, place, step, files, trainer), main=True)
    except SurgeryError:
        if world.main:
            _sweep(folder)
        raise
    return place


def _together(world: World, group: Any, folder: Path, work: Callable[[], Any], main: bool = False) -> list[Any]:
    def told() -> Any:
        try:
            return work()
        except OSError as error:
            raise _cannot(error, folder) from None

    return parallel.together(world, told, main=main, through=group)


def _cannot(error: OSError, folder: Path) -> OutputError:
    what = "the disk is full" if error.errno in FULL else f"cannot be written: {error.strerror or error}"
    hint = "the last checkpoint is as it was: make room, then run the same command again to go on from it"
    return OutputError(f"checkpoint: {what}", file=folder, hint=hint)


def _fresh(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    _sweep(partial.parent)
    partial.mkdir()


def _sweep(folder: Path) -> None:
    """Remove what is half-written or half-removed."""
    for path in folder.glob(".step*"):
        shutil.rmtree(path, ignore_errors=True)


def write_shard(path: Path, boxes: Boxes) -> tuple[int, str]:
    """A new file of tensors, on the disk; its size and sha256.  Raises OSError."""
    head, tensors = shard_head(path.name, boxes)
    sha, size = hashlib.sha256(), 0
    with os.fdopen(os.open(path, NEW, 0o666), "wb", buffering=0) as file:
        for data in (memoryview(head), *(memoryview(bytes_of(tensor.full().contiguous())) for tensor in tensors)):
            _write_all(file.fileno(), data)
            sha.update(data)
            size += len(data)
        os.fsync(file.fileno())
    return size, sha.hexdigest()


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _publish(
    partial: Path, place: Path, step: int, files: Sequence[tuple[str, int, str]], trainer: Mapping[str, Any] | None
) -> None:
    """Add what belongs to no process, and give the folder its name."""
    listed = {name: {"bytes": size, "sha256": sha} for name, size, sha in files}
    if trainer is not None:
        text = json.dumps(trainer, indent=1, allow_nan=False).encode()
        _write_text(partial / TRAINER, text)
        listed[TRAINER] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    _write_text(partial / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": listed}, indent=1).encode())
    sync_folder(partial)
    _remove(place)
    os.rename(partial, place)
    sync_folder(place.parent)


def _write_text(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, NEW, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """At once, so that no half of it is ever taken for a whole."""
    if path.is_dir():
        away = path.with_name(f".{path.name}.removed")
        shutil.rmtree(away, ignore_errors=True)
        os.rename(path, away)
        shutil.rmtree(away, ignore_errors=True)


def prune(folder: Path, wanted: Checkpoint) -> None:
    """Remove all but the last ones and those that are to be kept."""
    found = sorted(steps(folder).items())
    for step, path in found[: -wanted.keep_last]:
        if not (wanted.keep_every and step % wanted.keep_every == 0):
            _remove(path)


def set_aside(bad: Mapping[Path, str]) -> None:
    """Give damaged checkpoints another name, so that no new one is removed in their stead."""
    for path in bad:
        if NAME.fullmatch(path.name):
            away = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(away, ignore_errors=True)
            os.rename(path, away)
