"""Adam's state in Megatron's `torch_dist` folders, under the keys of the weights.

    states = read_states(dcp, root, weights)                  # two variants by weight, a third in cells
    tensors, entry = stored_states(written, ranks[Rank()], {})    # `fully_reshardable`

optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.KEY   plain optimizers, in the shape of the weight
optimizer.state.{exp_avg,exp_avg_sq,param}.KEY        `fully_reshardable` (core 0.15 and later), likewise
optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.KEY   `fully_sharded_model_space` (before): a grid of cells, each flat
                                                      along a last axis: [X/x, Y/y, x * y]
The two variants that keep the buffers of ranks are read in rank_buffers.py.
Source: megatron/core `optimizer/distrib_optimizer.py`, `optimizer/optimizer.py` (sharded_state_dict).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from surgery.containers.dcp import Dcp
from surgery.errors import LayoutError, show
from surgery.formats.optimizer import MASTER, MOMENTS, Group, M, States, V, Written, group_of, one_step
from surgery.formats.topology import Rank
from surgery.formats.torch_states import step_of
from surgery.formats.weave import Stored
from surgery.tensors.axes import Rearrange
from surgery.tensors.lazy import Lazy

STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(param|fp32_param|exp_avg|exp_avg_sq)\.(.+)")
_ROLES = {"param": MASTER, "fp32_param": MASTER, M: M, V: V}
_SPARED = re.compile(r"bias$|norm(?:\.weight|_weight)$")
_DEPTH = 6
TYPE = "fully_reshardable"
Rates = Mapping[str, float]


def read_states(dcp: Dcp, root: Mapping[Any, Any], weights: Mapping[str, Lazy]) -> States | None:
    """`root` is the common state.  None if there is no state; raises LayoutError for a variant that is not read."""
    roles: dict[str, dict[str, Lazy]] = {role: {} for role in (MASTER, *MOMENTS)}
    for name, tensor in dcp.tensors.items():
        if m := STATE.fullmatch(name):
            roles[_ROLES[m[1]]][m[2]] = _like(m[2], tensor, weights, dcp.path)
    if not roles[M]:
        return None
    entries = list(_mappings(root.get("optimizer"), _DEPTH))
    listed = [entry["param_groups"] for entry in entries if isinstance(entry.get("param_groups"), list)]
    groups = [group for each in listed for group in each if isinstance(group, dict)]
    steps = [step_of({}, group, dcp.folder) for group in groups if "step" in group]
    steps += [step_of({"step": entry["common_step"]}, {}, dcp.folder) for entry in entries if "common_step" in entry]
    shards = {role: {Rank(): tensors} for role, tensors in roles.items() if tensors}
    return States(shards, one_step(steps, dcp.folder), _by_name(groups, roles[M], dcp))


def _like(key: str, tensor: Lazy, weights: Mapping[str, Lazy], file: str) -> Lazy:
    """A state in the shape of its weight: put together from cells where it is stored so."""
    weight = weights.get(key)
    if weight is None or tensor.shape == weight.shape:
        return tensor  # what is no state of a weight is named by whoever takes these
    *grid, size = tensor.shape
    fits = len(grid) == len(weight.shape) and all(n and not w % n for n, w in zip(grid, weight.shape, strict=True))
    cell = [w // n for n, w in zip(grid, weight.shape, strict=True)] if fits else []
    if not fits or math.prod(cell) != size:
        raise LayoutError(f"the state of {show(key)} has the shape {list(tensor.shape)[:8]}, which are no cells of its "
                          f"weight's {list(weight.shape)[:8]}", file=file)  # fmt: skip
    outer, inner = [f"g{i}" for i in range(len(grid))], [f"c{i}" for i in range(len(grid))]
    sizes = dict(zip((*outer, *inner), (*grid, *cell), strict=True))
    return Rearrange(tensor, (*((a,) for a in outer), tuple(inner)), tuple(zip(outer, inner, strict=True)), sizes)


def _mappings(node: object, depth: int) -> Iterator[Mapping[Any, Any]]:
    """Every mapping in the optimizers, one or several, of a common state."""
    if not depth:
        return
    if isinstance(node, dict):
        yield node
    values = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    for value in values:
        yield from _mappings(value, depth - 1)


def decays(key: str) -> bool:
    """Whether Megatron lets a parameter decay: all but biases and norms."""
    return not _SPARED.search(key)


def _by_name(groups: Sequence[Mapping[Any, Any]], keys: Mapping[str, Lazy], dcp: Dcp) -> dict[str, Group]:
    kinds = {bool(group.get("wd_mult", 1.0)): group_of(group, dcp.folder) for group in groups}
    if len(kinds) == 1:  # all of them do alike
        return dict.fromkeys(keys, *kinds.values())
    return {key: kinds[decays(key)] for key in keys if decays(key) in kinds}


# ------------------------------------------------------------------------------------------------------- writing


def megatron_groups(written: Written, names: Collection[str], rates: Rates) -> list[dict[str, Any]]:
    """The two groups that every Megatron has: what decays, and what does not.  Their steps are whole numbers, which
    fused kernels ask for.

    `rates` (`max_lr`, `min_lr`) would take the place of a run's own arguments: a group without them follows these.
    Raises LayoutError if the source's settings differ in more: Megatron would not apply them.
    """
    return [{**_group(written, [n for n in names if decays(n) == kind] or names, kind), **rates}
            for kind in (True, False)]  # fmt: skip


def _group(written: Written, names: Collection[str], kind: bool) -> dict[str, Any]:
    found = written.shared(names, "Megatron's optimizer")
    lr, decay = found.lr if found.lr is not None else 0.0, found.weight_decay if kind else 0.0
    return {
        "wd_mult": float(kind), "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False,
        "default_config": True, "lr": lr, "betas": found.betas, "eps": found.eps, "weight_decay": decay,
        "bias_correction": True, "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
        "differentiable": False, "fused": None, "decoupled_weight_decay": True, "step": written.step,
    }  # fmt: skip


def stored_states(
    written: Written, names: Mapping[str, Stored], rates: Rates
) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors of `fully_reshardable`, and the common state's entry `optimizer`."""
    mine = [name for name, stored in names.items() if not stored.copy]
    masters = written.roles[MASTER][Rank()]
    tensors = {f"optimizer.state.{role}.{name}": written.roles[role][Rank()][name] for name in mine for role in MOMENTS}
    tensors |= {f"optimizer.state.param.{name}": masters.get(name, Stored(names[name].tensor, True)) for name in mine}
    groups = {"param_groups": megatron_groups(written, names, rates)}
    return tensors, {"optimizer": groups, "param_state": {}, "param_state_sharding_type": TYPE}
