"""GPT-NeoX's YAML configuration -> Spec, with what the tensors show.

    config = merge([("13B.yml", {...}), ("local.yml", {...})])       # one configuration, keys with underscores
    reading = read_config(config, "configs", evidence, qkv="auto", release="auto")
    reading.spec, reading.qkv, reading.notes

Defaults are those of `NeoXArgs` (megatron/neox_arguments/neox_args.py).  Sizes are taken from the tensors where these
show them, since the meaning of `intermediate_size` has changed; the configuration is a cross-check.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from surgery.errors import ConfigError, show, some
from surgery.formats.keys import NOT, Entry, Fixed, Key, Keys, Pair, read
from surgery.formats.neox.inert import INERT
from surgery.formats.neox.releases import Config, Evidence, choose_qkv, ffn_width, writer
from surgery.formats.unknown import Unknown
from surgery.model.spec import Rope, Spec

# activation -> (the anatomy's name, gated); `gelu` is the tanh form where bias_gelu_fusion is on
ACTIVATIONS: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {"gelu": ("gelu", False), "relu": ("relu", False), "silu": ("silu", False), "swish": ("silu", False),
     "geglu": ("gelu", True), "reglu": ("relu", True), "swiglu": ("silu", True)}
)  # fmt: skip
NORMS: Mapping[str, tuple[str, str, float]] = MappingProxyType(
    {
        "layernorm": ("layer", "layernorm_epsilon", 1e-5),
        "rmsnorm": ("rms", "rms_norm_epsilon", 1e-8),
        "non_parametric_layernorm": ("none", "layernorm_epsilon", 1e-5),
    }
)
ABSENT: Mapping[str, Any] = MappingProxyType(
    {
        "norm": "layernorm", **{key: eps for _, key, eps in NORMS.values()}, "activation": "gelu",
        "bias_gelu_fusion": False, "pos_emb": "learned", "rotary_pct": 1.0, "rotary_emb_base": 10000,
        "use_bias_in_attn_linear": True, "use_bias_in_mlp": True, "attention_config": None,
        "sliding_window_width": None, "attention_type": None, "num_kv_heads": None,
    }
)  # fmt: skip
# keys that are read elsewhere, or only where others say so
_READ = frozenset(
    """
    attention_config attention_type bias_gelu_fusion expansion_factor intermediate_size layernorm_epsilon
    make_vocab_size_divisible_by mlp_multiple_of mlp_type model_parallel_size num_kv_heads num_unique_layers onnx_safe
    output_layer_parallelism padded_vocab_size pipe_parallel_size precision rms_norm_epsilon rotary_emb_base rotary_pct
    seq_length sliding_window_width soft_prompt_tuning sparsity_config tokenizer_type train_impl use_bias_in_mlp
    """.split()
)


def _fixed(name: str, value: object, means: str, *fine: object) -> Fixed:
    return Fixed(name, value, (None, *fine), means=means, written=False)


_MIXTURE = "a mixture of experts"
FIXED: tuple[Entry, ...] = (
    _fixed("gpt_j_tied", False, "one norm for attention and mlp"),
    _fixed("use_qk_layernorm", False, "a norm of queries and keys over all heads of a rank"),
    _fixed("use_mup", False, "the scales of maximal update parametrisation"),
    _fixed("moe_num_experts", 1, _MIXTURE, 0),
    _fixed("num_experts", 1, _MIXTURE, 0),
    _fixed("opt_pos_emb_offset", 0, "positions that do not begin at 0"),
    _fixed("te_mha", False, "Transformer Engine's attention"),
    _fixed("te_fp8_mha", False, "Transformer Engine's attention"),
    _fixed("te_layernorm_mlp", False, "Transformer Engine's mlp"),
    _fixed("apply_residual_connection_post_layernorm", False, "residuals after the norms"),
    _fixed("rope_scaling", None, "a scaled rope", {}),
)


def _read_norm(keys: Keys) -> dict[str, Any]:
    name = keys.word("norm")
    if name not in NORMS:
        raise ConfigError(f"norm is {show(name)}", file=keys.file, hint=f"known: {', '.join(NORMS)}")
    norm, key, _ = NORMS[name]
    return {"norm": norm, "norm_eps": keys.real(key)}


def _write_norm(spec: Spec) -> dict[str, Any]:
    names = {norm: (name, key) for name, (norm, key, _) in NORMS.items()}
    name, eps = names.get(spec.norm, names["layer"])
    return {"norm": name, eps: spec.norm_eps}


def _read_rope(keys: Keys) -> dict[str, Any]:
    kind = keys.word("pos_emb")
    if kind not in ("rotary", "learned", "none"):
        raise ConfigError(f"pos_emb is {show(kind)}", file=keys.file, hint="known: rotary, learned, none")
    if kind != "rotary":
        return {"rope": None}
    fraction, dim = keys.real("rotary_pct"), keys.integer("hidden_size") // keys.integer("num_attention_heads")
    if fraction > 1 or int(dim * fraction) < 2:
        raise ConfigError(f"rotary_pct is {fraction:g} of heads of width {dim}", file=keys.file)
    return {"rope": Rope(keys.real("rotary_emb_base"), fraction)}


def _write_rope(spec: Spec) -> dict[str, Any]:
    if spec.rope is None:
        return {"pos_emb": "learned" if spec.learned_positions else "none"}
    base, fraction = int(spec.rope.base), spec.rope.fraction  # the base is a whole number
    return {"pos_emb": "rotary", "rotary_pct": fraction, "rotary_emb_base": base}


def _read_windows(keys: Keys) -> dict[str, Any]:
    """Per layer the window; only flash attention has one (its width does not count the token itself)."""
    types = attention_types(keys.get("attention_config"), keys.integer("num_layers"), keys.file)
    odd = sorted(set(types) - {"global", "flash"})
    if odd:
        raise ConfigError(f"attention_config has layers of type {some(map(show, odd))}", file=keys.file,
                          hint="understood are global and flash, which are the same function")  # fmt: skip
    width = keys.maybe_integer("sliding_window_width")
    windows = tuple(width + 1 if width and t == "flash" else 0 for t in types)
    return {"windows": windows if any(windows) else ()}


def _write_windows(spec: Spec) -> dict[str, Any]:
    if not any(spec.windows):
        return {}
    kinds = ["flash" if w else "global" for w in spec.windows]
    runs = [[[kind], len(list(group))] for kind, group in itertools.groupby(kinds)]
    return {"sliding_window_width": max(spec.windows) - 1, "attention_config": runs}


TABLE: tuple[Entry, ...] = (
    Key("num_layers", "layers"),
    Key("hidden_size", "width"),
    Pair(lambda keys: {}, lambda spec: {"num_attention_heads": spec.heads}),  # read with the tensors
    Key("max_position_embeddings", "context"),
    Pair(_read_norm, _write_norm),
    Pair(_read_rope, _write_rope),
    Pair(_read_windows, _write_windows),
    Key("gpt_j_residual", "parallel", False),
    Pair(lambda keys: {}, lambda spec: {"use_bias_in_attn_linear": spec.qkv_bias}),
    Key("no_weight_tying", "tied", False, NOT),
)


@dataclass(frozen=True)
class Reading:
    """What a configuration and the tensors mean together; `qkv` is the layout A, B or C, `release` the writer's."""

    spec: Spec
    qkv: str
    release: str
    notes: tuple[str, ...]


