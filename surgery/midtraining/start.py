"""What a run begins with besides the weights: Adam's moments, and the learning rate that the source had come to.

    start = find_start(run.init, source)                   # Start(moments=Moments | None, note="...")
    put_moments(start.moments, optimizer, model, source, world)

Moments lie in a .safetensors file as exp_avg.NAME and exp_avg_sq.NAME, NAME as Hugging Face's files or transformers'
modules spell it, with a scalar `step` (or `init.optimizer_step`), or in a checkpoint of a run of surgery.  They are
rearranged by the table of the family, as weights are.  Weights, moments and schedule are independent: none of them
brings another along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.containers import open_tensors
from surgery.errors import ConfigError, FileError, LayoutError, some
from surgery.formats.base import Checkpoint
from surgery.formats.hf.table import table
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.weave import gather
from surgery.midtraining.checkpoint import FOLDER, Saved, name_of, open_saved
from surgery.midtraining.optimizer import named
from surgery.midtraining.parallel import World, local
from surgery.midtraining.run_folder import run_of
from surgery.midtraining.settings import Init
from surgery.midtraining.sharding import place_of
from surgery.running.layerwise import weights_of
from surgery.tensors.lazy import Lazy

FILE = "optimizer.safetensors"
KINDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Moments:
    """Adam's moments of the parts of a model, and how many steps they have seen."""

    parts: Mapping[str, Mapping[str, Lazy]]  # by kind
    step: int
    path: Path


@dataclass(frozen=True)
class Start:
    """`note` says where the moments come from."""

    moments: Moments | None
    note: str


def find_start(init: Init, source: Checkpoint) -> Start:
    """Raises FileError if moments are named that are none, LayoutError if they are another model's."""
    found = _beside(source) if init.optimizer == "auto" else Path(init.optimizer)
    if init.optimizer == "fresh" or found is None:
        why = "" if init.optimizer == "fresh" else f": there is no {FILE}, and no checkpoint of its run"
        return Start(None, f"Adam's moments start at zero{why}")
    if not found.is_dir():
        moments = open_moments(found, source, init.optimizer_step)
    else:
        try:
            moments = _of_run(open_saved(found), source)
        except LayoutError as error:
            if init.optimizer != "auto":
                raise
            return Start(None, f"Adam's moments start at zero, as those of {found.name} do not fit: {error}")
    return Start(moments, f"Adam's moments are those of {found.name}, after {moments.step:,} steps")


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
    stray = [n for n in tensors if n != "step" and n.partition(".")[0] not in KINDS]
    if stray:
        raise FileError(
            f"holds {some(stray)}, which are no moments", file=path, hint=f"{KINDS[0]}.NAME, {KINDS[1]}.NAME"
        )
    if step is None and "step" not in tensors:
        raise ConfigError("does not say how many steps its moments have seen", file=path, hint="init.optimizer_step")
    return Moments(_parts(tensors, "", source), int(tensors["step"].full()) if step is None else step, path)


def _of_run(saved: Saved, source: Checkpoint) -> Moments:
    """Those in a checkpoint of a run.  Raises LayoutError if some are missing, as the run had frozen parameters, or do
    not fit."""
    step = next((int(t.full()) for n, t in saved.tensors.items() if n.startswith("optim.step.")), 0)
    return Moments(_parts(saved.tensors, "optim.", source), step, saved.folder)


def _parts(tensors: Mapping[str, Lazy], prefix: str, source: Checkpoint) -> dict[str, Mapping[str, Lazy]]:
    """The moments of each kind, rearranged by the table of the family."""
    parts: dict[str, Mapping[str, Lazy]] = {}
    for kind in KINDS:
        start = f"{prefix}{kind}."
        found = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        parts[kind] = gather(table(source.spec.family, found), {Rank(): found}, source.spec, ONE_RANK).parts
    return parts


def put_moments(
    moments: Moments, optimizer: torch.optim.Optimizer, model: Any, source: Checkpoint, world: World
) -> None:
    """Make them the state of an AdamW that has taken no step; each process takes what it holds."""
    woven = {kind: weights_of(model, replace(source, parts=parts)) for kind, parts in moments.parts.items()}
    for name, parameter in named(optimizer):
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(float(moments.step), device=parameter.device)
        for kind, lazies in woven.items():
            state[kind] = torch.empty_like(parameter, memory_format=torch.preserve_format)
            with torch.no_grad():
                local(state[kind]).copy_(lazies[name].read(place_of(world, parameter).box))
