"""OLMo's `config.yaml` (its `model` section) <-> Spec.

    found = read_model({"model": {"d_model": 4096, ...}}, "config.yaml")
    found.spec, found.facts, found.notes
    config = write_config(spec, facts, "sequential", 1)

Defaults of keys that a config does not state are those of ai2-olmo 0.6.0 (olmo/config.py, ModelConfig); the keys of
mixtures of experts are from the branch on which OLMoE was trained.  What no other format could hold is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import ConfigError, show
from surgery.formats.typed_keys import TypedKeys
from surgery.model.spec import Rope, Spec

UPSTREAM = "ai2-olmo 0.6.0"
ABSENT: Mapping[str, Any] = {
    "d_model": 768, "n_heads": 12, "n_kv_heads": None, "clip_qkv": None, "n_layers": 12, "mlp_ratio": 4,
    "mlp_hidden_size": None, "activation_type": "swiglu", "block_type": "sequential", "block_group_size": 1,
    "alibi": False, "rope": False, "rope_theta": 10000, "multi_query_attention": None, "attention_layer_norm": False,
    "embedding_layer_norm": False, "layer_norm_type": "default", "layer_norm_with_affine": True,
    "layer_norm_eps": 1e-5, "attention_layer_norm_with_affine": True, "max_sequence_length": 1024,
    "include_bias": True, "bias_for_layer_norm": None, "scale_logits": False, "vocab_size": 50257,
    "embedding_size": 50304, "weight_tying": True, "eos_token_id": 50256, "pad_token_id": 50256, "norm_after": False,
}  # fmt: skip
ABSENT_MOE: Mapping[str, Any] = {
    "moe_num_experts": 8, "moe_top_k": 2, "moe_dropless": True, "moe_shared_expert": False, "moe_interleave": False,
    "moe_mlp_impl": "sparse",
}  # fmt: skip
# Keys that change nothing about the function of a trained model (dropout is off, kernels compute the same).
INERT = frozenset(
    """
    alibi_bias_max attention_dropout emb_init_std embedding_dropout flash_attention init_cutoff_factor init_device
    init_fn init_std mlp_ratio precision residual_dropout rope_full_precision scale_emb_init
    moe_capacity_factor moe_lbl_in_fp32 moe_log_expert_assignment moe_loss_weight moe_mlp_impl moe_zloss_weight
    """.split()
)
BLOCKS = ("sequential", "llama", "moe")
_ACTS = {"swiglu": ("silu", True), "gelu": ("gelu", False), "relu": ("relu", False)}
_NORMS = ("default", "low_precision", "rms")


@dataclass(frozen=True)
class Found:
    """What a config says: the model, inert facts under Hugging Face's names, how blocks are built and grouped."""

    spec: Spec
    facts: Mapping[str, object]
    notes: tuple[str, ...]
    block_type: str
    group: int
    tokenizer: str | None = None


def read_model(config: Mapping[str, Any], file: str, eos: int | None = None) -> Found:
    """The model behind a config.yaml; `eos` overrides its end-of-text id.

    Raises ConfigError naming every key that no Spec can express, or that contradicts another.
    """
    model = config.get("model")
    if not isinstance(model, dict):
        raise ConfigError("has no section `model`", file=file, hint="OLMo's config.yaml describes the model there")
    moe = model.get("block_type") == "moe"
    keys = TypedKeys(model, file, "model", {**ABSENT, **(ABSENT_MOE if moe else {})})
    block = keys.choice("block_type", BLOCKS)
    _refuse(keys, moe)
    fields: dict[str, Any] = {**_sizes(keys, block), **_norms(keys, block), **_positions(keys)}
    fields |= _experts(keys, fields.pop("mlp")) if moe else _dense(keys, fields.pop("mlp"))
    notes = []
    if block == "llama" and keys.flag("norm_after"):
        notes.append("norm_after has no effect in blocks of type llama, as in OLMo")
    if keys.get("layer_norm_type") == "low_precision":
        notes.append("layer_norm_type low_precision: the norms are taken as plain ones, which differ under autocast")
    spec = Spec(family=_family(fields), tied=keys.flag("weight_tying"), **fields)
    ids, more = _ids(keys, eos)
    facts: dict[str, object] = {**ids}
    group = keys.integer("block_group_size")
    if block == "llama":
        facts["olmo_block_type"] = block
    if group > 1:
        facts["olmo_block_group_size"] = group
    notes += more + keys.note(UPSTREAM)
    notes += [f"config.yaml key {show(k)} is not understood and has no effect here" for k in keys.unknown(INERT)]
    section = config.get("tokenizer")
    identifier = section.get("identifier") if isinstance(section, dict) else None
    return Found(spec, facts, tuple(notes), block, group, identifier if isinstance(identifier, str) else None)


