"""Megatron's `args` (an argparse.Namespace in every checkpoint) <-> Spec, in the spellings of core 0.10 to 0.20.

    spec, notes = read_args({"num_layers": 32, "hidden_size": 4096, ...}, "model_optim_rng.pt", vocab=32000)
    args = write_args(spec)

The Namespace is described, never made.  An argument that would change the model and that no Spec expresses is refused
by name; one that neither this file nor `megatron_inert` knows is named in the notes.  Meaning and defaults:
megatron/training `arguments.py`, megatron/core `transformer/transformer_config.py`, `gpt_builders.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import AmbiguousError, ConfigError
from surgery.formats.keys import MOST, NOT, Entry, Fixed, Key, Keys, Pair, read, write
from surgery.formats.megatron.inert import is_inert
from surgery.formats.padding import multiple_of
from surgery.formats.unknown import Unknown
from surgery.model.spec import Rope, Spec

UPSTREAM = "megatron.training"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
BUILT_IN_FACTOR = 8.0  # what pretrain_gpt.py and gpt_builders.py compute with, whatever rope_scaling_factor says
SWIFT_ROPE = ("ms-swift scales the rope by it in code of its own, and without it the model is another one; ms-swift's "
              "own export (swift export --to_hf true) knows it")  # fmt: skip
_FACTOR = "rope_factor"  # not of Megatron: how the reader says the rope's factor

ABSENT: Mapping[str, Any] = {
    "kv_channels": None, "group_query_attention": False, "num_query_groups": None, "ffn_hidden_size": None,
    "position_embedding_type": "learned_absolute", "use_rotary_position_embeddings": False, "rotary_base": 10000,
    "rotary_percent": 1.0, "use_rope_scaling": False, "rope_scaling_factor": BUILT_IN_FACTOR,
    "rotary_seq_len_interpolation_factor": None, "max_position_embeddings": None, "seq_length": None,
    "add_bias_linear": True, "add_qkv_bias": False, "squared_relu": False, "openai_gelu": False, "onnx_safe": None,
    "bias_gelu_fusion": True, "num_experts": None, "moe_ffn_hidden_size": None, "moe_layer_freq": 1,
    "moe_router_pre_softmax": False, "moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False,
    "window_size": None, "window_attn_skip_freq": None, "padded_vocab_size": None, "num_layers": None,
    "encoder_num_layers": None, "norm_epsilon": None, "layernorm_epsilon": None, "use_legacy_models": False,
    _FACTOR: None,
}  # fmt: skip
_POSITIONS = ("rope", "learned_absolute", "none")


def _off(*names: str, written: bool = False) -> tuple[Fixed, ...]:
    return tuple(Fixed(name, False, written=written) for name in names)


def _none(*names: str, fine: tuple[Any, ...] = ()) -> tuple[Fixed, ...]:
    return tuple(Fixed(name, None, fine, written=False) for name in names)


# arguments with any other value of which the model is another one
FIXED: tuple[Entry, ...] = (
    *_off("multi_latent_attention", "attention_output_gate", "qk_l2_norm", "quick_geglu", "enable_mhc_connections",
          "use_mup", "is_hybrid_model", "retro_add_retriever", "apply_residual_connection_post_layernorm"),
    *_off("rotary_interleaved", "apply_layernorm_1p", "layernorm_zero_centered_gamma", written=True),
    Fixed("softmax_type", "vanilla", written=False), Fixed("glu_linear_offset", 0.0, written=False),
    *_none("mtp_num_layers", fine=(0,)), *_none("heterogeneous_layers_config_encoded_json", fine=("",)),
    *_none("activation_func_clamp_value", "no_rope_freq", "linear_attention_freq", "experimental_attention_variant",
           "hybrid_override_pattern", "hybrid_layer_pattern", "heterogeneous_layers_config_path"),
)  # fmt: skip
FIXED_MOE: tuple[Entry, ...] = (
    *_none("moe_latent_size", "moe_router_num_groups", "moe_router_group_topk", "moe_router_force_biased",
           "moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"),
    *_off("moe_router_force_load_balancing", "moe_apply_probs_on_input", "moe_single_grouped_weight",
          "moe_single_grouped_bias", "moe_extended_tp"),
)  # fmt: skip


# --------------------------------------------------------------------------- arguments that say something together


def _read_sizes(keys: Keys) -> dict[str, Any]:
    layers = keys.maybe_integer("num_layers", 1, MOST["layers"])
    layers = layers or keys.maybe_integer("encoder_num_layers", 1, MOST["layers"])
    if layers is None:
        raise ConfigError("args do not say num_layers", file=keys.file)
    h, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    groups = keys.maybe_integer("num_query_groups") if keys.flag("group_query_attention") else heads
    groups = groups or heads
    width = keys.maybe_integer("kv_channels") or h // heads
    if heads % groups or width % 2:
        raise ConfigError(f"{heads} heads of width {width} and {groups} query groups do not fit", file=keys.file)
    return {"layers": layers, "kv_heads": groups, "group": heads // groups, "head_dim": width}


def _write_sizes(spec: Spec) -> dict[str, Any]:
    return {
        "num_layers": spec.layers, "encoder_num_layers": spec.layers, "num_attention_heads": spec.heads,
        "kv_channels": spec.head_dim, "group_query_attention": spec.group > 1,
        "num_query_groups": spec.kv_heads if spec.group > 1 else 1,
    }  # fmt: skip


def _read_eps(keys: Keys) -> dict[str, Any]:
    # renamed in core 0.13; whichever is there counts
    eps = keys.maybe_real("norm_epsilon") or keys.maybe_real("layernorm_epsilon")
    if eps is None:
        keys.unstated.append("args.norm_epsilon = 1e-05")
    if keys.flag("qk_layernorm") and keys.get("normalization") != "RMSNorm":
        raise ConfigError("qk_layernorm with LayerNorm (query and key norms with biases) is not supported",
                          file=keys.file)  # fmt: skip
    return {"norm_eps": eps or 1e-5}


def _write_eps(spec: Spec) -> dict[str, Any]:
    return {"norm_epsilon": spec.norm_eps, "layernorm_epsilon": spec.norm_eps}


def _read_positions(keys: Keys) -> dict[str, Any]:
    longest = keys.maybe_integer("max_position_embeddings") or keys.maybe_integer("seq_length")
    kind = "rope" if keys.flag("use_rotary_position_embeddings") else keys.choice("position_embedding_type", _POSITIONS)
    if kind == "rope":
        return {"rope": Rope(keys.real("rotary_base"), keys.real("rotary_percent"), _scaling(keys)), "context": longest}
    if kind == "learned_absolute" and not longest:
        raise ConfigError("args do not say max_position_embeddings", file=keys.file)
    return {"rope": None, "learned_positions": longest if kind == "learned_absolute" else 0, "context": longest}


def _scaling(keys: Keys) -> dict[str, object]:
    factor: float | None = keys.get(_FACTOR)
    linear = keys.maybe_real("rotary_seq_len_interpolation_factor")
    if not keys.flag("use_rope_scaling"):
        if factor is not None:
            raise ConfigError("-O rope_factor is given, but args say use_rope_scaling = False", file=keys.file)
        return {"type": "linear", "factor": linear} if linear not in (None, 1.0) else {}
    if linear not in (None, 1.0):
        raise ConfigError("use_rope_scaling with rotary_seq_len_interpolation_factor is not supported", file=keys.file)
    said = keys.real("rope_scaling_factor")
    if factor is None and said != BUILT_IN_FACTOR:
        raise AmbiguousError(
            f"args say rope_scaling_factor {said:g}, but Megatron's pretrain_gpt.py computes with {BUILT_IN_FACTOR:g} "
            "whatever it says; only its newer config builders use it",
            file=keys.file,
            hint=f"-O rope_factor={BUILT_IN_FACTOR:g} if pretrain_gpt.py trained it, else -O rope_factor={said:g}",
            readings=({"rope_factor": f"{BUILT_IN_FACTOR:g}"}, {"rope_factor": f"{said:g}"}),
        )
    return {"type": "llama3", "factor": factor or said, **LLAMA3}


def _own_factor(spec: Spec) -> float | None:
    scaling = spec.rope.scaling if spec.rope else {}
    factor = scaling.get("factor")
    return float(factor) if scaling.get("type") == "llama3" and isinstance(factor, (int, float)) else None


def _write_positions(spec: Spec) -> dict[str, Any]:
    length = spec.learned_positions or spec.context or 2048
    lengths = {"max_position_embeddings": length, "seq_length": length, "add_position_embedding": True}
    if spec.rope is None:
        kind = "learned_absolute" if spec.learned_positions else "none"
        return {**lengths, "position_embedding_type": kind, "use_rotary_position_embeddings": False}
    base, scaling = spec.rope.base, spec.rope.scaling
    linear = scaling.get("factor") if scaling.get("type") == "linear" else None
    return {
        **lengths, "position_embedding_type": "rope", "use_rotary_position_embeddings": True,
        "rotary_base": int(base) if base.is_integer() else base, "rotary_percent": spec.rope.fraction,
        "rotary_seq_len_interpolation_factor": linear, "use_rope_scaling": scaling.get("type") == "llama3",
        "rope_scaling_factor": _own_factor(spec) or BUILT_IN_FACTOR,
    }  # fmt: skip


def _read_mlp(keys: Keys) -> dict[str, Any]:
    glu, bias, h = keys.flag("swiglu"), keys.flag("add_bias_linear"), keys.integer("hidden_size")
    width = keys.maybe_integer("ffn_hidden_size")
    if width is None:
        width = int(4 * h * 2 / 3) // 64 * 64 if glu else 4 * h
        keys.unstated.append(f"args.ffn_hidden_size = {width}")
    return {"ffn": width, "act": "silu" if glu else _act(keys, bias), "qkv_bias": keys.flag("add_qkv_bias") or bias,
            "o_bias": bias, "mlp_bias": bias}  # fmt: skip


def _act(keys: Keys, bias: bool) -> str:
    """The fused bias-GELU kernel (on by default, needs biases) computes the tanh form, everything else is exact."""
    if keys.flag("squared_relu"):
        return "relu2"
    if keys.flag("openai_gelu") and keys.flag("use_legacy_models"):
        return "gelu_tanh"
    return "gelu_tanh" if bias and keys.flag("bias_gelu_fusion") and not keys.flag("openai_gelu") else "gelu"


def _write_mlp(spec: Spec) -> dict[str, Any]:
    return {
        "ffn_hidden_size": spec.ffn or spec.expert_ffn, "add_bias_linear": spec.mlp_bias or spec.o_bias,
        "add_qkv_bias": spec.qkv_bias, "squared_relu": spec.act == "relu2", "openai_gelu": False,
        "bias_gelu_fusion": spec.act == "gelu_tanh",
    }  # fmt: skip


def _read_windows(keys: Keys) -> dict[str, Any]:
    """Per layer the window; upstream counts the tokens before the current one, and layers from 1."""
    window, skip = keys.get("window_size"), keys.get("window_attn_skip_freq")
    if window is None:
        return {"windows": ()}
    layers = _read_sizes(keys)["layers"]
    if not _ints(window, 2) or window[1] not in (0, -1):
        raise keys.bad("window_size", window, "a pair (tokens before, 0)")
    if skip is None:
        here = [True] * layers
    elif type(skip) is int and skip > 0:
        here = [(i + 1) % skip != 0 for i in range(layers)]
    elif _ints(skip, layers):
        here = [bool(x) for x in skip]
    else:
        raise keys.bad("window_attn_skip_freq", skip, f"a whole number or a list of {layers}")
    return {"windows": tuple(window[0] + 1 if x else 0 for x in here) if window[0] >= 0 and any(here) else ()}


def _write_windows(spec: Spec) -> dict[str, Any]:
    if not any(spec.windows):
        return {}
    here = [int(w > 0) for w in spec.windows]
    return {"window_size": [max(spec.windows) - 1, 0], "window_attn_skip_freq": None if all(here) else here}


def _ints(value: object, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length and all(type(x) in (int, bool) for x in value)


def _read_experts(keys: Keys) -> dict[str, Any]:
    if keys.flag("add_bias_linear"):
        raise ConfigError("add_bias_linear with experts (biases in every expert) is not supported", file=keys.file)
    sigmoid = keys.get("moe_router_score_function") == "sigmoid"
    if keys.flag("moe_router_enable_expert_bias") and not sigmoid:
        raise ConfigError("moe_router_enable_expert_bias without moe_router_score_function sigmoid", file=keys.file)
    width = keys.maybe_integer("moe_ffn_hidden_size")
    if width is None:
        width = _read_mlp(keys)["ffn"]
        keys.unstated.append(f"args.moe_ffn_hidden_size = {width} (ffn_hidden_size)")
    shared = keys.maybe_integer("moe_shared_expert_intermediate_size") or 0
    renormalised = keys.integer("moe_router_topk") > 1 if sigmoid else not keys.flag("moe_router_pre_softmax")
    return {
        "experts": keys.integer("num_experts"), "expert_ffn": width, "shared_ffn": shared,
        "moe_layers": _moe_layers(keys, _read_sizes(keys)["layers"]), "top_k_renormalised": renormalised,
        "shared_gate": bool(shared) and keys.flag("moe_shared_expert_gate"),
    }  # fmt: skip


def _moe_layers(keys: Keys, layers: int) -> tuple[int, ...]:
    """Every n-th layer from the first on, or a list of 0 and 1."""
    said = keys.get("moe_layer_freq")
    if type(said) is int and said > 0:
        sparse = tuple(range(0, layers, said))
    elif _ints(said, layers):
        sparse = tuple(i for i, x in enumerate(said) if x)
    else:
        raise keys.bad("moe_layer_freq", said, f"a whole number or a list of {layers} times 0 or 1")
    if not sparse:
        raise ConfigError("num_experts is set, but moe_layer_freq gives no layer experts", file=keys.file)
    return () if len(sparse) == layers else sparse


def _write_experts(spec: Spec) -> dict[str, Any]:
    sparse = [int(spec.is_moe(i)) for i in range(spec.layers)]
    return {
        "num_experts": spec.experts, "moe_ffn_hidden_size": spec.expert_ffn,
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_router_pre_softmax": spec.router_score == "softmax" and not spec.top_k_renormalised,
        "moe_shared_expert_intermediate_size": spec.shared_ffn or None, "moe_shared_expert_gate": spec.shared_gate,
    }  # fmt: skip


DENSE: tuple[Entry, ...] = (
    Key("hidden_size", "width"),
    Pair(_read_sizes, _write_sizes),
    Key("normalization", "norm", "LayerNorm", {"LayerNorm": "layer", "RMSNorm": "rms"}),
    Key("qk_layernorm", "qk_norm", False, {False: "", True: "head"}),
    Pair(_read_eps, _write_eps),
    Key("swiglu", "glu", False),
    Pair(_read_mlp, _write_mlp),
    Pair(_read_positions, _write_positions),
    Pair(_read_windows, _write_windows),
    Key("untie_embeddings_and_output_weights", "tied", False, NOT),
)
MOE: tuple[Entry, ...] = (
    Key("moe_router_topk", "top_k", 2),
    Key("moe_router_score_function", "router_score", "softmax", {"softmax": "softmax", "sigmoid": "sigmoid"}),
    Key("moe_router_enable_expert_bias", "router_bias", False),
    Key("moe_router_topk_scaling_factor", "router_scale", None),
    Pair(_read_experts, _write_experts),
)


def read_args(
    args: Mapping[str, Any], file: str, vocab: int, rope_factor: float | None = None
) -> tuple[Spec, tuple[str, ...]]:
    """The model behind a Namespace's attributes, and notes; `vocab` is how many rows the embedding has.

    Raises ConfigError naming every argument that no Spec can express.
    """
    keys = Keys(args, file, "args", {**ABSENT, _FACTOR: rope_factor})
    experts = bool(keys.maybe_integer("num_experts", 0, MOST["experts"]))
    read((*FIXED, *(FIXED_MOE if experts else ())), keys)
    keys.check()
    fields = read((*DENSE, *(MOE if experts else ())), keys)
    notes: list[str] = []
    said = keys.maybe_integer("padded_vocab_size")
    if said not in (None, vocab):
        notes.append(f"args say padded_vocab_size {said}, the embedding has {vocab} rows: taken from the embedding")
    family = _family(fields)
    if experts and not fields["moe_layers"] and family != "qwen3_moe":
        fields["ffn"] = 0  # no dense layer uses it
    notes += keys.note(UPSTREAM) + _remarks(args)
    checked = {entry.name for entry in (*FIXED, *FIXED_MOE, *DENSE, *MOE) if isinstance(entry, (Key, Fixed))}
    unknown = keys.unknown(ABSENT).items()
    odd = [pair for pair in unknown if not is_inert(pair[0].removeprefix("args."), checked)]
    notes += [Unknown(key, value, what=SWIFT_ROPE if key == "args.rope_scaling" else "") for key, value in odd]
    return Spec(family=family, vocab=vocab, **fields), tuple(notes)


def padding(args: Mapping[str, Any], rows: int) -> str:
    """To what the rows of the vocabulary were padded, and what args say of the tokens; "" if they cannot have been.

    `vocab_size` is what the command line gave, to which Megatron may add an end of document; most runs leave it out.
    """
    tp, tokens = args.get("tensor_model_parallel_size"), args.get("vocab_size")
    said = multiple_of(rows, args.get("make_vocab_size_divisible_by", 128), tp if type(tp) is int else 1)
    if type(tokens) is int and 0 < tokens <= rows:
        said = f"{said or 'padded'} (args say vocab_size {tokens}, {rows - tokens} less)" if tokens < rows else ""
    return said


def _remarks(args: Mapping[str, Any]) -> list[str]:
    """Arguments that act in training only, but so that people should know."""
    notes = []
    if args.get("num_experts") and args.get("moe_expert_capacity_factor") is not None:
        notes.append("moe_expert_capacity_factor: in training, tokens over an expert's capacity were dropped")
    if args.get("num_experts") and args.get("moe_router_load_balancing_type") == "sinkhorn":
        notes.append("the router was trained with sinkhorn balancing; it ranks by its logits here, as in evaluation")
    if args.get("spec") is not None:
        notes.append("the layers were built by a custom --spec; they are read as GPT layers")
    return notes


def _family(fields: Mapping[str, Any]) -> str:
    """Hugging Face's nearest family: a hint."""
    if fields.get("experts"):
        return "qwen3_moe" if fields["qk_norm"] else "mixtral"
    if fields.get("learned_positions"):
        return "gpt2"
    if fields["qk_norm"]:
        return "qwen3"
    if fields["norm"] == "layer":
        return "gpt_neox"
    if fields["qkv_bias"] and not fields["o_bias"]:
        return "qwen2"
    return "mistral" if fields["windows"] else "llama"


def write_args(spec: Spec) -> dict[str, Any]:
    """The attributes that describe the model, or the one that comes nearest."""
    more = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "apply_query_key_layer_scaling": False}
    args = {"num_experts": None, **write((*DENSE, *FIXED), spec), **more}
    return args | (write(MOE, spec) if spec.experts else {})
