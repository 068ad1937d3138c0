"""What a run begins with besides the weights: Adam's moments, the masters, and the rate that the source had come to.

    start = find_start(run.init, source)                   # Start(moments=Moments | None, note="...")
    put_moments(start.moments, optimizer, model, source, world)

Moments lie in the source's own files, whatever its format keeps of its optimizer; in a .safetensors file as
exp_avg.NAME and exp_avg_sq.NAME, NAME as Hugging Face's files or transformers' modules spell it, with a scalar `step`
(or `init.optimizer_step`); or in a checkpoint of a run of surgery.  They are rearranged by the table of the family, as
weights are.  Weights, moments and schedule are independent, but for the fp32 masters of a state, which are the weights.
Where there is no state, or one of a kind that is not read, the moments start at zero; one that is broken stops the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from surgery.containers import open_tensors
from surgery.errors import ConfigError, FileError, LayoutError, NoStateError, SurgeryError, some
from surgery.formats.base import Checkpoint, Options
from surgery.formats.hf.table import table
from surgery.formats.optimizer import ALONE, MASTER, MOMENTS, M, Optimizer, V
from surgery.formats.registry import FORMATS, known, open_checkpoint, recognise
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.weave import gather
from surgery.midtraining.checkpoint import FOLDER, Saved, name_of, open_saved
from surgery.midtraining.optimizer import named
from surgery.midtraining.parallel import World, local
from surgery.midtraining.run_folder import run_of
from surgery.midtraining.settings import Init
from surgery.midtraining.sharding import place_of
from surgery.running.layerwise import weights_of
from surgery.storage import mirror
from surgery.tensors.fingerprint import not_finite
from surgery.tensors.lazy import Box, Fill, Lazy

FILE = "optimizer.safetensors"


@dataclass(frozen=True)
class Moments:
    """Adam's moments of the parts of a model, and how many steps they have seen."""

    parts: Mapping[str, Mapping[str, Lazy]]  # by kind
    step: int
    path: Path


@dataclass(frozen=True)
class Start:
    """`note` says where the moments come from; `masters` are parts to begin with in place of the weights, `lr` is the
    rate of the last update that a state tells."""

    moments: Moments | None
    note: str
    masters: Mapping[str, Lazy] = field(default_factory=dict)
    lr: float | None = None

    def begun(self, source: Checkpoint) -> Checkpoint:
        """The weights that the run begins with."""
        return replace(source, parts={**source.parts, **self.masters}) if self.masters else source


def find_start(init: Init, source: Checkpoint, options: Options | None = None) -> Start:
    """`options` are those that the source was read with.  Raises FileError or LayoutError for a state that is broken or
    another model's, and for one that is named and not there."""
    if init.optimizer == "fresh":
        return Start(None, "Adam's moments start at zero")
    found = _beside(source) if init.optimizer == "auto" else mirror.place_of(init.optimizer)
    try:
        if found is None:
            return _of_files(source.path, source, source.format, init, options or {})
        if not found.is_dir():
            return _told(open_moments(found, source, init.optimizer_step))
        if known(found):
            return _of_files(found, source, None, init, {})
        return _told(_of_run(open_saved(found), source))
    except (LayoutError, FileError) as error:
        if init.optimizer == "auto" and isinstance(error, NoStateError):
            folder = (found or source.path).name
            return Start(None, f"Adam's moments start at zero, as those of {folder} are not read: {error}")
        raise _or_fresh(error) from None


def _or_fresh(error: SurgeryError) -> SurgeryError:
    """An error of a state, with the way to go on without it."""
    if ALONE not in (error.hint or ""):
        error.hint = "; ".join(filter(None, (error.hint, ALONE)))
    return error


def _told(moments: Moments) -> Start:
    return Start(moments, f"Adam's moments are those of {moments.path.name}, after {moments.step:,} steps")


def _of_files(folder: Path, source: Checkpoint, format: str | None, init: Init, options: Options) -> Start:
    """A state in the files of a checkpoint, whatever its format.  Raises FileError if there is none where one is named,
    LayoutError if it is another model's."""
    reading, step = FORMATS[format or recognise(folder).name], init.optimizer_step
    if step is not None and "optimizer_step" in reading.option_names("read"):
        options = {**options, "optimizer_step": str(step)}
    found = open_checkpoint(folder, format=reading.name, options=options, optimizer=True).optimizer
    if found is None and init.optimizer == "auto":
        why = f"there is no {FILE}, no checkpoint of its run, and no state of an optimizer in its files"
        return Start(None, f"Adam's moments start at zero: {why}")
    if found is None:
        raise FileError("holds no optimizer's state", file=folder)
    parts = {kind: _fitting(found.roles[kind], source, folder) for kind in MOMENTS}
    moments = Moments(parts, found.step if step is None else step, folder)
    masters = found.roles[MASTER] if found.kept and folder == source.path else {}
    note = f"Adam's moments are those of {folder.name}, after {moments.step:,} steps{_settings(found)}"
    return Start(moments, note + ("; the weights are its fp32 masters" if masters else ""), masters, found.lr)


