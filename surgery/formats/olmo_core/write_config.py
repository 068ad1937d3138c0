"""A Spec as OLMo-core's `config.json`: what `TransformerConfig.from_dict` takes, and the tokenizer's numbers.

    config = write_config(spec, facts, dtype="bfloat16", experts="dropless")
    config["model"]["block"]["name"]                 # "reordered_norm"

Layers that differ from most (another rope, no experts) become overrides.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from surgery.formats.keys import write
from surgery.formats.olmo_core.config import ATTENTION, EXPERTS, FEED_FORWARD, MODEL, ROUTER
from surgery.formats.olmo_core.rope import CLASS, write_rope, write_window
from surgery.model.spec import Spec

_NN = "olmo_core.nn."
_NORMS = {"rms": ("rms", True, False), "layer": ("default", True, True), "layer_no_bias": ("default", True, False),
          "none": ("default", False, False)}  # fmt: skip


def write_config(
    spec: Spec, facts: Mapping[str, object], dtype: str, experts: str, tokenizer: str | None = None
) -> dict[str, Any]:
    """config.json for this model, or for the one that comes nearest."""
    return {"model": _model(spec, dtype, experts), "dataset": _dataset(spec, facts, tokenizer)}


def to_json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def _model(spec: Spec, dtype: str, experts: str) -> dict[str, Any]:
    blocks = [_block(spec, layer, dtype, experts) for layer in range(spec.layers)]
    texts = [json.dumps(block, sort_keys=True) for block in blocks]
    usual = Counter(texts).most_common(1)[0][0]
    overrides = {str(i): blocks[i] for i, text in enumerate(texts) if text != usual}
    model: dict[str, Any] = {
        **write(MODEL, spec),
        "block": blocks[texts.index(usual)],
        "lm_head": {
            "name": "default", "layer_norm": _norm(spec, dtype), "bias": False, "dtype": dtype,
            "loss_implementation": "default", CLASS: _NN + "lm_head.LMHeadConfig",
        },
        "name": "moe" if spec.experts else "default",
        "dtype": dtype,
        "init_method": "normal",
        "init_seed": 0,
        "init_std": 0.02,
        CLASS: _NN + "transformer.config.TransformerConfig",
    }  # fmt: skip
    return model | ({"block_overrides": overrides} if overrides else {})


def _block(spec: Spec, layer: int, dtype: str, experts: str) -> dict[str, Any]:
    moe, post = spec.is_moe(layer), spec.norm_at == "post"
    name = ("moe_reordered_norm" if post else "moe") if moe else ("reordered_norm" if post else "default")
    mlp = {"feed_forward_moe": _moe(spec, dtype, experts)} if moe else {"feed_forward": _feed_forward(spec, dtype)}
    return {
        "sequence_mixer": _attention(spec, layer, dtype),
        "layer_norm": _norm(spec, dtype),
        **mlp,
        "name": name,
        CLASS: _NN + "transformer.config.TransformerBlockConfig",
    }


def _norm(spec: Spec, dtype: str) -> dict[str, Any]:
    name, affine, bias = _NORMS[spec.norm]
    config = {
        "name": name,
        "eps": spec.norm_eps,
        "bias": bias,
        "dtype": dtype,
        CLASS: _NN + "layer_norm.LayerNormConfig",
    }
    return config if affine else {**config, "elementwise_affine": False}


def _attention(spec: Spec, layer: int, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {"name": "default", "n_heads": spec.heads, "n_kv_heads": spec.kv_heads}
    if spec.head_dim * spec.heads != spec.width:
        config["head_dim"] = spec.head_dim
    config |= {k: v for k, v in write(ATTENTION, spec).items() if v is not None}
    rope = spec.rope_local if spec.rope_local and spec.windows and spec.windows[layer] else spec.rope
    if rope is not None:
        config["rope"] = write_rope(rope, spec.head_dim)
    if spec.qk_norm:
        config |= {"qk_norm": _norm(spec, dtype), "use_head_qk_norm": spec.qk_norm == "head"}
    if spec.windows:
        config["sliding_window"] = write_window(spec.windows)
    return {**config, "dtype": dtype, CLASS: _NN + "attention.AttentionConfig", "type": "attention"}


def _feed_forward(spec: Spec, dtype: str) -> dict[str, Any]:
    return {
        "name": "default",
        **write(FEED_FORWARD, spec),
        "dtype": dtype,
        CLASS: _NN + "feed_forward.FeedForwardConfig",
    }


def _moe(spec: Spec, dtype: str, experts: str) -> dict[str, Any]:
    router = {"name": "default", **write(ROUTER, spec), CLASS: _NN + "moe.router.MoERouterConfig"}
    config = {"name": experts, **write(EXPERTS, spec), "router": router, "lb_loss_weight": 0.01, "z_loss_weight": 0.001,
              "dtype": dtype, CLASS: _NN + "moe.moe.MoEConfig"}  # fmt: skip
    if experts == "default":  # room for all tokens at every expert, so that none are dropped
        config["capacity_factor"] = float(-(-spec.experts // spec.top_k))
    return config


def _dataset(spec: Spec, facts: Mapping[str, object], tokenizer: str | None) -> dict[str, Any]:
    """What a run says of its data: the tokenizer's numbers, and how long sequences are."""
    ids = {}
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = facts.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and 0 <= value < spec.vocab:
            ids[name] = value
    ids.setdefault("eos_token_id", (spec.true_vocab or spec.vocab) - 1)
    ids.setdefault("pad_token_id", ids["eos_token_id"])
    config: dict[str, Any] = {"vocab_size": spec.true_vocab or spec.vocab, **ids}
    if tokenizer:
        config["identifier"] = tokenizer
    dataset: dict[str, Any] = {"tokenizer": {**config, CLASS: "olmo_core.data.tokenizer.TokenizerConfig"}}
    return dataset | ({"sequence_length": spec.context} if spec.context else {})
