"""OLMo-core's `config.json` (its `model` section) <-> Spec.

    found = read_model({"model": {"d_model": 4096, "block": {...}, ...}, "dataset": {...}}, "config.json")
    found.spec, found.variant, found.notes
    config = write_config(spec, facts, dtype="bfloat16", experts="dropless")

A config describes blocks, one for all layers, with overrides by layer, or by name in a pattern; what they say is
compared layer by layer.  Values of None are left out by upstream, so absent keys have upstream's defaults.
Source: OLMo-core 3.0 `nn/transformer/config.py`, `nn/attention/__init__.py`, `nn/moe/moe.py`, `nn/layer_norm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.errors import ConfigError, show
from surgery.formats.keys import Entry, Fixed, Key, Keys, Pair, read
from surgery.formats.olmo_core.rope import ROPE, read_rope, read_window
from surgery.formats.unknown import Unknown
from surgery.model.spec import Rope, Spec

UPSTREAM = "OLMo-core 3.0"
# keys of every section that act in training alone, and those of old releases
_TRAINING = {"init_method", "init_seed", "init_std", "embedding_init_std", "freeze_params", "dtype", "_CLASS_", "type"}
_OLD = {"compile", "dp_config", "tp_config", "float8_config", "ac_config", "fused_ops", "use_flash"}
_INERT_ATTENTION = {"dropout", "backend", "use_flash", "use_recompute_qkv_prep"} | {
    f"mxfp8_{name}" for name in ("projections", "qkv_projection", "out_projection", "save_qkv_for_backward")
}
_INERT_MOE = {"capacity_factor", "lb_loss_weight", "lb_loss_granularity", "z_loss_weight", "scale_loss_by_num_layers"}
_NORM_AT = {"default": "pre", "reordered_norm": "post", "moe": "pre", "moe_reordered_norm": "post"}
_RMS = ("rms", "qwen_rms", "nemotron_rms", "cute_rms", "fused_rms")


def _unset(*names: str) -> tuple[Fixed, ...]:
    return tuple(Fixed(name, None, (False,), written=False) for name in names)


MODEL: tuple[Entry, ...] = (
    Key("d_model", "width"),
    Key("vocab_size", "vocab"),
    Key("n_layers", "layers"),
    Key("tie_word_embeddings", "tied", False),
)
FEED_FORWARD: tuple[Entry, ...] = (
    Key("hidden_size", "ffn"),
    Key("bias", "mlp_bias", True),
    Key("activation", "act", "silu", {"silu": "silu", "gelu_tanh": "gelu_tanh"}),
)
EXPERTS: tuple[Entry, ...] = (
    Key("num_experts", "experts", 1), Key("hidden_size", "expert_ffn", 256), *_unset("shared_mlp", "latent_moe"),
)  # fmt: skip


def _read_renormalised(keys: Keys) -> dict[str, Any]:
    power = keys.maybe_real("normalize_expert_weights")
    gate = keys.choice("gating_function", ("softmax", "topk_softmax"))
    if power not in (None, 1.0):
        raise ConfigError(f"{keys.path('normalize_expert_weights')} is {power:g}: only 1 is supported", file=keys.file)
    return {"top_k_renormalised": power is not None or gate == "topk_softmax"}


def _write_renormalised(spec: Spec) -> dict[str, Any]:
    return {"gating_function": "softmax", **({"normalize_expert_weights": 1.0} if spec.top_k_renormalised else {})}


ROUTER: tuple[Entry, ...] = (
    Key("top_k", "top_k", 1),
    Pair(_read_renormalised, _write_renormalised),
    Pair(
        lambda keys: {"router_bias": keys.maybe_real("bias_gamma") is not None},
        lambda spec: {"bias_gamma": 0.001} if spec.router_bias else {},
    ),
    *_unset("uniform_expert_assignment", "random_expert_assignment"),
)


def _read_bias(keys: Keys) -> dict[str, Any]:
    return dict.fromkeys(("qkv_bias", "o_bias"), keys.flag("bias"))


ATTENTION: tuple[Entry, ...] = (
    Pair(_read_bias, lambda spec: {"bias": spec.qkv_bias}),
    Key("clip_qkv", "clip_qkv", None),
    *_unset("gate", "scalable_softmax", "qk_norm_per_head_gains", "attention_sinks", "softmax_scale"),
)
_ATTENTION = {"name": "default", "type": "attention", "n_kv_heads": None, "head_dim": None, "bias": True, "rope": None,
              "qk_norm": None, "sliding_window": None, "use_head_qk_norm": False}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How tensors are laid out, which their names do not tell."""

    interleaved: bool = False  # rotary pairs lie side by side (rope.name: complex)
    fused: bool = False  # q, k and v are one tensor (attention.name: fused, fused_v2)
    experts: str = "dropless"  # default: w1 and w3 of the experts are transposed