def _refuse(keys: TypedKeys, moe: bool) -> None:
    """Raise ConfigError with everything that no other format holds."""
    names = ["alibi", "include_bias", "scale_logits", "embedding_layer_norm"]
    if moe:  # the branch that OLMoE was trained on has no norm_after
        names += ["moe_shared_expert", "moe_interleave", "norm_after"]
    problems = [f"{name}: true" for name in names if keys.flag(name)]
    if moe and not keys.flag("moe_dropless"):
        problems.append("moe_dropless: false (tokens over an expert's capacity are dropped)")
    rms = keys.choice("layer_norm_type", _NORMS) == "rms"
    if keys.flag("attention_layer_norm") and not (rms and keys.flag("attention_layer_norm_with_affine")):
        problems.append("attention_layer_norm with norms that are not rms with weights")
    if rms and (not keys.flag("layer_norm_with_affine") or keys.maybe_flag("bias_for_layer_norm")):
        problems.append("layer_norm_type rms without weights or with biases")
    if problems:
        raise ConfigError(f"the model has {'; '.join(problems)}, which is not supported", file=keys.file)


def _sizes(keys: TypedKeys, block: str) -> dict[str, Any]:
    h, heads = keys.integer("d_model"), keys.integer("n_heads")
    groups = _kv_heads(keys, heads, block)
    if h % heads or heads % groups or (h // heads) % 2:
        raise ConfigError(
            f"d_model {h}, {heads} heads and {groups} key/value heads do not fit together", file=keys.file
        )
    rows = keys.integer("vocab_size")
    padded = keys.maybe_integer("embedding_size") or rows
    if padded < rows:
        raise ConfigError(f"embedding_size {padded} is less than vocab_size {rows}", file=keys.file)
    width = keys.maybe_integer("mlp_hidden_size")
    return {
        "layers": keys.integer("n_layers"), "width": h, "vocab": padded, "true_vocab": rows, "kv_heads": groups,
        "group": heads // groups,
        "head_dim": h // heads, "clip_qkv": keys.maybe_real("clip_qkv"),
        "mlp": width or keys.integer("mlp_ratio") * h,
    }  # fmt: skip


def _kv_heads(keys: TypedKeys, heads: int, block: str) -> int:
    """How many key/value heads, from the two keys that may say it."""
    stated, single = keys.maybe_integer("n_kv_heads"), keys.maybe_flag("multi_query_attention")
    implied = heads if single is None else (1 if single else heads)
    if stated is None:
        return implied
    if single is not None and stated != implied:
        raise ConfigError(f"n_kv_heads {stated} contradicts multi_query_attention {show(single)}", file=keys.file)
    if block == "llama" and stated != implied:
        raise ConfigError(f"blocks of type llama do not know n_kv_heads ({stated})", file=keys.file)
    return stated


def _norms(keys: TypedKeys, block: str) -> dict[str, Any]:
    affine, biased = keys.flag("layer_norm_with_affine"), bool(keys.maybe_flag("bias_for_layer_norm"))
    norm = "rms" if keys.get("layer_norm_type") == "rms" else "none"
    if norm == "none" and affine:
        norm = "layer" if biased else "layer_no_bias"
    after = keys.flag("norm_after") and block != "llama"
    return {
        "norm": norm, "norm_at": "post" if after else "pre", "norm_eps": keys.real("layer_norm_eps"),
        "qk_norm": "full" if keys.flag("attention_layer_norm") else "",
    }  # fmt: skip


def _positions(keys: TypedKeys) -> dict[str, Any]:
    length = keys.integer("max_sequence_length")
    if keys.flag("rope"):
        return {"rope": Rope(keys.real("rope_theta")), "context": length}
    return {"rope": None, "learned_positions": length, "context": length}


def _dense(keys: TypedKeys, width: int) -> dict[str, Any]:
    act, glu = _ACTS[keys.choice("activation_type", _ACTS)]
    if glu and width % 2:
        raise ConfigError(f"an mlp of width {width} cannot be halved into gate and up", file=keys.file)
    return {"ffn": width // 2 if glu else width, "act": act, "glu": glu}


def _experts(keys: TypedKeys, width: int) -> dict[str, Any]:
    if keys.choice("activation_type", _ACTS) != "swiglu":
        raise ConfigError("experts with another activation_type than swiglu are not supported", file=keys.file)
    experts, top = keys.integer("moe_num_experts"), keys.integer("moe_top_k")
    if top > experts:
        raise ConfigError(f"moe_top_k {top} of {experts} experts", file=keys.file)
    return {"experts": experts, "top_k": top, "expert_ffn": width // 2}


def _family(fields: Mapping[str, Any]) -> str:
    if fields.get("experts"):
        return "olmoe"
    if fields["norm_at"] == "post":
        return "olmo2"
    return "llama" if fields["norm"] == "rms" else "olmo"


def _ids(keys: TypedKeys, eos: int | None) -> tuple[dict[str, object], list[str]]:
    """Special token ids; early configs say 0 for the end of text, where the tokenizer has 50279."""
    stated, pad = keys.integer("eos_token_id", 0), keys.integer("pad_token_id", 0)
    notes = []
    if eos is None and stated == 0:
        notes.append("eos_token_id is 0, which early OLMo configs say by mistake for 50279 (-O eos_token_id=50279)")
    return {"eos_token_id": stated if eos is None else eos, "pad_token_id": pad}, notes


# ------------------------------------------------------------------------------------------------------- writing


def write_config(spec: Spec, facts: Mapping[str, object], block: str, group: int, tokenizer: str) -> dict[str, Any]:
    """A config.yaml that `OLMo.from_checkpoint` takes, of the model that comes nearest."""
    model = _write_model(spec, facts, block, group)
    return {"run_name": "surgery", "model": model, "tokenizer": {"identifier": tokenizer}}


def kept(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """From OLMo to itself, what a config says besides the model (and inert keys of the model) stays as it was."""
    model = {k: v for k, v in old["model"].items() if k in INERT and k != "mlp_ratio"}
    return {**old, "model": {**new["model"], **model}}


def to_yaml(config: Mapping[str, Any]) -> bytes:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode()


def _write_model(spec: Spec, facts: Mapping[str, object], block: str, group: int) -> dict[str, Any]:
    base = spec.rope.base if spec.rope else 10000.0
    width = (spec.expert_ffn if spec.experts else spec.ffn) * (2 if spec.glu else 1)
    acts = {pair: name for name, pair in _ACTS.items()}
    model: dict[str, Any] = {
        "d_model": spec.width,
        "n_heads": spec.heads,
        "n_kv_heads": None if block == "llama" else spec.kv_heads,
        "multi_query_attention": (spec.kv_heads == 1 and spec.group > 1) if block == "llama" else None,
        "clip_qkv": spec.clip_qkv,
        "n_layers": spec.layers,
        "mlp_hidden_size": width,
        "activation_type": acts.get((spec.act, spec.glu), spec.act),
        "block_type": "moe" if spec.experts else block,
        "block_group_size": group,
        "alibi": False,
        "rope": spec.rope is not None,
        "rope_theta": int(base),
        "flash_attention": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": spec.qk_norm == "full",
        "attention_layer_norm_with_affine": spec.qk_norm == "full",
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "embedding_layer_norm": False,
        "layer_norm_type": "rms" if spec.norm == "rms" else "default",
        "layer_norm_with_affine": spec.norm != "none",
        "layer_norm_eps": spec.norm_eps,
        "bias_for_layer_norm": spec.norm == "layer",
        "norm_after": spec.norm_at == "post",
        "max_sequence_length": spec.learned_positions or spec.context or 2048,
        "include_bias": False,
        "scale_logits": False,
        "vocab_size": spec.true_vocab or spec.vocab,
        "embedding_size": spec.vocab,
        "weight_tying": spec.tied,
        "eos_token_id": _id(facts, "eos_token_id", spec),
        "pad_token_id": _id(facts, "pad_token_id", spec),
        "init_device": "cpu",
        "init_fn": "normal",
        "init_std": 0.02,
    }
    if spec.experts:
        model |= {"moe_num_experts": spec.experts, "moe_top_k": spec.top_k, "moe_dropless": True,
                  "moe_mlp_impl": "sparse",
                  "moe_shared_expert": False, "moe_interleave": False}  # fmt: skip
    return model


def _id(facts: Mapping[str, object], key: str, spec: Spec) -> int:
    """A token id from Hugging Face's config, which may also be null or a list; OLMo wants a number."""
    value = facts.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    other = facts.get("eos_token_id") if key == "pad_token_id" else None
    for found in (value, other):
        if type(found) is int and 0 <= found < spec.vocab:
            return found
    return (spec.true_vocab or spec.vocab) - 1
