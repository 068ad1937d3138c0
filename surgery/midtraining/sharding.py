"""A model divided among processes: parameters by torch's FSDP2, experts by transformers' expert parallelism.

    shard(model, mixtures, world, Parallel(ep=2), precision)    # a model without memory, before it has weights
    place = place_of(world, parameter)     # which box of the whole is here, and whether this process answers for it
    run = trunk(model)                     # what comes before the head, with the head's weight at hand behind it

Three sizes make up the world: `replicate` copies of the model, each divided over `fsdp` processes, among which the
experts are divided once more: `ep` processes have whole experts of their own and send each other tokens, and what is
left, fsdp / ep, divides each expert.  All of them see rows of their own.  Embedding, last norm and head are gathered as
long as a pass lasts, for the loss is made of hidden states and the head's weight; layers are gathered one by one.

Gradients are summed, never averaged: each process divides its losses by the labels of all.  That holds for experts as
well, whose tokens come from several processes, so no factor depends on how the model is divided.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from surgery.errors import ConfigError
from surgery.midtraining.parallel import World
from surgery.midtraining.precision import Precision
from surgery.midtraining.routers import Mixture
from surgery.midtraining.settings import Parallel
from surgery.tensors.lazy import Box, whole

TRUNK = "surgery_trunk"
EXPERTS = "ep_dispatch_experts"  # transformers' name of modules with experts of their own, in its plans


@dataclass(frozen=True)
class Sizes:
    """replicate * fsdp is the number of processes, and ep divides fsdp."""

    replicate: int = 1
    fsdp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, wanted: Parallel, world: int) -> Sizes:
        """Raises ConfigError if they do not divide."""
        fsdp = wanted.fsdp if isinstance(wanted.fsdp, int) else world // wanted.replicate
        if fsdp * wanted.replicate != world:
            raise ConfigError(f"parallel: {wanted.replicate} copies over {wanted.fsdp} processes are not {world}, "
                              "which there are", hint="fsdp: auto, or start other processes")  # fmt: skip
        if fsdp % wanted.ep:
            raise ConfigError(f"parallel.ep: {wanted.ep} do not divide the {fsdp} processes that share a copy")
        return cls(wanted.replicate, fsdp, wanted.ep)


def shard(model: Any, mixtures: Sequence[Mixture], world: World, wanted: Parallel, precision: Precision) -> None:
    """Divide a model that has no memory yet, in place; nothing happens for one process.

    Raises ConfigError for sizes that do not fit, or a family whose experts transformers cannot divide.
    """
    if world.size == 1:
        return
    sizes = Sizes.of(wanted, world.size)
    kind = world.device.partition(":")[0]
    dense = init_device_mesh(kind, (sizes.replicate, sizes.fsdp, 1), mesh_dim_names=("replicate", "fsdp", "tp"))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if precision.name == "bf16" else MixedPrecisionPolicy()
    if sizes.ep > 1:
        expert = init_device_mesh(kind, (sizes.replicate, sizes.fsdp // sizes.ep, sizes.ep),
                                  mesh_dim_names=("replicate", "efsdp", "ep"))  # fmt: skip
        for module in divide_experts(model, expert["ep"], dense["tp"]):
            fully_shard(module, mesh=_over(expert, "efsdp"), mp_policy=policy)
    mesh = _over(dense, "fsdp")
    for mixture in mixtures:
        fully_shard(mixture.router, mesh=mesh)  # in fp32, whatever the rest is in
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, TRUNK, MethodType(_trunk, model))
    register_fsdp_forward_method(model, TRUNK)


def _over(mesh: DeviceMesh, shards: str) -> DeviceMesh:
    return mesh["replicate", shards] if mesh["replicate"].size() > 1 else mesh[shards]


def layers_of(model: Any) -> list[Any]:
    """The layers, whatever the family calls them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def divide_experts(model: Any, among: DeviceMesh, alone: DeviceMesh) -> list[Any]:
    """Give each process of `among` experts of its own, by transformers' plan for the family; returns their modules.

    Raises ConfigError if transformers has no such plan, or they do not divide.
    """
    try:
        from transformers.distributed.expert_parallel import apply_expert_parallelism
    except ImportError:
        raise ConfigError("parallel.ep: this transformers cannot divide experts", hint="transformers >= 5.23") from None
    plan = _expanded(getattr(model, "ep_plan", None) or {}, model)
    found = [model.get_submodule(name) for name, style in plan.items() if style == EXPERTS]
    if not found:
        raise ConfigError(f"parallel.ep: transformers has no plan to divide the experts of {model.config.model_type}",
                          hint="parallel.ep: 1 divides them as all other parameters")  # fmt: skip
    if found[0].num_experts % among.size():
        raise ConfigError(f"parallel.ep: {found[0].num_experts} experts cannot be divided among {among.size()}")
    apply_expert_parallelism(model, among, alone, plan)
    return found


def _expanded(plan: Mapping[str, str], model: Any) -> dict[str, str]:
    """A plan with * for the number of a layer, for every module and parameter that it means."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_modules())]
    patterns = {re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in plan.items()}
    return {name: style for pattern, style in patterns.items() for name in names if pattern.fullmatch(name)}


# ---------------------------------------------------------------------------------------------------------- the passes


def _trunk(model: Any, **given: Any) -> Any:
    return model.base_model(**given)


def trunk(model: Any) -> Any:
    """The model without its head.  After it the weight of the head is whole until the backward pass is over."""
    return getattr(model, TRUNK, None) or model.base_model


def at_rest(model: Any) -> Any:
    """The model, with every parameter divided again, where a pass without gradients has left some whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


# --------------------------------------------------------------------------------------------------------------- boxes


@dataclass(frozen=True)
class Place:
    """`box` of the whole is here; of the processes that have the same, one `answers` for it."""

    box: Box
    answers: bool


def place_of(world: World, tensor: torch.Tensor) -> Place:
    """Where what this process holds of a tensor lies in the whole."""
    if not isinstance(tensor, DTensor):
        return Place(whole(tuple(tensor.shape)), world.main)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape) == tuple(tensor.to_local().shape), (shape, tensor.placements)
    at = tensor.device_mesh.get_coordinate()
    assert at is not None
    answers = all(i == 0 for i, p in zip(at, tensor.placements, strict=True) if p.is_replicate())
    return Place(tuple((a, a + n) for a, n in zip(offset, shape, strict=True)), answers)
