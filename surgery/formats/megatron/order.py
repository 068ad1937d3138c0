"""The order in which Megatron registers its parameters, which numbers their optimizer's state.

sorted(names, key=place)          # embedding, layer by layer, final norm, output layer

Source: megatron/core `models/gpt/gpt_model.py`, `transformer/transformer_layer.py`, `transformer/attention.py`,
`transformer/moe/moe_layer.py`; Transformer Engine registers the norm of a fused layer before its weight.
"""

from __future__ import annotations

import re

_OUTSIDE = ("embedding.word_embeddings", "embedding.position_embeddings", "decoder.layers", "decoder.final_layernorm",
            "output_layer")  # fmt: skip
_INSIDE = ("input_layernorm", "self_attention.linear_proj", "self_attention.linear_qkv", "self_attention.q_layernorm",
           "self_attention.k_layernorm", "pre_mlp_layernorm", "mlp.router", "mlp.experts.local_experts",
           "mlp.experts.weight1", "mlp.experts.weight2", "mlp.experts.linear_fc1", "mlp.experts.linear_fc2",
           "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2", "mlp.shared_experts.gate_weight",
           "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip
_LEAF = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc(\d)\.")


def place(name: str) -> tuple[int, ...]:
    """What a parameter of a chunk is sorted by."""
    if not (found := LAYER.fullmatch(name)):
        return _first(name, _OUTSIDE), 0, 0, 0, 0, *_leaf(name)
    inner = found[2]
    expert = _EXPERT.match(inner)
    among = (int(expert[1]), int(expert[2])) if expert else (0, 0)
    return _OUTSIDE.index("decoder.layers"), int(found[1]), _first(inner, _INSIDE), *among, *_leaf(inner)


def _first(name: str, known: tuple[str, ...]) -> int:
    return next((i for i, start in enumerate(known) if name.startswith(start)), len(known))


def _leaf(name: str) -> tuple[int, int]:
    """weight before bias, weight2 before weight10."""
    leaf = re.sub(r"\d+$", "", name.rpartition(".")[2])
    number = re.search(r"\d+$", name)
    return (_LEAF.index(leaf) if leaf in _LEAF else len(_LEAF)), int(number[0]) if number else 0
