"""Attention as a mixture: groups of heads are experts, of which a token uses some.

    made = with_attention(checkpoint, experts=4, top_k=2, seed=0)       # of a dense model, or of a Mixtral
    made.spec.family, made.parts["layers.0.attn.router"].shape          # "attention_moe", (4, width)

The router's weights sum to one and are multiplied by sqrt(experts x top_k): all of the groups, weighted alike, then
count once each, which is the dense attention; of fewer, the variance stays (Qu et al. 2411.15708).  No family of
transformers has such layers: `formats/hf/hub/modeling_attention_moe.py`, which lies beside the weights, computes them.
"""

from __future__ import annotations

import math
from dataclasses import replace

from surgery.errors import ConfigError, UsageError
from surgery.formats.base import Checkpoint
from surgery.formats.hf.config import misfits
from surgery.model.spec import Spec
from surgery.model.wording import in_words
from surgery.running.device import CPU, Device
from surgery.tensors.lazy import Fill, Lazy
from surgery.tensors.random import Random
from surgery.upcycling.dense_to_moe.build import upcycled
from surgery.upcycling.dense_to_moe.settings import Settings
from surgery.upcycling.edit_experts.experts import Changed
from surgery.upcycling.proof import refuse_losses

FAMILY = "attention_moe"
MLP = "mixtral"  # the family whose experts it has in the mlp
STD = 0.02  # of a router that chooses


def attended(source: Checkpoint, wanted: Settings, on: Device = CPU) -> Changed:
    """The source with groups of heads as experts and, if `wanted` says so, with experts in the mlp.

    Raises UsageError if the groups do not fit the heads, or if the function would change and that was not allowed,
    ConfigError if the modelling file cannot compute the model.
    """
    count, top_k = wanted.attention_experts, wanted.attention_top_k or wanted.attention_experts
    check(source.spec, count, top_k)
    losses = [f"attention: a token uses {top_k} of {count} groups of heads"] if top_k < count else []
    refuse_losses(losses, wanted.force_lossy)
    details: dict[str, object] = {"attention_experts": count, "attention_top_k": top_k,
                                  "attention_scale": scale_of(count, top_k)}  # fmt: skip
    base, rounds = source, False
    if wanted.experts:
        if wanted.target not in ("auto", MLP):
            raise UsageError(f"--attention-experts and --target {wanted.target} do not go together",
                             hint=f"--target {MLP}")  # fmt: skip
        mixture = upcycled(source, replace(wanted, target=MLP), on=on)
        base, rounds = mixture.checkpoint, mixture.layout.rounds
        losses += mixture.layout.losses
        details["mlp"] = mixture.to_json()
    made = with_attention(base, count, top_k, wanted.seed)
    return Changed(made, (source,), "attention experts", tuple(losses), details, rounds, family=FAMILY)


def scale_of(experts: int, top_k: int) -> float:
    return math.sqrt(experts * top_k)


def check(spec: Spec, experts: int, top_k: int) -> None:
    """Raise UsageError if the groups do not fit the heads, ConfigError if the family cannot hold the model."""
    if not 0 < top_k <= experts:
        raise UsageError(f"--attention-top-k {top_k} of --attention-experts {experts}: choose fewer")
    if spec.kv_heads % experts:
        raise UsageError(
            f"--attention-experts {experts} do not divide {spec.kv_heads} key/value heads",
            hint=f"choose from {', '.join(str(d) for d in range(1, spec.kv_heads + 1) if spec.kv_heads % d == 0)}",
        )
    if gaps := misfits(_attended(spec, experts, top_k), FAMILY):
        raise ConfigError(
            f"attention experts are for models like Llama; this {spec.family} has {in_words(gaps)}",
            hint="leave out --attention-experts",
        )


def _attended(spec: Spec, experts: int, top_k: int) -> Spec:
    return spec.replace(family=FAMILY, attn_experts=experts, attn_top_k=top_k, attn_scale=scale_of(experts, top_k))


def with_attention(source: Checkpoint, experts: int, top_k: int, seed: int) -> Checkpoint:
    """The checkpoint with a router beside every attention: zeros where all groups are chosen, as the dense model."""
    spec, routers = _attended(source.spec, experts, top_k), dict[str, Lazy]()
    for layer in range(spec.layers):
        name, dtype = f"layers.{layer}.attn.router", source.parts[f"layers.{layer}.attn.q"].dtype
        shape = (experts, spec.width)
        routers[name] = Fill(shape, dtype) if top_k == experts else Random(shape, dtype, name, seed, std=STD)
    parts = {name: routers.get(name) or source.parts[name] for name in spec.part_names()}
    return replace(source, spec=spec, parts=parts)
