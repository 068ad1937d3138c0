"""Adam's state in a DCP folder, by the names of the weights, as torch's `get_optimizer_state_dict` lays it out.

    found = read_named(Dcp("model_and_optim"), "optim")
    found.roles["exp_avg"]["blocks.0.attention.w_q.weight"], found.step, found.groups
    named_tensors("optim", roles, 1000, names), flattened("optim", names, ...)    # what `dcp_files` takes

Tensors are `optim.state.NAME.exp_avg`, and the settings of a group either flattened, one record per field and weight
(`optim.param_groups.NAME.lr`), or numbered, with the list of the weights in `optim.param_groups.0.params`.
Source: torch/distributed/checkpoint/state_dict.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.containers.dcp import Dcp
from surgery.errors import FileError, NoStateError, show
from surgery.formats.optimizer import MOMENTS, Group, group_of, one_step
from surgery.formats.torch_states import OTHERS, STEP, number_of, torch_group
from surgery.formats.weave import Stored
from surgery.tensors.lazy import Fill, Lazy

FIELDS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Named:
    """A state by the names that it is stored under: moments by role, how many updates, and groups."""

    roles: Mapping[str, Mapping[str, Lazy]]
    step: int
    groups: Mapping[str, Group]


def read_named(dcp: Dcp, top: str) -> Named | None:
    """None if the folder holds no such state.  Raises SurgeryError for a state of another optimizer than Adam."""
    start = f"{top}.state."
    stored = {name.removeprefix(start): t for name, t in dcp.tensors.items() if name.startswith(start)}
    if not stored:
        return None
    roles: dict[str, dict[str, Lazy]] = {role: {} for role in MOMENTS}
    steps: list[float] = []
    for key, tensor in stored.items():
        name, _, kind = key.rpartition(".")
        if kind in roles:
            roles[kind][name] = tensor
        elif kind == STEP:
            steps.append(number_of(tensor, dcp.path))
        else:
            raise NoStateError(f"has {show(key)}, which is no state of Adam", file=dcp.path, hint=OTHERS)
    objects = {name: load for name, load in dcp.objects.items() if name.startswith(start)}
    steps += [_plain_number(name, load, dcp.path) for name, load in objects.items() if name.endswith(f".{STEP}")]
    return Named(roles, one_step(steps, dcp.path), _groups(dcp, f"{top}.param_groups."))


def _plain_number(name: str, load: Callable[[], Any], file: str) -> float:
    value = load()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FileError(f"{show(name)} is {show(value)}, no number of steps", file=file)
    return float(value)


def _groups(dcp: Dcp, start: str) -> dict[str, Group]:
    """The settings by name of a weight."""
    keys = {name.removeprefix(start): load for name, load in dcp.objects.items() if name.startswith(start)}
    fields: dict[str, dict[object, Any]] = {}
    for key, load in keys.items():
        owner, _, field = key.rpartition(".")
        if field in (*FIELDS, "params") and owner:
            fields.setdefault(owner, {})[field] = load()
    out: dict[str, Group] = {}
    for owner, values in fields.items():
        names = values.get("params") if "params" in values else [owner]
        if not isinstance(names, list) or not all(type(n) is str for n in names):
            raise FileError(f"the weights of the group {show(owner)} are {show(names)}", file=dcp.path)
        out |= dict.fromkeys(names, group_of(values, dcp.path))
    return out


# ------------------------------------------------------------------------------------------------------- writing


def named_tensors(
    top: str, roles: Mapping[str, Mapping[str, Stored]], step: int, names: Iterable[str]
) -> dict[str, Stored]:
    """`top.state.NAME.exp_avg`, `.exp_avg_sq` and `.step` of each weight."""
    out: dict[str, Stored] = {}
    for name in names:
        out |= {f"{top}.state.{name}.{role}": roles[role][name] for role in MOMENTS}
        out[f"{top}.state.{name}.{STEP}"] = Stored(Fill((), "float32", step))
    return out


def flattened(top: str, names: Iterable[str], group: Callable[[str], Group], more: Mapping[str, Any]) -> dict[str, Any]:
    """`top.param_groups.NAME.FIELD`: one record for each field of each weight."""
    return {f"{top}.param_groups.{name}.{field}": value
            for name in names for field, value in {**torch_group(group(name)), **more}.items()}  # fmt: skip


def grouped(top: str, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`top.param_groups.0.FIELD`: a record for each field of each group, its `params` the names of weights."""
    return {f"{top}.param_groups.{i}.{field}": value
            for i, group in enumerate(groups) for field, value in group.items()}  # fmt: skip


def paths(top: str, names: Iterable[str], groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The paths of keys that torch flattened these names from, with numbered groups."""
    out: dict[str, tuple[Any, ...]] = {f"{top}.state.{name}.{kind}": (top, "state", name, kind)
                                       for name in names for kind in (*MOMENTS, STEP)}  # fmt: skip
    return out | {f"{top}.param_groups.{i}.{field}": (top, "param_groups", i, field)
                  for i, group in enumerate(groups) for field in group}  # fmt: skip
