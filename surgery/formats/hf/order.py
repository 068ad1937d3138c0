"""The order in which transformers registers a model's parameters, which numbers the states of an optimizer.

    in_order("llama", names)            # embedding, layer by layer, final norm, head
    spared("model.norm.weight")         # True: the Trainer lets it not decay

Source: transformers 5 `models/<family>/modeling_<family>.py`, `trainer.py` (get_decay_parameter_names).  The names are
those of modules in memory, where the experts of a layer are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from surgery.errors import NoStateError, some
from surgery.formats.optimizer import ALONE

_FIRST = ("model.embed_tokens", "gpt_neox.embed_in", "transformer.wte", "transformer.wpe")
_LAST = ("model.norm", "gpt_neox.final_layer_norm", "transformer.ln_f", "lm_head")
_ATTENTION = tuple(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
_NORMS = ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")


def _glu(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{x}_proj" for x in ("gate", "up", "down"))


_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_SHARED = (*_glu("mlp.shared_expert"), "mlp.shared_expert_gate", *_glu("mlp.shared_experts"))
_DENSE = (*_ATTENTION, *_glu("mlp"), *_NORMS)
_GATE_FIRST = (*_ATTENTION, "mlp.gate", *_EXPERTS, *_SHARED, *_glu("mlp"), *_NORMS)
_EXPERTS_FIRST = (*_ATTENTION, *_EXPERTS, "mlp.gate", *_SHARED, *_glu("mlp"), *_NORMS)
_GRANITE = (*_ATTENTION, *_NORMS, *(f"block_sparse_moe.{x}" for x in ("router", "experts.gate_up_proj",
            "experts.down_proj")), "shared_mlp.input_linear", "shared_mlp.output_linear")  # fmt: skip
_NEOX = (*_NORMS, "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_GPT2 = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
# family -> the modules of a layer in their order
LAYERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite", "olmo", "olmo2", "olmo3"), _DENSE),
    **dict.fromkeys(("mixtral", "qwen2_moe", "olmoe", "flex_olmo", "ernie4_5_moe"), _GATE_FIRST),
    **dict.fromkeys(("qwen3_moe", "glm4_moe"), _EXPERTS_FIRST),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), _GRANITE),
    "gpt_neox": _NEOX,
    "gpt2": _GPT2,
}
_LAYER = re.compile(r"(?:model\.layers|gpt_neox\.layers|transformer\.h)\.(\d+)\.(.+)")
_LAYERNORM = re.compile(r"(?:^|\.)(?:ln_[12f]|final_layer_norm)\.|^gpt_neox\..*layernorm")  # torch's own, not RMSNorm
_SPARED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)|(?:^|\.)ln_[12f]\.")


def in_order(family: str, names: Iterable[str]) -> list[str]:
    """The names of parameters, sorted.  Raises NoStateError for a family or a name that is not known here."""
    if family not in LAYERS:
        what = f"the order of a {family}'s parameters is not known, in which a Trainer numbers their states"
        raise NoStateError(what, hint=ALONE)
    places = {name: _place(name, LAYERS[family]) for name in names}
    if odd := [name for name, place in places.items() if place is None]:
        raise NoStateError(f"the place of {some(odd)} among a {family}'s parameters is not known", hint=ALONE)
    return sorted(places, key=lambda name: places[name] or ())


def _place(name: str, inside: tuple[str, ...]) -> tuple[int, ...] | None:
    found = _LAYER.fullmatch(name)
    module, leaf = re.fullmatch(r"(.*?)(\.weight|\.bias|)", found[2] if found else name).groups()  # type: ignore[union-attr]
    known = inside if found else (*_FIRST, *_LAST)
    if module not in known:
        return None
    at, kind = known.index(module), int(leaf == ".bias")
    return (1, int(found[1]), at, kind) if found else (0 if module in _FIRST else 2, 0, at, kind)


def spared(name: str) -> bool:
    """Whether the Trainer spares a parameter from weight decay: biases and norms."""
    return _SPARED.search(name) is not None


def spared_before(name: str) -> bool:
    """Whether a Trainer did before it went by names (2024): biases, and norms that are torch's own LayerNorm."""
    return "bias" in name or _LAYERNORM.search(name) is not None
