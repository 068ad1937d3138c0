"""OLMo-core's `config.json` (its `model` section) <-> Spec.

    found = read_model({"model": {"d_model": 4096, "block": {...}, ...}, "dataset": {...}}, "config.json")
    found.spec, found.variant, found.notes
    config = write_config(spec, facts, kind="bfloat16", experts="dropless")

A config describes blocks, one for all layers, with overrides by layer, or by name in a pattern; what they say is
compared layer by layer.  Values of None are left out by upstream, so absent keys have upstream's defaults.
Source: OLMo-core 3.0 `nn/transformer/config.py`, `nn/attention/__init__.py`, `nn/moe/moe.py`, `nn/layer_norm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.errors import ConfigError, show
from surgery.formats.olmo_core.rope import read_rope, read_window, rope_keys
from surgery.formats.typed_keys import TypedKeys
from surgery.model.spec import Rope, Spec

UPSTREAM = "OLMo-core 3.0"
_TRAINING = {"init_method", "init_seed", "init_std", "embedding_init_std", "freeze_params", "dtype", "_CLASS_", "type"}
_OLD = {"compile", "dp_config", "tp_config", "float8_config", "ac_config", "fused_ops", "use_flash"}
_MODEL: Mapping[str, Any] = {
    "name": "default", "block_pattern": None, "block_overrides": None, "embedding_norm": None, "embed_scale": None,
    "tie_word_embeddings": False,
}  # fmt: skip
_BLOCK: Mapping[str, Any] = {
    "name": "default", "attention": None, "feed_forward": None, "feed_forward_moe": None, "dropout": None,
    "attention_residual_alpha": None, "feed_forward_residual_alpha": None,
}  # fmt: skip
_ATTENTION: Mapping[str, Any] = {
    "name": "default", "n_kv_heads": None, "head_dim": None, "bias": True, "gate": None, "rope": None,
    "clip_qkv": None, "qk_norm": None, "sliding_window": None, "use_head_qk_norm": False, "scalable_softmax": False,
    "qk_norm_per_head_gains": False, "attention_sinks": False, "softmax_scale": None,
}  # fmt: skip
_NORM: Mapping[str, Any] = {"name": "default", "eps": 1e-5, "elementwise_affine": True, "bias": True}
_FEED_FORWARD: Mapping[str, Any] = {"name": "default", "bias": True, "activation": "silu"}
_MOE: Mapping[str, Any] = {
    "name": "default",
    "num_experts": 1,
    "hidden_size": 256,
    "shared_mlp": None,
    "latent_moe": None,
}
_ROUTER: Mapping[str, Any] = {
    "name": "default", "top_k": 1, "normalize_expert_weights": None, "uniform_expert_assignment": False,
    "random_expert_assignment": False, "bias_gamma": None, "gating_function": "softmax",
}  # fmt: skip
_INERT_ATTENTION = {"dropout", "backend", "use_flash", "use_recompute_qkv_prep"} | {
    f"mxfp8_{name}" for name in ("projections", "qkv_projection", "out_projection", "save_qkv_for_backward")
}
_INERT_MOE = {"capacity_factor", "lb_loss_weight", "lb_loss_granularity", "z_loss_weight", "scale_loss_by_num_layers"}
_NORM_AT = {"default": "pre", "reordered_norm": "post", "moe": "pre", "moe_reordered_norm": "post"}
_RMS = ("rms", "qwen_rms", "nemotron_rms", "cute_rms", "fused_rms")


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
    keys = TypedKeys(config["model"], file, "model", _MODEL)
    keys.choice("name", ("default", "moe"))
    _refuse(keys, ("embedding_norm",))
    if keys.maybe_real("embed_scale") not in (None, 1.0):
        raise ConfigError("model.embed_scale is not 1, which is not supported", file=file)
    h, layers = keys.integer("d_model"), keys.integer("n_layers")
    reader = _Reader(file, h, layers)
    blocks = [reader.block(place, block, i) for i, (place, block) in enumerate(_resolve(keys, layers))]
    fields = _merge(blocks, file)
    _read_head(keys, fields, reader)
    facts, v_true, identifier = _tokenizer(config, file)
    length, more = _positions(config, positions)
    spec = Spec(
        family=_family(fields), layers=layers, width=h, vocab=keys.integer("vocab_size"), true_vocab=v_true,
        context=length,
        tied=keys.flag("tie_word_embeddings"), **fields,
    )  # fmt: skip
    variant = blocks[0].variant
    moe = next((b.variant for b in blocks if b.moe), variant)
    notes = [*more, *keys.note(UPSTREAM), *reader.notes()]
    if spec.experts and moe.experts == "default":
        notes.append("in OLMo-core these experts drop tokens over their capacity; elsewhere they compute all")
    unknown = [*keys.unknown(_TRAINING | _OLD), *reader.unknown]
    notes += [f"config.json key {name} is not understood and has no effect here" for name in dict.fromkeys(unknown)]
    return Found(spec, replace(variant, experts=moe.experts), facts, tuple(notes), identifier)


def _refuse(keys: TypedKeys, names: Sequence[str]) -> None:
    found = [keys.path(name) for name in names if keys.get(name) not in (None, False)]
    if found:
        raise ConfigError(f"{', '.join(found)}: this is not supported", file=keys.file)


def _resolve(keys: TypedKeys, layers: int) -> list[tuple[str, Any]]:
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


class _Reader:
    """Reads blocks and gathers what they did not state and what was not understood."""

    def __init__(self, file: str, h: int, layers: int) -> None:
        self.file, self.h, self.layers = file, h, layers
        self.unstated: dict[str, None] = {}
        self.unknown: list[str] = []

    def notes(self) -> list[str]:
        if not self.unstated:
            return []
        return [f"not stated, taken as {UPSTREAM} takes it: {', '.join(self.unstated)}"]

    def done(self, keys: TypedKeys, inert: set[str]) -> None:
        self.unstated |= dict.fromkeys(keys.unstated)
        self.unknown += keys.unknown(inert | _TRAINING)

    def block(self, place: str, block: object, layer: int) -> Block:
        if not isinstance(block, dict):
            raise ConfigError(f"{place} is {show(block)}, not a mapping", file=self.file)
        keys = TypedKeys(block, self.file, place, _BLOCK)
        name = keys.choice("name", _NORM_AT)
        for alpha in ("attention_residual_alpha", "feed_forward_residual_alpha"):
            if keys.maybe_real(alpha) not in (None, 1.0):
                raise ConfigError(f"{keys.path(alpha)} is not 1, which is not supported", file=self.file)
        shared = {"norm_at": _NORM_AT[name], **self.norm(keys, "layer_norm")}
        attention, variant, rope, window = self.attention(keys, shared, layer)
        dense, moe, experts = None, None, "dropless"
        if name.startswith("moe"):
            moe, experts = self.moe(keys)
        else:
            dense = self.dense(keys)
        self.done(keys, {"dropout"})
        return Block({**shared, **attention}, replace(variant, experts=experts), rope, window, dense, moe)

    def norm(self, keys: TypedKeys, key: str) -> dict[str, Any]:
        """norm and norm_eps of a section that describes a norm."""
        if not keys.section(key):
            raise ConfigError(f"{keys.path(key)} is missing", file=self.file)
        found = keys.below(key, _NORM)
        rms = found.choice("name", ("default", *_RMS)) != "default"
        affine, biased = found.flag("elementwise_affine"), found.flag("bias")
        norm = ("layer" if biased else "layer_no_bias") if affine else "none"
        if rms:
            norm = "rms"
            if not affine or biased:
                raise ConfigError(f"{found.place} is an RMS norm without weights or with biases", file=self.file)
        eps = found.real("eps")
        self.done(found, {"full_precision"})
        return {"norm": norm, "norm_eps": eps}

    def attention(
        self, block: TypedKeys, norm: Mapping[str, Any], layer: int
    ) -> tuple[dict[str, Any], Variant, Rope | None, int]:
        """The fields of an attention, how its tensors lie, its rope and its window."""
        name = "attention" if block.get("attention") is not None else "sequence_mixer"
        keys = block.below(name, _ATTENTION)
        kind = keys.config.get("type", "attention")
        if kind != "attention" or not str(keys.config.get("_CLASS_", "AttentionConfig")).endswith("AttentionConfig"):
            raise ConfigError(f"{keys.place} is no attention but {show(kind)}", file=self.file)
        fused = keys.choice("name", ("default", "fused", "fused_v2")) != "default"
        _refuse(keys, ("gate", "scalable_softmax", "qk_norm_per_head_gains", "attention_sinks", "softmax_scale"))
        heads = keys.integer("n_heads")
        groups, dim = keys.maybe_integer("n_kv_heads") or heads, keys.maybe_integer("head_dim") or self.h // heads
        if heads % groups or not dim or dim % 2:
            raise ConfigError(f"{keys.place}: {heads} heads, {groups} key/value heads of width {dim} do not fit",
                              file=self.file)  # fmt: skip
        bias = keys.flag("bias")
        fields = {"kv_heads": groups, "group": heads // groups, "head_dim": dim, "qkv_bias": bias, "o_bias": bias,
                  "clip_qkv": keys.maybe_real("clip_qkv"), "qk_norm": self.qk_norm(keys, norm)}  # fmt: skip
        rope, interleaved = None, False
        if keys.section("rope"):
            found = rope_keys(keys)
            rope, interleaved = read_rope(found, dim)
            self.done(found, {"full_precision"})
        window = read_window(keys, layer, self.layers)
        self.done(keys, _INERT_ATTENTION)
        return fields, Variant(interleaved, fused), rope, window

    def qk_norm(self, keys: TypedKeys, norm: Mapping[str, Any]) -> str:
        if not keys.section("qk_norm"):
            return ""
        found = self.norm(keys, "qk_norm")
        if found != {"norm": "rms", "norm_eps": norm["norm_eps"]} or norm["norm"] != "rms":
            raise ConfigError(
                f"{keys.path('qk_norm')} is not the same kind of norm as layer_norm, or has another eps", file=self.file
            )
        return "head" if keys.flag("use_head_qk_norm") else "full"

    def dense(self, block: TypedKeys) -> dict[str, Any]:
        if not block.section("feed_forward"):
            raise ConfigError(f"{block.path('feed_forward')} is missing", file=self.file)
        keys = block.below("feed_forward", _FEED_FORWARD)
        keys.choice("name", ("default",))
        fields = {"ffn": keys.integer("hidden_size"), "mlp_bias": keys.flag("bias"),
                  "act": keys.choice("activation", ("silu", "gelu_tanh"))}  # fmt: skip
        self.done(keys, set())
        return fields

    def moe(self, block: TypedKeys) -> tuple[dict[str, Any], str]:
        """The fields of a mixture of experts, and which way its experts lie."""
        if not block.section("feed_forward_moe"):
            raise ConfigError(f"{block.path('feed_forward_moe')} is missing", file=self.file)
        keys = block.below("feed_forward_moe", _MOE)
        experts = keys.choice("name", ("default", "dropless"))
        _refuse(keys, ("shared_mlp", "latent_moe"))
        router = TypedKeys(keys.config.get("router") or {}, self.file, keys.path("router"), _ROUTER)
        keys.asked.add("router")
        router.choice("name", ("default",))
        _refuse(router, ("uniform_expert_assignment", "random_expert_assignment"))
        power = router.maybe_real("normalize_expert_weights")
        gate = router.choice("gating_function", ("softmax", "topk_softmax"))
        if power not in (None, 1.0):
            raise ConfigError(f"{router.path('normalize_expert_weights')} is {power:g}: only 1 is supported",
                              file=self.file)  # fmt: skip
        fields = {
            "experts": keys.integer("num_experts"), "expert_ffn": keys.integer("hidden_size"),
            "top_k": router.integer("top_k"),
            "top_k_renormalised": power is not None or gate == "topk_softmax",
            "router_bias": router.maybe_real("bias_gamma") is not None,
        }  # fmt: skip
        self.done(router, {"jitter_eps"})
        self.done(keys, _INERT_MOE)
        return fields, experts


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


def _read_head(model: TypedKeys, fields: Mapping[str, Any], reader: _Reader) -> None:
    """The output head has to have the blocks' norm and no bias."""
    keys = model.below("lm_head", {"name": "default", "layer_norm": None, "bias": True})
    keys.choice("name", ("default",))
    if keys.flag("bias"):
        raise ConfigError("model.lm_head.bias: a bias of the output head is not supported", file=keys.file)
    norm = reader.norm(keys, "layer_norm")
    if any(fields[k] != v for k, v in norm.items()):
        raise ConfigError("model.lm_head.layer_norm is not the same norm as the blocks'", file=keys.file)
    reader.done(keys, {"loss_implementation"})


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
    keys = TypedKeys(section, file, "tokenizer", {"vocab_size": None, "identifier": None})
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
