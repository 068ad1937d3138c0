"""The state dict of torch's Adam and AdamW in a file: states by number or name, and groups that list them.

    states, groups = read_tree(Path("optim.pt"))
    moments_of(states[0], "embed", path), step_of(states[0], groups[0], path), listed(groups[0], path)
    torch_group(Group())                    # the fields of a group, as torch writes them

Source: torch/optim/optimizer.py (state_dict), torch/optim/adam.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from surgery.containers import open_file
from surgery.containers.pickles.records import TensorRecord
from surgery.errors import FileError, NoStateError, show, some
from surgery.formats.optimizer import MOMENTS, Group
from surgery.tensors.lazy import Lazy

STEP = "step"
OTHERS = "the state of Adam and AdamW is read; that of other optimizers is not"
Fields = Mapping[Any, Any]


def read_tree(path: Path) -> tuple[Mapping[Any, Fields], Sequence[Fields]]:
    """The states and the groups.  Raises NoStateError if the file holds anything else."""
    root = getattr(open_file(path), "root", None)
    states = root.get("state") if isinstance(root, dict) else None
    groups = root.get("param_groups") if isinstance(root, dict) else None
    good = isinstance(states, dict) and isinstance(groups, list) and all(isinstance(g, dict) for g in groups)
    if not good or not all(isinstance(f, dict) for f in states.values()):  # type: ignore[union-attr]
        raise NoStateError("is no state dict of an optimizer", file=path)
    return states, groups  # type: ignore[return-value]


def number_of(tensor: Lazy, file: object) -> float:
    """The only element of a tensor."""
    if tensor.shape not in ((), (1,)):
        raise FileError(f"counts steps in a tensor of shape {list(tensor.shape)[:8]}", file=str(file))
    return float(tensor.full())


def step_of(fields: Fields, group: Fields, path: Path) -> float:
    """How often a parameter was updated: its own count, else (Apex) that of its group."""
    step = fields.get(STEP, group.get(STEP))
    if isinstance(step, Lazy):
        return number_of(step, path)
    if isinstance(step, bool) or not isinstance(step, (int, float)):
        raise FileError("does not say how often its parameters were updated", file=path)
    return float(step)


def tensor_of(fields: Fields, role: str, path: Path) -> Lazy:
    """A tensor of a state.  Raises NoStateError if there is none of that name."""
    found = fields.get(role)
    if not isinstance(found, TensorRecord):
        raise NoStateError(f"has no {role} among {some(sorted(map(str, fields)))}", file=path, hint=OTHERS)
    return found


def moments_of(fields: Fields, name: str, path: Path) -> dict[str, Lazy]:
    """Both moments of a parameter.  Raises NoStateError for a state that holds anything else."""
    if odd := sorted(str(key) for key in fields if key not in (*MOMENTS, STEP)):
        raise NoStateError(f"keeps {some(odd)} of {show(name)}, which is no state of Adam", file=path, hint=OTHERS)
    return {role: tensor_of(fields, role, path) for role in MOMENTS}


def listed(group: Fields, path: Path, keys: Sequence[str] = ("params",)) -> list[str]:
    """The parameters of a group, by the first of the keys that names them.  Raises FileError if none does."""
    for names in map(group.get, keys):
        if isinstance(names, list) and all(type(name) is str for name in names):
            return names
    raise FileError("has a group of parameters that does not name them", file=path)


def torch_group(group: Group) -> dict[str, Any]:
    """The fields of a group of torch's AdamW, and of those made after it."""
    return {
        **asdict(group), "lr": group.lr if group.lr is not None else 0.0, "amsgrad": False, "maximize": False,
        "foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True,
        "initial_lr": group.lr if group.lr is not None else 0.0,
    }  # fmt: skip
