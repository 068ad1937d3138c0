"""What every way to run experts starts from: their weights in one layout, and the pairs of tokens and experts in order.

    weights = expert_weights(module)              # as [expert, in, out], cast where autocast is on
    pairs = ordered(experts_TK, module.num_experts)
    rows_NH = gathered(x_TH, pairs)               # a row for every pair, those of expert 0 first
    y_TH = combined(rows_NH, weights_TK, pairs)

T tokens, K experts of each, N = T * K pairs, E experts, H width of the model, F width of an expert, G = 2 F or F.
`module` is one that transformers runs through its experts interface (integrations/moe.py, use_experts_implementation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """up [E, H, G]: gate and up as the module packs them, or up alone; down [E, F, H]; biases [E, G] and [E, H]."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def expert_weights(module: Any, cast: bool = True) -> ExpertWeights:
    """Views of the module's parameters; in `computation_dtype`, unless the backend casts them itself."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    dtype = computation_dtype(up)
    if not module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if cast:
        up, down = up.to(dtype), down.to(dtype)
    biases = [getattr(module, f"{n}_bias").to(dtype) for n in (name, "down_proj")] if module.has_bias else [None, None]
    return ExpertWeights(up, down, *biases)


def computation_dtype(weight: Tensor) -> torch.dtype:
    """What autocast says, else the dtype of the weights."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def activated(module: Any, rows: Tensor) -> Tensor:
    """[n, G] -> [n, F], by the module's own function."""
    out: Tensor = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    return out


def finished(module: Any, rows: Tensor) -> Tensor:
    """The norm that some families have behind every expert."""
    return module.post_expert_norm(rows) if module.has_post_expert_norm else rows


def here(module: Any, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Under expert parallelism a number beyond this rank's experts means one of another rank: it counts as zero."""
    if not module._is_expert_parallel:
        return experts, weights
    elsewhere = experts >= module.num_experts
    return experts.clamp(max=module.num_experts - 1), weights.masked_fill(elsewhere, 0.0)


@dataclass(frozen=True)
class Pairs:
    """Pairs of a token and an expert, sorted by expert; pair p = t * K + k is the k-th choice of token t.

    order   [N] the pair at each place                 experts  [N] the expert at each place
    place   [N] the place of each pair                 ends     int32 [E]: expert e has the places ends[e-1]:ends[e]
    """

    order: Tensor
    place: Tensor
    experts: Tensor
    ends: Tensor
    top_k: int


def ordered(experts: Tensor, count: int) -> Pairs:
    """Nothing is dropped, and nothing is read back from the device.  experts: [T, K] of 0 ... count - 1."""
    sorted_experts, order = torch.sort(experts.reshape(-1), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(sorted_experts, torch.arange(count, device=order.device), right=True)
    return Pairs(order, place, sorted_experts, ends.int(), experts.shape[-1])


def gathered(x: Tensor, pairs: Pairs) -> Tensor:
    """[T, H] -> [N, H]: the token of every pair."""
    rows: Tensor = _Gather.apply(x, pairs.order, pairs.place, pairs.top_k)  # type: ignore[no-untyped-call]
    return rows


def combined(rows: Tensor, weights: Tensor, pairs: Pairs) -> Tensor:
    """[N, H], [T, K] -> [T, H]: every token's rows, weighted and summed."""
    back: Tensor = _Restore.apply(rows, pairs.order, pairs.place)  # type: ignore[no-untyped-call]
    back = back.unflatten(0, (-1, pairs.top_k)) * weights.unsqueeze(-1)
    return back.sum(1)


class _Gather(torch.autograd.Function):
    """Its gradient is a gather too: that of indexing would add up rows one by one, on a GPU in a random order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(0, place).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Restore(torch.autograd.Function):
    """The order of tokens again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None
