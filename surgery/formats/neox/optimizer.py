"""Adam's state as DeepSpeed's ZeRO stages 1 and 2 keep it: flat, one partition a group for each data-parallel rank.

    states = read_states(found, shards, tp)

A group is its parameters one after the other, in the order of `param_shapes` of the rank's model states, cut in equal
partitions and padded at the end.  `param_slice_mappings` is never believed: with round_robin_gradients DeepSpeed (up
to 0.19 at least) writes other parameters' names into it.  The step is the state's own: `param_groups` say 0.
Source: DeepSpeed runtime/zero/stage_1_and_2.py, runtime/bf16_optimizer.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from surgery.containers import open_file
from surgery.containers.pickles.records import TensorRecord
from surgery.errors import FileError, LayoutError, NoStateError, show
from surgery.formats.flat import aligned, cut
from surgery.formats.neox.files import Found
from surgery.formats.optimizer import ALONE, MASTER, ROLES, Group, States, group_of, one_step
from surgery.formats.topology import Rank
from surgery.formats.torch_states import STEP, Fields, number_of
from surgery.formats.weave import Shards
from surgery.tensors.lazy import Concat, Lazy, Shape

_NAME = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MASTERS = "single_partition_of_fp32_groups"
ROUND_ROBIN = (
    "its run set round_robin_gradients, with which DeepSpeed (up to 0.19 at least) writes other parameters' names into "
    "param_slice_mappings: they are not used here, but DeepSpeed's own ds_to_universal would swap moments by them"
)
_PADDING = 64  # elements for each data-parallel rank that a group may be padded by


def read_states(found: Found, shards: Shards, tp: int) -> States | None:
    """None if there is none.  Raises SurgeryError if files are missing or do not fit the weights."""
    if not found.optimizer:
        return None
    roles: dict[str, dict[Rank, dict[str, Lazy]]] = {role: {rank: {} for rank in shards} for role in ROLES}
    steps: list[float] = []
    groups: dict[str, Group] = {}
    for number, model in enumerate(found.ranks):
        parts = [_state(path) for path in _partitions(found, number)]
        for g, shapes in enumerate(_shapes(model)):
            settings = _settings(parts[0], g, model)
            places, total = aligned(shapes.items(), 1)
            for role in ROLES:
                flat = _joined([_tensor(part, role, g, model) for part in parts], total, model)
                for name, shape in shapes.items():
                    roles[role][Rank(tp=number % tp)][name] = cut(flat, places[name], shape)
            steps += [_step(part, g, model) for part in parts]
            groups |= dict.fromkeys(shapes, settings) if settings else {}
    notes = (ROUND_ROBIN,) if _round_robin(found.optimizer[0]) else ()
    return States(roles, one_step(steps, found.folder), groups, notes, found.optimizer)


def _partitions(found: Found, number: int) -> list[Path]:
    """The files of a rank's partitions in their order, without a gap."""
    named = {(int(m[2]), int(m[1])): p for p in found.optimizer if (m := _NAME.fullmatch(p.name))}
    mine = {dp: path for (mp, dp), path in named.items() if mp == number}
    gap = next((dp for dp in range(max(mine, default=0) + 1) if dp not in mine), None)
    if gap is not None:
        raise FileError(f"zero_pp_rank_{gap}_mp_rank_{number:02d}_optim_states.pt is missing", file=found.folder,
                        hint="copy the files of every rank")  # fmt: skip
    return [mine[dp] for dp in sorted(mine)]


def _state(path: Path) -> Fields:
    root = getattr(open_file(path), "root", None)
    state = root.get("optimizer_state_dict") if isinstance(root, dict) else None
    if not isinstance(state, dict) or _MASTERS not in state or "base_optimizer_state" not in state:
        raise NoStateError("is no state of ZeRO stage 1 or 2 that is known", file=path, hint=ALONE)
    return state


def _round_robin(path: Path) -> bool:
    """Whether the run's settings beside a partition divided gradients in turns."""
    root = getattr(open_file(path), "root", None)
    zero = root.get("ds_config") if isinstance(root, dict) else None
    zero = zero.get("zero_optimization") if isinstance(zero, dict) else None
    return isinstance(zero, dict) and zero.get("round_robin_gradients") is True


def _shapes(model: Path) -> list[dict[str, Shape]]:
    """Of each group, the parameters in their order, with their shapes."""
    root = getattr(open_file(model), "root", None)
    listed = root.get("param_shapes") if isinstance(root, dict) else None
    groups = listed if isinstance(listed, list) else [listed]
    out = []
    for group in groups:
        good = isinstance(group, dict) and all(
            type(name) is str and isinstance(shape, (tuple, list)) and all(type(n) is int and n >= 0 for n in shape)
            for name, shape in group.items()
        )
        if not good or not isinstance(group, dict):
            raise NoStateError("does not say in which order its parameters were trained (param_shapes)", file=model)
        out.append({name: tuple(shape) for name, shape in group.items()})
    return out


def _joined(parts: Sequence[Lazy], total: int, model: Path) -> Lazy:
    """The partitions of a group: what is behind its elements is padding."""
    held = sum(part.shape[0] if len(part.shape) == 1 else 0 for part in parts)
    if not total <= held <= total + _PADDING * len(parts):
        raise LayoutError(f"trains {total:,} elements in a group whose partitions hold {held:,}", file=model,
                          hint="files of several saves are mixed")  # fmt: skip
    return Concat(parts, 0) if len(parts) > 1 else parts[0]


def _base(part: Fields, g: int) -> Fields:
    """The state of a group; elastic checkpoints keep a list of them."""
    base = part["base_optimizer_state"]
    states = base.get("state") if isinstance(base, dict) else base
    held = (
        states.get(g)
        if isinstance(states, dict)
        else states[g]
        if isinstance(states, list) and g < len(states)
        else None
    )
    return held if isinstance(held, dict) else {}


def _tensor(part: Fields, role: str, g: int, model: Path) -> Lazy:
    masters = part[_MASTERS]
    own = masters[g] if isinstance(masters, list) and g < len(masters) else None
    found = own if role == MASTER else _base(part, g).get(role)
    if not isinstance(found, TensorRecord):
        raise NoStateError(f"has no {role} of group {g} beside it: {show(found)}", file=model,
                           hint="the state of Adam is read; that of other optimizers is not")  # fmt: skip
    return found


def _groups(part: Fields) -> Sequence[Fields]:
    base = part["base_optimizer_state"]
    groups = base.get("param_groups") if isinstance(base, dict) else None
    return groups if isinstance(groups, list) else []


def _settings(part: Fields, g: int, model: Path) -> Group | None:
    """None where it is not said, as in elastic checkpoints."""
    groups = _groups(part)
    return group_of(groups[g], model) if g < len(groups) and isinstance(groups[g], dict) else None


def _step(part: Fields, g: int, model: Path) -> float:
    """The most that anything says: a group's own count may be 0."""
    groups = _groups(part)
    said = [_base(part, g).get(STEP), part.get("base_optimizer_state_step"),
            groups[g].get(STEP) if g < len(groups) and isinstance(groups[g], dict) else None]  # fmt: skip
    counts = [number_of(s, model) if isinstance(s, Lazy) else s for s in said if s is not None]
    counts = [float(n) for n in counts if isinstance(n, (int, float)) and not isinstance(n, bool)]
    if not counts:
        raise FileError(f"does not say how often group {g} was updated", file=model)
    return max(counts)
