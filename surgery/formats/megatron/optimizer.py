"""Adam's state in Megatron's legacy files: numbered in model_optim_rng.pt, or flat in distrib_optim.pt beside it.

    states = read_states(ranks, args, topology)          # ranks: {Rank(): RankFile}

Without the distributed optimizer parameters are numbered through the groups, those of a group in the order of `model`;
masters stand in `fp32_from_fp16_params`.  With it they lie in flat buffers (buffers.py), which of several data-parallel
ranks the first one stores.  Two optimizers (parameters.py) stand in a list.
Source: megatron/core `optimizer/optimizer.py`, `optimizer/distrib_optimizer.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.containers import open_file
from surgery.errors import FileError, LayoutError, NoStateError, SurgeryError, show
from surgery.formats.megatron.buffers import borders_of, buffers_of, holder, put_buffers
from surgery.formats.megatron.files import RankFile
from surgery.formats.megatron.parameters import Found, Parameter, belongs, groups_of, put_settings, trained_by
from surgery.formats.optimizer import ALONE, MASTER, MOMENTS, States, group_of, one_step
from surgery.formats.topology import Rank, Topology
from surgery.formats.torch_states import Fields, step_of, tensor_of

FLAT = "distrib_optim.pt"
KEYS = ("optimizer", "optimizer_state_dict")  # the second: of old releases
MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")


def read_states(ranks: Mapping[Rank, RankFile], args: Fields, topology: Topology) -> States | None:
    """None if no rank has a state.  Raises SurgeryError if a rank's state does not fit its weights."""
    found = Found()
    held = {rank: _optimizers(file) for rank, file in ranks.items()}
    if not any(held.values()):
        return None
    beside = functools.cache(_beside)
    for rank, file in ranks.items():
        optimizers = held[rank]
        if not optimizers:
            raise FileError("holds no optimizer's state, but other ranks do", file=file.path)
        for which, optimizer in enumerate(optimizers):
            if not (mine := _parameters(file, which if len(optimizers) > 1 else None)):
                continue  # a stage without experts has an optimizer of none
            inner = optimizer.get("optimizer", optimizer)
            groups = groups_of(inner, file.path)
            if inner.get("state"):
                _numbered(found, rank, mine, optimizer, inner["state"], groups, file.path)
            else:
                path = ranks[holder(rank, topology, experts=bool(which))].path.with_name(FLAT)
                put_buffers(found, rank, mine, buffers_of(beside(path, which), path), borders_of(args, rank), path)
                put_settings(found, mine, groups, file.path)
                found.files.append(path)
    roles = {role: shards for role, shards in found.roles.items() if shards}
    return States(roles, one_step(found.steps, next(iter(ranks.values())).path), found.groups,
                  files=tuple(dict.fromkeys(found.files)))  # fmt: skip


def _optimizers(file: RankFile) -> list[Fields]:
    """The optimizers of a rank: one, or those of dense and of expert parameters."""
    value = next((file.root[key] for key in KEYS if file.root.get(key)), None)
    found = value if isinstance(value, list) else [value] if value is not None else []
    if not all(isinstance(optimizer, dict) for optimizer in found) or len(found) > 2:
        raise NoStateError(f"holds an optimizer of an unknown form: {show(found)}", file=file.path)
    return found


def _parameters(file: RankFile, which: int | None) -> list[Parameter]:
    """What is trained, in the order of the model; of two optimizers, that of the experts is the second."""
    every = (Parameter(v, name, weight) for v, chunk in enumerate(file.chunks) for name, weight in chunk.items())
    return trained_by(which, every)


# ------------------------------------------------------------------------------------------ numbered parameters


def _numbered(
    found: Found, rank: Rank, mine: Sequence[Parameter], optimizer: Fields, states: object, groups: Sequence[Fields],
    path: Path,
) -> None:  # fmt: skip
    """States by number, masters by group."""
    if not isinstance(states, dict):
        raise NoStateError("holds an optimizer's state of an unknown form", file=path)
    masters = next((optimizer[key] for key in MASTERS if key in optimizer), None)
    owners = _divided(mine, groups, path)
    for i, (group, owned) in enumerate(zip(groups, owners, strict=True)):
        settings = group_of(group, path)
        for number, parameter in zip(group["params"], owned, strict=True):
            fields = states.get(number) if type(number) is int else None
            if not isinstance(fields, dict):
                raise LayoutError(f"has no state of {show(parameter.name)}", file=path, hint=ALONE)
            found.steps.append(step_of(fields, group, path))
            found.groups[parameter.name] = settings
            for role in MOMENTS:
                found.put(role, rank, parameter, tensor_of(fields, role, path))
        rounded = [p for p in owned if p.weight.dtype != "float32"]
        own = masters[i] if isinstance(masters, list) and i < len(masters) else []
        if not isinstance(own, list) or len(own) != len(rounded):
            raise FileError(f"does not hold a master for each of the {len(rounded)} weights of group {i}", file=path)
        for parameter, master in zip(rounded, own, strict=True):
            found.put(MASTER, rank, parameter, tensor_of({MASTER: master}, MASTER, path))
    found.files.append(path)


def _divided(mine: Sequence[Parameter], groups: Sequence[Fields], path: Path) -> list[list[Parameter]]:
    """The parameters of each group.  Newer runs may let the norms of q and k decay: the numbers tell."""
    for spared in (False, True):
        out = [[p for p in mine if belongs(p, group, groups, spared)] for group in groups]
        counts = [len(group["params"]) if isinstance(group.get("params"), list) else -1 for group in groups]
        if [len(owned) for owned in out] == counts:
            return out
    raise NoStateError(f"groups {counts} parameters, its model has {[len(owned) for owned in out]} of these kinds",
                       file=path, hint=ALONE)  # fmt: skip


# ------------------------------------------------------------------------------------------------- flat buffers


def _beside(path: Path, which: int) -> object:
    """What a file holds of one of its optimizers."""
    if not path.is_file():
        kept = any(path.parent.parent.glob(f"*/{FLAT}"))  # those of other ranks
        kind: type[SurgeryError] = FileError if kept else NoStateError
        raise kind("is missing, which holds the optimizer's state", file=path, hint=f"copy it; {ALONE}")
    root = getattr(open_file(path), "root", None)
    if isinstance(root, list) and (which >= len(root) or root[which] is None):
        raise FileError(f"holds nothing of optimizer {which}", file=path, hint=ALONE)
    return root[which] if isinstance(root, list) else root