@dataclass(frozen=True)
class Block:
    """What the config of one layer says: the fields of a Spec that all layers share, and those that may differ."""

    shared: Mapping[str, Any]
    variant: Variant
    rope: Rope | None
    window: int
    dense: Mapping[str, Any] | None
    moe: Mapping[str, Any] | None


@dataclass(frozen=True)
class Found:
    """What a config says: the model, how its tensors are laid out, inert facts under Hugging Face's names."""

    spec: Spec
    variant: Variant
    facts: Mapping[str, object]
    notes: tuple[str, ...]
    tokenizer: str | None = None


def read_model(config: Mapping[str, Any], file: str, positions: int | None = None) -> Found:
    """The model behind a config.json.  Raises ConfigError naming whatever no Spec can express."""
    if not isinstance(config.get("model"), dict):
        raise ConfigError("has no section `model`", file=file, hint="this is no config.json of an OLMo-core checkpoint")
    absent = {"name": "default", "block_pattern": None, "block_overrides": None, "embed_scale": None}
    keys = Keys(config["model"], file, "model", absent)
    keys.choice("name", ("default", "moe"))
    fields = read((*MODEL, *_unset("embedding_norm")), keys)
    _is_one(keys, "embed_scale")
    layers = fields["layers"]
    blocks = [_block(keys, place, block, i) for i, (place, block) in enumerate(_resolve(keys, layers))]
    fields |= _merge(blocks, file)
    _read_head(keys, fields)
    keys.check()
    facts, v_true, identifier = _tokenizer(config, file)
    length, notes = _positions(config, positions)
    spec = Spec(family=_family(fields), true_vocab=v_true, context=length, **fields)
    variant = blocks[0].variant
    moe = next((b.variant for b in blocks if b.moe), variant)
    notes += keys.note(UPSTREAM)
    if spec.experts and moe.experts == "default":
        notes.append("in OLMo-core these experts drop tokens over their capacity; elsewhere they compute all")
    notes += [Unknown(key, value) for key, value in keys.unknown(_TRAINING | _OLD).items()]
    return Found(spec, replace(variant, experts=moe.experts), facts, tuple(notes), identifier)


def _is_one(keys: Keys, name: str) -> None:
    if keys.maybe_real(name) not in (None, 1.0):
        raise ConfigError(f"{keys.path(name)} is not 1, which is not supported", file=keys.file)


def _resolve(keys: Keys, layers: int) -> list[tuple[str, Any]]:
    """(place in the config, block) of every layer."""
    block, pattern, overrides = keys.get("block"), keys.get("block_pattern"), keys.get("block_overrides")
    if pattern is not None:
        names = pattern if isinstance(pattern, list) else []
        if not names or not isinstance(block, dict) or any(type(n) is not str or n not in block for n in names):
            raise ConfigError("model.block_pattern does not name blocks of model.block", file=keys.file)
        return [(f"model.block.{n}", block[n]) for n in (names[i % len(names)] for i in range(layers))]
    out = [("model.block", block)] * layers
    for key, override in (overrides or {}).items() if isinstance(overrides, dict) else ():
        if not (str(key).isdigit() and int(key) < layers):
            raise ConfigError(f"model.block_overrides has the layer {show(key)} of {layers}", file=keys.file)
        out[int(key)] = (f"model.block_overrides.{key}", override)
    return out