def _fitting(parts: Mapping[str, Lazy], source: Checkpoint, folder: Path) -> dict[str, Lazy]:
    """The moments of every part of the source: of what no optimizer moves, zeros.  Raises LayoutError."""
    shapes = {name: weight.shape for name, weight in source.parts.items()}
    odd = [name for name, tensor in parts.items() if tensor.shape != shapes.get(name)]
    if odd or not parts:
        raise LayoutError(f"its optimizer's state is of another model: {some(odd)}", file=str(folder))
    return {name: parts.get(name) or Fill(shape, "float32") for name, shape in shapes.items()}


def _settings(found: Optimizer) -> str:
    """What the source's optimizer computed with, if all of it did so."""
    kinds = {(group.betas, group.eps) for group in found.groups.values()}
    if len(kinds) != 1:
        return ""
    betas, eps = kinds.pop()
    return f" with betas {betas[0]:g} and {betas[1]:g}, eps {eps:g}"


def _beside(source: Checkpoint) -> Path | None:
    """A file beside the weights; of what a run of surgery has exported, the run's checkpoint of that step."""
    if (source.path / FILE).is_file():
        return source.path / FILE
    run = run_of(source.path)
    saved = run[0] / FOLDER / name_of(run[1]) if run else None
    return saved if saved and saved.is_dir() else None


def open_moments(path: Path, source: Checkpoint, step: int | None = None) -> Moments:
    """Raises FileError or LayoutError if the file does not hold the moments of this model, ConfigError if it does not
    tell the step."""
    tensors = open_tensors(path)
    stray = [n for n in tensors if n != "step" and n.partition(".")[0] not in MOMENTS]
    if stray:
        raise FileError(f"holds {some(stray)}, which are no moments", file=path, hint=f"{M}.NAME, {V}.NAME")
    if step is None and "step" not in tensors:
        raise ConfigError("does not say how many steps its moments have seen", file=path, hint="init.optimizer_step")
    return Moments(_parts(tensors, "", source), int(tensors["step"].full()) if step is None else step, path)


def _of_run(saved: Saved, source: Checkpoint) -> Moments:
    """Those in a checkpoint of a run, all of whose bytes were compared.  Raises NoStateError if some are missing, as
    the run had frozen parameters, or if the source is another model by now."""
    step = next((int(t.full()) for n, t in saved.tensors.items() if n.startswith("optim.step.")), 0)
    try:
        return Moments(_parts(saved.tensors, "optim.", source), step, saved.folder)
    except LayoutError as error:
        raise NoStateError(f"holds moments that do not fit: {error.what}", file=saved.folder) from None


def _parts(tensors: Mapping[str, Lazy], prefix: str, source: Checkpoint) -> dict[str, Mapping[str, Lazy]]:
    """The moments of each kind, rearranged by the table of the family."""
    parts: dict[str, Mapping[str, Lazy]] = {}
    for kind in MOMENTS:
        start = f"{prefix}{kind}."
        found = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        parts[kind] = gather(table(source.spec.family, found), {Rank(): found}, source.spec, ONE_RANK).parts
    return parts


def put_moments(
    moments: Moments, optimizer: torch.optim.Optimizer, model: Any, source: Checkpoint, world: World
) -> None:
    """Make them the state of an AdamW that has taken no step; each process takes what it holds.

    Raises FileError for numbers that no Adam comes to.
    """
    woven = {kind: weights_of(model, replace(source, parts=parts)) for kind, parts in moments.parts.items()}
    for name, parameter in named(optimizer):
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(float(moments.step), device=parameter.device)
        for kind, lazies in woven.items():
            values = _sound(moments, kind, name, lazies[name], place_of(world, parameter).box)
            state[kind] = torch.empty_like(parameter, memory_format=torch.preserve_format)
            with torch.no_grad():
                local(state[kind]).copy_(values)


def _sound(moments: Moments, kind: str, name: str, tensor: Lazy, box: Box) -> torch.Tensor:
    """The values of a moment.  Raises SurgeryError if they cannot be read or are none that Adam comes to."""
    try:
        values = tensor.read(box)
        if odd := not_finite(values) or (kind == V and int((values < 0).sum())):
            what = f"{odd:,} values of {kind} of {name} are no numbers, infinite, or negative squares"
            raise FileError(what, file=moments.path)
    except SurgeryError as error:
        raise _or_fresh(error) from None
    return values
