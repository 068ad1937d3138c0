"""OLMo's `config.yaml` (its `model` section) <-> Spec.

    found = read_model({"model": {"d_model": 4096, ...}}, "config.yaml")
    found.spec, found.facts, found.notes
    config = write_config(spec, facts, "sequential", 1, "tokenizer.json")

Defaults of keys that a config does not state are those of ai2-olmo 0.6.0 (olmo/config.py, ModelConfig); the keys of
mixtures of experts are from the branch on which OLMoE was trained.  What no other format could hold is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import ConfigError, show
from surgery.formats.keys import Entry, Fixed, Key, Keys, Pair, read, write
from surgery.formats.unknown import Unknown
from surgery.model.spec import Rope, Spec

UPSTREAM = "ai2-olmo 0.6.0"
ABSENT: Mapping[str, Any] = {
    "n_heads": 12, "n_kv_heads": None, "multi_query_attention": None, "mlp_ratio": 4, "mlp_hidden_size": None,
    "activation_type": "swiglu", "block_type": "sequential", "block_group_size": 1, "rope": False, "rope_theta": 10000,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "layer_norm_type": "default",
    "layer_norm_with_affine": True, "bias_for_layer_norm": None, "max_sequence_length": 1024, "vocab_size": 50257,
    "embedding_size": 50304, "eos_token_id": 50256, "pad_token_id": 50256, "norm_after": False,
}  # fmt: skip
# Keys that change nothing about the function of a trained model (dropout is off, kernels compute the same).
INERT = frozenset(
    """
    alibi_bias_max attention_dropout emb_init_std embedding_dropout flash_attention init_cutoff_factor init_device
    init_fn init_std mlp_ratio precision residual_dropout rope_full_precision scale_emb_init
    moe_capacity_factor moe_lbl_in_fp32 moe_log_expert_assignment moe_loss_weight moe_mlp_impl moe_zloss_weight
    """.split()
)
_FRESH = {"flash_attention": False, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
          "init_device": "cpu", "init_fn": "normal", "init_std": 0.02}  # fmt: skip
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


# ---------------------------------------------------------------------------------- keys that say something together


def _read_heads(keys: Keys) -> dict[str, Any]:
    """Heads, key/value heads and their width; two keys may say how many keys and values there are."""
    h, heads = keys.integer("d_model"), keys.integer("n_heads")
    stated, single = keys.maybe_integer("n_kv_heads"), keys.maybe_flag("multi_query_attention")
    groups = heads if single is None else (1 if single else heads)
    if stated is not None:
        if single is not None and stated != groups:
            raise ConfigError(f"n_kv_heads {stated} contradicts multi_query_attention {show(single)}", file=keys.file)
        if keys.get("block_type") == "llama" and stated != groups:
            raise ConfigError(f"blocks of type llama do not know n_kv_heads ({stated})", file=keys.file)
        groups = stated
    if h % heads or heads % groups or (h // heads) % 2:
        raise ConfigError(
            f"d_model {h}, {heads} heads and {groups} key/value heads do not fit together", file=keys.file
        )
    return {"kv_heads": groups, "group": heads // groups, "head_dim": h // heads}


def _write_heads(spec: Spec) -> dict[str, Any]:
    return {"n_heads": spec.heads, "n_kv_heads": spec.kv_heads, "multi_query_attention": None}


def _read_rows(keys: Keys) -> dict[str, Any]:
    rows = keys.integer("vocab_size")
    padded = keys.maybe_integer("embedding_size") or rows
    if padded < rows:
        raise ConfigError(f"embedding_size {padded} is less than vocab_size {rows}", file=keys.file)
    return {"vocab": padded, "true_vocab": rows}


def _write_rows(spec: Spec) -> dict[str, Any]:
    return {"vocab_size": spec.true_vocab or spec.vocab, "embedding_size": spec.vocab}


def _read_norms(keys: Keys) -> dict[str, Any]:
    rms = keys.choice("layer_norm_type", _NORMS) == "rms"
    affine, biased = keys.flag("layer_norm_with_affine"), bool(keys.maybe_flag("bias_for_layer_norm"))
    of_heads = keys.flag("attention_layer_norm")
    if of_heads and not (rms and keys.flag("attention_layer_norm_with_affine")):
        keys.refused.append("attention_layer_norm with norms that are not rms with weights")
    if rms and (not affine or biased):
        keys.refused.append("layer_norm_type rms without weights or with biases")
    after = keys.flag("norm_after") and keys.get("block_type") != "llama"
    norm = "rms" if rms else ("layer" if biased else "layer_no_bias") if affine else "none"
    return {"norm": norm, "norm_at": "post" if after else "pre", "qk_norm": "full" if of_heads else ""}


def _write_norms(spec: Spec) -> dict[str, Any]:
    return {
        "layer_norm_type": "rms" if spec.norm == "rms" else "default", "layer_norm_with_affine": spec.norm != "none",
        "bias_for_layer_norm": spec.norm == "layer", "norm_after": spec.norm_at == "post",
        "attention_layer_norm": spec.qk_norm == "full", "attention_layer_norm_with_affine": spec.qk_norm == "full",
    }  # fmt: skip


def _read_positions(keys: Keys) -> dict[str, Any]:
    length = keys.integer("max_sequence_length")
    if keys.flag("rope"):
        return {"rope": Rope(keys.real("rope_theta")), "context": length}
    return {"rope": None, "learned_positions": length, "context": length}


def _write_positions(spec: Spec) -> dict[str, Any]:
    base = int(spec.rope.base) if spec.rope else 10000  # a whole number
    length = spec.learned_positions or spec.context or 2048
    return {"rope": spec.rope is not None, "rope_theta": base, "max_sequence_length": length}


def _width(keys: Keys) -> int:
    """Rows of the first matrix of the mlp: gate and up together."""
    return keys.maybe_integer("mlp_hidden_size") or keys.integer("mlp_ratio") * keys.integer("d_model")


def _read_mlp(keys: Keys) -> dict[str, Any]:
    width, (act, glu) = _width(keys), _ACTS[keys.choice("activation_type", _ACTS)]
    if glu and width % 2:
        raise ConfigError(f"an mlp of width {width} cannot be halved into gate and up", file=keys.file)
    return {"ffn": width // 2 if glu else width, "act": act, "glu": glu}


def _write_mlp(spec: Spec) -> dict[str, Any]:
    names = {pair: name for name, pair in _ACTS.items()}
    width = (spec.expert_ffn if spec.experts else spec.ffn) * (2 if spec.glu else 1)
    return {"mlp_hidden_size": width, "activation_type": names.get((spec.act, spec.glu), spec.act)}


def _read_experts(keys: Keys) -> dict[str, Any]:
    if keys.choice("activation_type", _ACTS) != "swiglu":
        raise ConfigError("experts with another activation_type than swiglu are not supported", file=keys.file)
    if keys.integer("moe_top_k") > keys.integer("moe_num_experts"):
        raise ConfigError(f"moe_top_k {keys.get('moe_top_k')} of {keys.get('moe_num_experts')} experts", file=keys.file)
    return {"expert_ffn": _width(keys) // 2}


COMMON: tuple[Entry, ...] = (
    Key("d_model", "width", 768),
    Pair(_read_heads, _write_heads),
    Key("clip_qkv", "clip_qkv", None),
    Key("n_layers", "layers", 12),
    Fixed("alibi", False, ()),
    Pair(_read_positions, _write_positions),
    Fixed("embedding_layer_norm", False, ()),
    Pair(_read_norms, _write_norms),
    Key("layer_norm_eps", "norm_eps", 1e-5),
    Fixed("include_bias", False, (), absent=True),
    Fixed("scale_logits", False, ()),
    Pair(_read_rows, _write_rows),
    Key("weight_tying", "tied", True),
)
DENSE: tuple[Entry, ...] = (*COMMON, Pair(_read_mlp, _write_mlp))
MOE: tuple[Entry, ...] = (
    *COMMON,
    Key("moe_num_experts", "experts", 8),
    Key("moe_top_k", "top_k", 2),
    Pair(_read_experts, _write_mlp),
    Fixed("moe_dropless", True, (), means="false (tokens over an expert's capacity are dropped)"),
    Fixed("moe_shared_expert", False, ()),
    Fixed("moe_interleave", False, ()),
    Fixed("norm_after", False, (), written=False),  # the branch that OLMoE was trained on does not know it
)


def read_model(config: Mapping[str, Any], file: str, eos: int | None = None) -> Found:
    """The model behind a config.yaml; `eos` overrides its end-of-text id.

    Raises ConfigError naming every key that no Spec can express, or that contradicts another.
    """
    if not isinstance(config.get("model"), dict):
        raise ConfigError("has no section `model`", file=file, hint="OLMo's config.yaml describes the model there")
    keys = Keys(config["model"], file, "model", ABSENT)
    block = keys.choice("block_type", BLOCKS)
    fields = read(MOE if block == "moe" else DENSE, keys)
    keys.check()
    notes = []
    if block == "llama" and keys.flag("norm_after"):
        notes.append("norm_after has no effect in blocks of type llama, as in OLMo")
    if keys.get("layer_norm_type") == "low_precision":
        notes.append("layer_norm_type low_precision: the norms are taken as plain ones, which differ under autocast")
    facts, more = _ids(keys, eos)
    group = keys.integer("block_group_size")
    if block == "llama":
        facts["olmo_block_type"] = block
    if group > 1:
        facts["olmo_block_group_size"] = group
    notes += more + keys.note(UPSTREAM)
    notes += [Unknown(key, value) for key, value in keys.unknown(INERT | ABSENT.keys()).items()]
    section = config.get("tokenizer")
    identifier = section.get("identifier") if isinstance(section, dict) else None
    spec = Spec(family=_family(fields), **fields)
    return Found(spec, facts, tuple(notes), block, group, identifier if isinstance(identifier, str) else None)


def _family(fields: Mapping[str, Any]) -> str:
    if fields.get("experts"):
        return "olmoe"
    if fields["norm_at"] == "post":
        return "olmo2"
    return "llama" if fields["norm"] == "rms" else "olmo"


def _ids(keys: Keys, eos: int | None) -> tuple[dict[str, object], list[str]]:
    """Special token ids; early configs say 0 for the end of text, where the tokenizer has 50279."""
    stated, pad = keys.integer("eos_token_id", 0), keys.integer("pad_token_id", 0)
    notes = []
    if eos is None and stated == 0:
        notes.append("eos_token_id is 0, which early OLMo configs say by mistake for 50279 (-O eos_token_id=50279)")
    return {"eos_token_id": stated if eos is None else eos, "pad_token_id": pad}, notes


# ------------------------------------------------------------------------------------------------------- writing


def write_config(spec: Spec, facts: Mapping[str, object], block: str, group: int, tokenizer: str) -> dict[str, Any]:
    """A config.yaml that `OLMo.from_checkpoint` takes, of the model that comes nearest."""
    model = write(MOE if spec.experts else DENSE, spec)
    if block == "llama":
        model |= {"n_kv_heads": None, "multi_query_attention": spec.kv_heads == 1 and spec.group > 1}
    ids = {key: _id(facts, key, spec) for key in ("eos_token_id", "pad_token_id")}
    model |= {"block_type": "moe" if spec.experts else block, "block_group_size": group, **ids, **_FRESH}
    if spec.experts:
        model["moe_mlp_impl"] = "sparse"
    return {"run_name": "surgery", "model": model, "tokenizer": {"identifier": tokenizer}}


def kept(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """From OLMo to itself, what a config says besides the model (and inert keys of the model) stays as it was."""
    model = {k: v for k, v in old["model"].items() if k in INERT and k != "mlp_ratio"}
    return {**old, "model": {**new["model"], **model}}


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