def _block(model: Keys, place: str, block: object, layer: int) -> Block:
    """What the config of one layer says."""
    if not isinstance(block, dict):
        raise ConfigError(f"{place} is {show(block)}, not a mapping", file=model.file)
    absent = dict.fromkeys(("attention", "feed_forward", "feed_forward_moe", "attention_residual_alpha",
                            "feed_forward_residual_alpha"))  # fmt: skip
    keys = model.over(block, place, {"name": "default", **absent}, _TRAINING | {"dropout"})
    name = keys.choice("name", _NORM_AT)
    for alpha in ("attention_residual_alpha", "feed_forward_residual_alpha"):
        _is_one(keys, alpha)
    shared = {"norm_at": _NORM_AT[name], **_norm(keys, "layer_norm")}
    attention, variant, rope, window = _attention(
        keys, shared, model.integer("d_model"), layer, model.integer("n_layers")
    )
    dense, moe, experts = None, None, "dropless"
    if name.startswith("moe"):
        moe, experts = _experts(keys)
    else:
        below = _present(keys, "feed_forward").below("feed_forward", {"name": "default"}, _TRAINING)
        below.choice("name", ("default",))
        dense = read(FEED_FORWARD, below)
    return Block({**shared, **attention}, replace(variant, experts=experts), rope, window, dense, moe)


def _present(keys: Keys, section: str) -> Keys:
    """The keys themselves.  Raises ConfigError if there is no such section."""
    if not keys.section(section):
        raise ConfigError(f"{keys.path(section)} is missing", file=keys.file)
    return keys


def _norm(keys: Keys, key: str) -> dict[str, Any]:
    """norm and norm_eps of a section that describes a norm."""
    absent = {"name": "default", "eps": 1e-5, "elementwise_affine": True, "bias": True}
    found = _present(keys, key).below(key, absent, _TRAINING | {"full_precision"})
    rms = found.choice("name", ("default", *_RMS)) != "default"
    affine, biased = found.flag("elementwise_affine"), found.flag("bias")
    norm = ("layer" if biased else "layer_no_bias") if affine else "none"
    if rms:
        norm = "rms"
        if not affine or biased:
            raise ConfigError(f"{found.place} is an RMS norm without weights or with biases", file=keys.file)
    return {"norm": norm, "norm_eps": found.real("eps")}


def _attention(
    block: Keys, norm: Mapping[str, Any], width: int, layer: int, layers: int
) -> tuple[dict[str, Any], Variant, Rope | None, int]:
    """The fields of an attention, how its tensors lie, its rope and its window."""
    name = "attention" if block.get("attention") is not None else "sequence_mixer"
    keys = block.below(name, _ATTENTION, _TRAINING | _INERT_ATTENTION)
    kind = keys.get("type")
    if kind != "attention" or not str(keys.config.get("_CLASS_", "AttentionConfig")).endswith("AttentionConfig"):
        raise ConfigError(f"{keys.place} is no attention but {show(kind)}", file=keys.file)
    fused = keys.choice("name", ("default", "fused", "fused_v2")) != "default"
    heads = keys.integer("n_heads")
    groups, dim = keys.maybe_integer("n_kv_heads") or heads, keys.maybe_integer("head_dim") or width // heads
    if heads % groups or not dim or dim % 2:
        raise ConfigError(f"{keys.place}: {heads} heads, {groups} key/value heads of width {dim} do not fit",
                          file=keys.file)  # fmt: skip
    fields = {"kv_heads": groups, "group": heads // groups, "head_dim": dim, **read(ATTENTION, keys),
              "qk_norm": _qk_norm(keys, norm)}  # fmt: skip
    rope, interleaved = None, False
    if keys.section("rope"):
        rope, interleaved = read_rope(keys.below("rope", ROPE, _TRAINING | {"full_precision"}), dim)
    return fields, Variant(interleaved, fused), rope, read_window(keys, layer, layers)


def _qk_norm(keys: Keys, norm: Mapping[str, Any]) -> str:
    if not keys.section("qk_norm"):
        return ""
    found = _norm(keys, "qk_norm")
    if found != {"norm": "rms", "norm_eps": norm["norm_eps"]} or norm["norm"] != "rms":
        raise ConfigError(
            f"{keys.path('qk_norm')} is not the same kind of norm as layer_norm, or has another eps", file=keys.file
        )
    return "head" if keys.flag("use_head_qk_norm") else "full"


def _experts(block: Keys) -> tuple[dict[str, Any], str]:
    """The fields of a mixture of experts, and which way its experts lie."""
    keys = _present(block, "feed_forward_moe").below(
        "feed_forward_moe", {"name": "default", "router": None}, _TRAINING | _INERT_MOE
    )
    absent = {"name": "default", "normalize_expert_weights": None, "bias_gamma": None, "gating_function": "softmax"}
    router = keys.below("router", absent, _TRAINING | {"jitter_eps"})
    router.choice("name", ("default",))
    return {**read(EXPERTS, keys), **read(ROUTER, router)}, keys.choice("name", ("default", "dropless"))


