"""Attention experts in training: transformers' own layers, whose groups of heads are weighted by a router.

    model = empty_with_attention_experts(source, "float32", Device("cpu"), "sdpa", "eager")
    logits, weights, experts = model.model.layers[0].self_attn.router(x)     # as the router of any mixture

What `formats/hf/hub/modeling_attention_moe.py` computes, on a Llama, Qwen2 or Mixtral of transformers: masks, caches,
documents of a row, experts of the mlp and activation checkpointing are theirs.  A hook gives each attention the weights
of its groups; they reach a function of transformers' attention interface, which multiplies the heads' outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surgery.errors import ConfigError
from surgery.formats.base import Checkpoint
from surgery.formats.hf.config import choose_family
from surgery.model.spec import Spec
from surgery.running.device import Device
from surgery.running.layerwise import empty_model

BY_GROUP = "surgery_by_group_"  # before the name of the attention whose heads are weighted
PLAIN = "llama"  # the family that is tried first for what is left without the routers


class HeadRouter(torch.nn.Module):
    """Chooses `top_k` groups of heads for every token."""

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__()
        assert spec.attn_scale is not None
        self.top_k, self.scale = spec.attn_top_k, spec.attn_scale
        self.weight = torch.nn.Parameter(torch.empty(spec.attn_experts, spec.width, dtype=dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., width] -> logits [tokens, groups], weights and numbers of the chosen [tokens, top_k]; the weights
        sum to the scale, in fp32."""
        logits = torch.nn.functional.linear(x.flatten(0, -2), self.weight)
        best = logits.float().topk(self.top_k, -1)
        return logits, best.values.softmax(-1) * self.scale, best.indices


def empty_with_attention_experts(source: Checkpoint, dtype: str, on: Device, attention: str, experts: str) -> Any:
    """The model without memory for its weights; arguments as in `empty_model`.

    Raises ConfigError for sparse attention and for implementations that transformers knows by their names.
    """
    spec = source.spec
    if spec.sparse:
        raise ConfigError("attention experts and sparse attention do not go together", hint="attention: full")
    plain = spec.replace(family=PLAIN, attn_experts=0, attn_top_k=0, attn_scale=None)
    model = empty_model(replace(source, spec=plain.replace(family=choose_family(plain))), dtype, on, attention, experts)
    model.set_attn_implementation(_weighted(attention))
    for layer in model.model.layers:
        with torch.device("meta"):
            layer.self_attn.router = HeadRouter(spec, layer.self_attn.q_proj.weight.dtype)
        layer.self_attn.register_forward_pre_hook(_route, with_kwargs=True)
    return model


def _route(attention: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before an attention runs: `shares` [batch, length, groups], zero for groups that a token does not use."""
    x = given["hidden_states"]
    logits, weights, chosen = attention.router(x)
    shares = torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, chosen, weights)
    return args, given | {"shares": shares.unflatten(0, x.shape[:-1])}


def _weighted(attention: str) -> str:
    """Tell transformers of an attention whose heads are weighted by group; returns the name that it knows it by."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if "sdpa" not in attention:
        raise ConfigError(f"model.attention: {attention} cannot weight attention experts", hint="leave it out")
    attend = AttentionInterface()[attention]

    def by_group(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, shares: Tensor, **more: Any
    ) -> tuple[Tensor, None]:
        out, _ = attend(module, query, key, value, mask, **more)  # [batch, length, heads, head width]
        groups = out.unflatten(2, (shares.shape[-1], -1))
        return (groups * shares[..., None, None].to(out.dtype)).flatten(2, 3), None

    AttentionInterface.register(BY_GROUP + attention, by_group)
    AttentionMaskInterface.register(BY_GROUP + attention, AttentionMaskInterface()[attention])
    return BY_GROUP + attention