def merge(files: Sequence[tuple[str, object]]) -> dict[str, object]:
    """One configuration from several files; dashes in keys become underscores.  Raises ConfigError if two disagree."""
    out: dict[str, object] = {}
    origin: dict[str, str] = {}
    for file, config in files:
        if not isinstance(config, dict) or any(type(k) is not str for k in config):
            raise ConfigError("is no mapping of keys to values", file=file)
        for key, value in config.items():
            name = key.replace("-", "_")
            if name in out and out[name] != value:
                raise ConfigError(f"{name} is {show(value)}, but {show(out[name])} in {origin[name]}", file=file)
            out[name], origin[name] = value, file
    return out


def read_config(config: Config, file: str, found: Evidence, *, qkv: str = "auto", release: str = "auto") -> Reading:
    """What the model is.  Raises ConfigError on values that make no sense, contradict the tensors, or cannot be
    represented, and AmbiguousError where the files leave two readings."""
    keys = Keys(config, file, absent=ABSENT, nulls=True)
    _refuse(keys)
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if width % heads or width // heads % 2:
        raise ConfigError(f"hidden_size {width} does not give {heads} heads of an even width", file=file)
    groups = _groups(keys, found, heads, width // heads)
    fields = read(TABLE, keys)
    act, glu = _activation(keys, found)
    _compare(keys, fields, found)
    biases = _biases(keys, found)
    spec = Spec(
        family="llama" if glu and fields["norm"] == "rms" else "gpt_neox", vocab=found.vocab, kv_heads=groups,
        group=heads // groups, head_dim=width // heads, ffn=found.ffn, learned_positions=found.positions, act=act,
        glu=glu, qkv_bias=found.qkv_bias, o_bias=found.o_bias, mlp_bias=found.mlp_bias, **fields,
    )  # fmt: skip
    layout, why = choose_qkv(config, found, spec, file, qkv=qkv, release=release)
    notes = [*biases, *_notes(config, keys, found, spec), *why]
    return Reading(spec, layout, writer(found, layout, spec, config), tuple(notes))


def _refuse(keys: Keys) -> None:
    """Raise ConfigError naming all that the anatomy has no words for."""
    read(FIXED, keys)
    tuning, unique = keys.config.get("soft_prompt_tuning"), keys.config.get("num_unique_layers")
    if isinstance(tuning, dict) and tuning.get("enabled"):
        keys.refused.append("soft_prompt_tuning: a trained prompt")
    if unique is not None and unique != keys.config.get("num_layers"):
        keys.refused.append("num_unique_layers: layers that share their weights")
    if keys.config.get("train_impl") == "rm":
        keys.refused.append("train_impl rm: a reward model")
    keys.check()


def _compare(keys: Keys, fields: Mapping[str, Any], found: Evidence) -> None:
    """Raise ConfigError where the configuration contradicts the tensors, or cannot be computed elsewhere."""
    layers, tied, kind = fields["layers"], fields["tied"], keys.word("pos_emb")
    if layers != found.layers:
        raise ConfigError(f"num_layers is {layers}, but the files hold {found.layers} layers", file=keys.file)
    if tied and found.head:
        raise ConfigError("no_weight_tying is false, but there is a final_linear.weight", file=keys.file)
    if not tied and not found.head:
        raise ConfigError("no_weight_tying is true, but there is no final_linear.weight", file=keys.file)
    if (kind == "learned") != (found.positions > 0):
        has = f"{found.positions} rows of" if found.positions else "no"
        raise ConfigError(f"pos_emb is {kind}, but there are {has} position_embeddings", file=keys.file)
    if fields["parallel"] and not found.mlp_bias:
        raise ConfigError("gpt_j_residual without biases in the mlp: GPT-NeoX leaves out the attention's output then, "
                          "which no other program computes", file=keys.file,
                          hint="train or convert it with use_bias_in_mlp: true")  # fmt: skip


def _groups(keys: Keys, found: Evidence, heads: int, dim: int) -> int:
    """Key/value heads, from the rows of query_key_value; the configuration must agree."""
    rows, rest = divmod(found.qkv_rows, dim)
    groups = (rows - heads) // 2
    if rest or (rows - heads) % 2 or groups < 1 or heads % groups:
        what = f"query_key_value has {found.qkv_rows} rows, which {heads} query heads of width {dim} do not explain"
        raise ConfigError(what, file=keys.file)
    kind = keys.config.get("attention_type")
    said = keys.config.get("num_kv_heads") or None
    if kind == "multihead" or (said is None and kind is None):
        said = heads
    elif kind == "multiquery" and said is None:
        said = 1
    if said != groups:
        what = f"num_kv_heads is {show(said)}, but query_key_value has rows for {groups} key/value heads"
        raise ConfigError(what, file=keys.file)
    return groups


def _activation(keys: Keys, found: Evidence) -> tuple[str, bool]:
    name = keys.word("activation")
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation is {show(name)}", file=keys.file, hint=f"known: {', '.join(ACTIVATIONS)}")
    act, gated = ACTIVATIONS[name]
    llama = found.mlp == "w"  # LLaMAParallelMLP gates any function
    if (gated or llama) != found.gated or (llama and gated):
        shape = "gated" if found.gated else "not gated"
        raise ConfigError(f"activation is {name}, but the tensors of the mlp are those of one that is {shape}",
                          file=keys.file)  # fmt: skip
    if name == "gelu" and not llama and keys.flag("bias_gelu_fusion"):
        act = "gelu_tanh"
    return act, found.gated


def _biases(keys: Keys, found: Evidence) -> list[str]:
    """The tensors say which biases there are; notes where the configuration says something else."""
    said = {"use_bias_in_attn_linear": found.qkv_bias or found.o_bias}
    if found.mlp == "linear":
        said["use_bias_in_mlp"] = found.mlp_bias
    wrong = [key for key, has in said.items() if keys.flag(key) != has]
    return [f"{key} does not agree with the tensors, which decide" for key in wrong]


def attention_types(value: object, layers: int, file: str) -> list[str]:
    """[[["flash", "global"], 6]] -> the type of every layer."""
    if value is None:
        return ["global"] * layers
    if isinstance(value, list) and all(type(t) is str for t in value):
        out: list[str] = list(value)
    else:
        out = []
        for item in value if isinstance(value, list) else [value]:
            kinds, count = item if isinstance(item, list) and len(item) == 2 else (None, None)
            if not isinstance(kinds, list) or not kinds or any(type(t) is not str for t in kinds):
                raise ConfigError("attention_config is no list of [[types], repetitions]", file=file)
            times = layers // len(kinds) if count == "all" else count
            if type(times) is not int or not 0 <= times <= layers:
                raise ConfigError(f"attention_config repeats {show(count)} times", file=file)
            out += kinds * times
    if len(out) != layers:
        raise ConfigError(f"attention_config describes {len(out)} of {layers} layers", file=file)
    return out


# ------------------------------------------------------------------------------------------------------------- notes


def _notes(config: Config, keys: Keys, found: Evidence, spec: Spec) -> list[str]:
    notes: list[str] = [Unknown(key, value) for key, value in keys.unknown(INERT | _READ).items()]
    notes += keys.note("GPT-NeoX")
    implied = ffn_width(config, "third" if found.mlp == "linear" else "plain", found.mlp, found.gated, spec.width)
    if implied != spec.ffn:
        notes.append(
            f"the configuration implies an ffn width of {implied}, the tensors have {spec.ffn}, which is taken"
        )
    if spec.norm == "rms":
        old = "the code that wrote this" if found.mlp != "linear" else "GPT-NeoX before 2025-05-09"
        notes.append(f"{old} divides by rms + eps, everyone else by sqrt(ms + eps): logits may differ by about 1e-4")
    if found.buffer in ("bfloat16", "float16"):
        notes.append(f"rotary angles were computed in {found.buffer} by this run (inv_freq); the rope base is "
                     "taken from the configuration, angles will be exact")  # fmt: skip
    if config.get("onnx_safe"):
        notes.append("onnx_safe: gelu was computed with sqrt(2) cut to 1.41421")
    return notes