def _merge(blocks: Sequence[Block], file: str) -> dict[str, Any]:
    """The fields of a Spec from all layers.  Raises ConfigError where layers differ in what a Spec holds once."""
    for i, block in enumerate(blocks):
        odd = [k for k, v in block.shared.items() if blocks[0].shared[k] != v]
        odd += ["rope layout"] * (replace(block.variant, experts="") != replace(blocks[0].variant, experts=""))
        if odd:
            raise ConfigError(f"layer {i} differs from layer 0 in {', '.join(odd)}", file=file)
    fields = dict(blocks[0].shared)
    fields |= _one(blocks, "dense", file) | _one(blocks, "moe", file)
    sparse = tuple(i for i, block in enumerate(blocks) if block.moe)
    fields["moe_layers"] = () if len(sparse) in (0, len(blocks)) else sparse
    if len({block.variant.experts for block in blocks if block.moe}) > 1:
        raise ConfigError("some layers have experts of the kind default, others dropless", file=file)
    windows = tuple(block.window for block in blocks)
    fields["windows"] = windows if any(windows) else ()
    full, local = ([b.rope for b in blocks if bool(b.window) == has] for has in (False, True))
    for ropes in (full, local):
        if any(rope != ropes[0] for rope in ropes):
            raise ConfigError("layers of the same kind of attention have different ropes", file=file)
    fields["rope"] = (full or local)[0]
    if full and local and local[0] != full[0]:
        if local[0] is None or full[0] is None:
            raise ConfigError("some layers have no rotary embeddings, which is not supported", file=file)
        fields["rope_local"] = local[0]
    if fields["rope"] is None:
        raise ConfigError("the model has no rotary embeddings, which is not supported", file=file)
    return fields


def _one(blocks: Sequence[Block], kind: str, file: str) -> dict[str, Any]:
    """The one description of all dense (or all sparse) layers, {} if there are none."""
    found = [getattr(block, kind) for block in blocks if getattr(block, kind)]
    if any(fields != found[0] for fields in found):
        raise ConfigError(f"the feed forwards of the {kind} layers differ from layer to layer", file=file)
    return dict(found[0]) if found else {}


def _read_head(model: Keys, fields: Mapping[str, Any]) -> None:
    """The output head has to have the blocks' norm and no bias."""
    absent = {"name": "default", "layer_norm": None, "bias": True}
    keys = model.below("lm_head", absent, _TRAINING | {"loss_implementation"})
    keys.choice("name", ("default",))
    if keys.flag("bias"):
        raise ConfigError("model.lm_head.bias: a bias of the output head is not supported", file=keys.file)
    if any(fields[k] != v for k, v in _norm(keys, "layer_norm").items()):
        raise ConfigError("model.lm_head.layer_norm is not the same norm as the blocks'", file=keys.file)


def _family(fields: Mapping[str, Any]) -> str:
    post = fields["norm_at"] == "post"
    if fields.get("experts"):
        return "flex_olmo" if post else "olmoe"
    if post:
        return "olmo3" if fields["windows"] else "olmo2"
    return "llama" if fields["norm"] == "rms" else "olmo"


def _tokenizer(config: Mapping[str, Any], file: str) -> tuple[dict[str, object], int | None, str | None]:
    """(special ids, tokens without padding, name) of the tokenizer that the run was given."""
    dataset = config.get("dataset")
    section = dataset.get("tokenizer") if isinstance(dataset, dict) else config.get("tokenizer")
    if not isinstance(section, dict):
        return {}, None, None
    keys = Keys(section, file, "tokenizer", {"vocab_size": None, "identifier": None})
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: section[name] for name in names if type(section.get(name)) is int}
    identifier = keys.get("identifier")
    return dict(ids), keys.maybe_integer("vocab_size"), identifier if isinstance(identifier, str) else None


def _positions(config: Mapping[str, Any], given: int | None) -> tuple[int, list[str]]:
    """The longest context: what the run was trained with, as the model itself does not say it."""
    if given:
        return given, []
    places = (("train_module", "max_sequence_length"), ("dataset", "sequence_length"))
    for section, key in places:
        found = config.get(section)
        value = found.get(key) if isinstance(found, dict) else None
        if type(value) is int and 0 < value < 1 << 31:
            return value, []
    return 4096, ["config.json does not say the longest context: 4096 (-O max_positions=N)"]
