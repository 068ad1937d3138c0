"""Tiny random models of every family, built by transformers: all sizes differ, so that no swapped axis goes unseen.

    tiny.save("llama", tmp_path / "model")                       # config.json and model.safetensors
    tiny.save("qwen3_moe", tmp_path / "m", "bfloat16", v=256)    # another dtype, another size

Every size is one of `SIZES` (layers 6, experts 8, groups 4, three query heads each, ...): pairwise distinct, two or
more of everything on each of two ranks.  All weights are random, norms and biases too, and large enough for every
one of them to show in the logits.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SIZES = {"l": 6, "h": 120, "v": 264, "g": 4, "n": 3, "half": 5, "f": 144, "e": 8, "m": 56}
WIDER = {"h": 104}  # families that say the width of a head: all heads together are wider than the model
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def _theta(base: float, **more: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, **more}}


_MOE = {"num_experts_per_tok": 3}
_GRANITE = {"rms_norm_eps": 1e-5, "intermediate_size": "m", "num_local_experts": "e", "attention_multiplier": 10**-0.5}
_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
# name -> model_type, other sizes, further keys of the config
FAMILIES: Mapping[str, tuple[str, Mapping[str, int], Mapping[str, object]]] = {
    "llama": ("llama", {}, {"rms_norm_eps": 1e-5, "max_position_embeddings": 128, **_theta(10000.0)}),
    "llama3": ("llama", {}, {"rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "rope_parameters": LLAMA3}),
    "llama_tied": ("llama", {}, {"rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "tie_word_embeddings": True,
                                 "rope_parameters": {**LLAMA3, "factor": 32.0}}),
    "mistral": ("mistral", WIDER, {"rms_norm_eps": 1e-5, "sliding_window": 7, **_theta(20000.0)}),
    "qwen2": ("qwen2", {}, {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, **_theta(1e6)}),
    "qwen3": ("qwen3", WIDER, {"rms_norm_eps": 1e-6, **_theta(1e6)}),
    "mixtral": ("mixtral", WIDER, {"rms_norm_eps": 1e-5, "intermediate_size": "m", "num_local_experts": "e", **_MOE,
                                   **_theta(1e6)}),
    "qwen3_moe": ("qwen3_moe", WIDER, {"rms_norm_eps": 1e-6, "num_experts": "e", "moe_intermediate_size": "m", **_MOE,
                                       "norm_topk_prob": True, "mlp_only_layers": [0], **_theta(1e6)}),
    "qwen2_moe": ("qwen2_moe", {}, {"rms_norm_eps": 1e-6, "num_experts": "e", "moe_intermediate_size": "m", **_MOE,
                                    "shared_expert_intermediate_size": 40, "norm_topk_prob": False,
                                    "mlp_only_layers": [0, 4], **_theta(1e6)}),
    "granite": ("granite", {}, {"rms_norm_eps": 1e-5, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                                "attention_multiplier": 0.2, "logits_scaling": 6.0, **_theta(20000.0)}),
    "granitemoe": ("granitemoe", {}, {**_GRANITE, **_MOE, **_theta(20000.0)}),
    "granitemoeshared": ("granitemoeshared", {}, {**_GRANITE, **_MOE, "shared_intermediate_size": 40,
                                                  **_theta(20000.0)}),
    "glm4_moe": ("glm4_moe", WIDER, {"rms_norm_eps": 1e-5, "n_routed_experts": "e", "moe_intermediate_size": "m",
                                     **_MOE, "n_shared_experts": 2, "routed_scaling_factor": 2.5, "n_group": 1,
                                     "first_k_dense_replace": 2, "num_nextn_predict_layers": 0,
                                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                         "partial_rotary_factor": 0.6}}),
    "ernie4_5_moe": ("ernie4_5_moe", {}, {"rms_norm_eps": 1e-5, "moe_num_experts": "e", "moe_intermediate_size": "m",
                                          "moe_k": 3, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
                                          "moe_layer_end_index": 4, **_theta(5e5)}),
    "olmo": ("olmo", {}, {"clip_qkv": 2.0, **_theta(10000.0)}),
    "olmo2": ("olmo2", {}, {"rms_norm_eps": 1e-6, **_theta(500000.0)}),
    "olmo3": ("olmo3", {}, {"rms_norm_eps": 1e-6, "sliding_window": 9, "layer_types": _SLIDING,
                            "rope_parameters": {
                                "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
                                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}),
    "olmoe": ("olmoe", {}, {"rms_norm_eps": 1e-5, "intermediate_size": "m", "num_experts": "e", **_MOE,
                            "norm_topk_prob": False, **_theta(10000.0)}),
    "flex_olmo": ("flex_olmo", {}, {"rms_norm_eps": 1e-6, "intermediate_size": "m", "num_experts": "e", **_MOE,
                                    "norm_topk_prob": True, **_theta(500000.0)}),
    "gpt_neox": ("gpt_neox", {}, {"layer_norm_eps": 1e-5, "use_parallel_residual": True, "hidden_act": "gelu",
                                  "attention_bias": True,
                                  **_theta(10000.0, partial_rotary_factor=0.4)}),
    "gpt2": ("gpt2", {}, {"n_inner": "f", "n_positions": 128, "activation_function": "gelu_new",
                          "tie_word_embeddings": True}),
}  # fmt: skip


def config(family: str, **changes: Any) -> Any:
    """The transformers config of a tiny model; `changes` are sizes (`v=256`) or keys of the config."""
    from transformers import AutoConfig

    model_type, sizes, keys = FAMILIES[family]
    axes = {**SIZES, **sizes, **{k: x for k, x in changes.items() if k in SIZES}}
    heads = axes["g"] * axes["n"]
    values: dict[str, Any] = {
        "hidden_size": axes["h"],
        "num_hidden_layers": axes["l"],
        "vocab_size": axes["v"],
        "num_attention_heads": heads,
        "num_key_value_heads": axes["g"],
        "intermediate_size": axes["f"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    if model_type in ("gpt_neox", "gpt2"):
        del values["num_key_value_heads"]
    elif sizes:
        values["head_dim"] = 2 * axes["half"]
    values |= {k: axes[x] if isinstance(x, str) and x in axes else x for k, x in keys.items()}
    values |= {k: x for k, x in changes.items() if k not in SIZES}
    return AutoConfig.for_model(model_type, **values)


def model(family: str, **changes: Any) -> Any:
    """A tiny model in float32, always the same one for the same arguments."""
    from transformers import AutoModelForCausalLM

    built = AutoModelForCausalLM.from_config(config(family, **changes), attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(zlib.crc32(family.encode()))
    with torch.no_grad():
        for name, parameter in sorted(built.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return built


def save(family: str, folder: Path, dtype: str = "float32", **changes: Any) -> Path:
    """Write a tiny model as a Hugging Face folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model(family, **changes).to(getattr(torch, dtype)).save_pretrained(folder)
    return Path(folder)
