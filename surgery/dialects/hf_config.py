"""Hugging Face `config.json` <-> Spec, for every family, from one table of keys.

    spec, facts, notes = read_config({"model_type": "llama", "hidden_size": 4096, ...}, "config.json")
    config = write_config(spec, facts, kind="bfloat16")

`FAMILIES` says per `model_type` which keys mean which field, what transformers assumes when a key is absent, and
what is always so.  Whether a family can hold a model is not written down anywhere: its config is written, read back,
and must give the same Spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from surgery.anatomy import Rope, Spec
from surgery.errors import ConfigError, show

Config = Mapping[str, object]
Json = dict[str, object]


@dataclass(frozen=True)
class Family:
    """One `model_type`.  `keys`: config key -> field of Spec; `absent`: what transformers takes for a missing key;
    `always`: fields of Spec that are fixed; `bias`: which biases `attention_bias` switches; `theta`: default base."""

    model_type: str
    architecture: str
    keys: Mapping[str, str]
    absent: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    always: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    bias: tuple[str, ...] = ("qkv_bias", "o_bias")
    window: str = ""  # "": none | all: `sliding_window` holds for every layer | qwen: from a layer on | types: by layer
    theta: float = 10000.0
    head_dim: bool = False  # the config may say how wide a head is
    rope_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    fraction: float = 1.0


_SIZES = {"hidden_size": "h", "num_hidden_layers": "l", "vocab_size": "v", "max_position_embeddings": "positions",
          "hidden_act": "act", "tie_word_embeddings": "tied"}  # fmt: skip
_DENSE = {**_SIZES, "intermediate_size": "f", "rms_norm_eps": "norm_eps"}
_MOE = {**_SIZES, "intermediate_size": "m", "rms_norm_eps": "norm_eps", "num_experts_per_tok": "top_k"}
_OLMO_MOE = {**_MOE, "num_experts": "e", "norm_topk_prob": "top_k_renormalised"}
_POST = {"norm_at": "post", "qk_norm": "full"}
_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False}


def _absent(**keys: object) -> Mapping[str, object]:
    return MappingProxyType({**_COMMON, **keys})


FAMILIES: Mapping[str, Family] = {
    f.model_type: f
    for f in (
        Family("llama", "LlamaForCausalLM", {**_DENSE, "mlp_bias": "mlp_bias"},
               _absent(rms_norm_eps=1e-6, max_position_embeddings=2048, attention_bias=False, mlp_bias=False),
               head_dim=True),
        Family("mistral", "MistralForCausalLM", _DENSE,
               _absent(rms_norm_eps=1e-6, max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
               bias=(), window="all", head_dim=True),
        Family("qwen2", "Qwen2ForCausalLM", _DENSE,
               _absent(rms_norm_eps=1e-6, max_position_embeddings=32768, num_key_value_heads=32),
               {"qkv_bias": True}, bias=(), window="qwen"),
        Family("qwen3", "Qwen3ForCausalLM", _DENSE,
               _absent(rms_norm_eps=1e-6, max_position_embeddings=32768, num_key_value_heads=32, head_dim=128,
                       attention_bias=False),
               {"qk_norm": "head"}, window="qwen", head_dim=True),
        Family("mixtral", "MixtralForCausalLM", {**_MOE, "num_local_experts": "e"},
               _absent(rms_norm_eps=1e-5, max_position_embeddings=131072, num_key_value_heads=8, num_experts_per_tok=2,
                       num_local_experts=8),
               {"top_k_renormalised": True}, bias=(), window="all", theta=1e6, head_dim=True),
        Family("qwen3_moe", "Qwen3MoeForCausalLM",
               {**_DENSE, "num_experts": "e", "moe_intermediate_size": "m", "num_experts_per_tok": "top_k",
                "norm_topk_prob": "top_k_renormalised"},
               _absent(rms_norm_eps=1e-6, max_position_embeddings=32768, num_key_value_heads=4, num_experts=128,
                       num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False, attention_bias=False,
                       intermediate_size=6144),
               {"qk_norm": "head"}, window="qwen", head_dim=True),
        Family("olmo", "OlmoForCausalLM", {**_SIZES, "intermediate_size": "f", "clip_qkv": "clip_qkv"},
               _absent(max_position_embeddings=2048, attention_bias=False, clip_qkv=None),
               {"norm": "none", "norm_eps": 1e-5}),
        Family("olmo2", "Olmo2ForCausalLM", _DENSE,
               _absent(rms_norm_eps=1e-5, max_position_embeddings=2048, attention_bias=False), _POST),
        Family("olmo3", "Olmo3ForCausalLM", _DENSE,
               _absent(rms_norm_eps=1e-5, max_position_embeddings=2048, attention_bias=False, sliding_window=4096),
               _POST, window="types", theta=5e5),
        Family("olmoe", "OlmoeForCausalLM", {**_OLMO_MOE, "clip_qkv": "clip_qkv"},
               _absent(rms_norm_eps=1e-5, max_position_embeddings=4096, attention_bias=False, num_experts=64,
                       num_experts_per_tok=8, norm_topk_prob=False, clip_qkv=None),
               {"qk_norm": "full"}),
        Family("flex_olmo", "FlexOlmoForCausalLM", _OLMO_MOE,
               _absent(rms_norm_eps=1e-6, max_position_embeddings=4096, attention_bias=False, num_experts=7,
                       num_experts_per_tok=5, norm_topk_prob=False),
               _POST, theta=5e5),
        Family("gpt_neox", "GPTNeoXForCausalLM",
               {**_SIZES, "intermediate_size": "f", "layer_norm_eps": "norm_eps", "use_parallel_residual": "parallel"},
               _absent(layer_norm_eps=1e-5, max_position_embeddings=2048, attention_bias=True, hidden_act="gelu",
                       use_parallel_residual=True),
               {"norm": "layer", "glu": False, "mlp_bias": True},
               rope_keys=("rotary_emb_base", "rotary_pct"), fraction=0.25),
    )
}  # fmt: skip

# Keys that cannot change the logits: carried along where the target is Hugging Face too.
INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout attn_implementation
    aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id length_penalty max_length max_sequence_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache olmo_block_type olmo_block_group_size
    """.split()
)
_EXTRA = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rope_theta",
          "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_emb_base", "rotary_pct", "sliding_window",
          "use_sliding_window", "max_window_layers", "layer_types", "decoder_sparse_step", "mlp_only_layers",
          "num_local_experts", "num_experts")  # fmt: skip
_REFUSED = {
    "quantization_config": "the weights are quantised; dequantise them first",
    "compression_config": "the weights are compressed; decompress them first",
    "rope_interleaved": "rotary pairs lie side by side, which no built-in family does",
    "auto_map": "the model runs code of its own, which is not executed; give a checkpoint of a built-in family",
}
_ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
         "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2"}  # fmt: skip


def read_config(config: Config, file: str) -> tuple[Spec, Json, list[str]]:
    """The Spec behind a config.json, the inert facts, and notes on what was absent or not understood.

    Raises ConfigError on an unknown family, a wrong type, or a key that would change the model unseen.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ConfigError(f"model_type is {show(kind)}", file=file, hint=f"known families: {', '.join(FAMILIES)}")
    for key, why in _REFUSED.items():
        if config.get(key) and not (key == "auto_map" and family.architecture in _names(config)):
            raise ConfigError(f"{key} is set: {why}", file=file)
    keys = _Keys(config, family, file)
    fields: Json = {name: keys.take(key) for key, name in family.keys.items()} | dict(family.always)
    fields["act"] = _act(fields["act"], file)
    fields |= keys.heads()
    fields |= dict.fromkeys(family.bias, bool(keys.take("attention_bias"))) if family.bias else {}
    fields["windows"], windowed = _read_windows(family, keys)
    fields["rope"], fields["rope_local"] = _read_rope(family, keys, windowed)
    fields["clip_after_norm"] = bool(fields.get("clip_qkv") and fields.get("qk_norm"))
    if kind == "qwen3_moe":
        fields["moe_layers"] = _read_sparse(keys)
    spec = Spec(**{"family": family.model_type, **fields})  # type: ignore[arg-type]
    facts = {k: v for k, v in config.items() if k in INERT}
    known = INERT | set(_EXTRA) | set(family.keys) | {"auto_map", *_REFUSED}
    odd = sorted(k for k in config if k not in known and config[k] is not None)
    notes = keys.notes + [f"config key {show(k)} is not understood and has no effect here" for k in odd]
    return spec, facts, notes


def _names(config: Config) -> tuple[str, ...]:
    names = config.get("architectures")
    return tuple(n for n in names if isinstance(n, str)) if isinstance(names, list) else ()


class _Keys:
    """Typed access to a config that remembers which significant keys were absent."""

    # transformers 5 renamed one
    _ALIASES: Mapping[str, str] = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
    _INTS = frozenset("l h v f m e top_k positions".split())
    _FLAGS = frozenset("tied mlp_bias parallel top_k_renormalised".split())

    def __init__(self, config: Config, family: Family, file: str) -> None:
        self.config, self.family, self.file = config, family, file
        self.notes: list[str] = []

    def take(self, key: str) -> object:
        alias = self._ALIASES.get(key, key)
        value = self.config.get(key, self.config.get(alias))
        if value is None:
            if key not in self.family.absent:
                raise ConfigError(f"{key} is missing", file=self.file)
            value = self.family.absent[key]
            if key not in self.config and alias not in self.config and value is not None:
                self.notes.append(f"config.json does not say {key}: {show(value)}, as transformers takes it")
        self._check(key, value)
        return value

    def _check(self, key: str, value: object) -> None:
        name = self.family.keys.get(key)
        fits = True
        if name in self._INTS:
            fits = type(value) is int and 0 < value < 1 << 31
        elif name in self._FLAGS:
            fits = type(value) is bool
        elif name in ("norm_eps", "clip_qkv"):
            fits = value is None or (type(value) in (int, float) and 0 < value < 1e9)  # type: ignore[operator]
        if not fits:
            raise ConfigError(f"{key} is {show(value)}, which is no sensible value", file=self.file)

    def integer(self, key: str, default: int) -> int:
        value = self.config.get(key)
        if value is None:
            return default
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise ConfigError(f"{key} is {show(value)}, not a whole number", file=self.file)
        return value

    def heads(self) -> Json:
        """g, n and half from the numbers of heads and their width."""
        heads = self.integer("num_attention_heads", 0)
        width = self.integer("hidden_size", 0)
        default = self.family.absent.get("num_key_value_heads", heads)
        groups = heads if "neox" in self.family.model_type else self.integer("num_key_value_heads", default)  # type: ignore[arg-type]
        if not heads or not groups or heads % groups:
            raise ConfigError(f"{heads} attention heads cannot share {groups} key/value heads", file=self.file)
        dim = width // heads
        if self.family.head_dim:
            dim = self.integer("head_dim", self.family.absent.get("head_dim", dim))  # type: ignore[arg-type]
        elif width % heads:
            raise ConfigError(f"hidden_size {width} is no multiple of {heads} heads", file=self.file)
        if not dim or dim % 2:
            raise ConfigError(f"heads of width {dim} cannot turn in pairs", file=self.file)
        return {"g": groups, "n": heads // groups, "half": dim // 2}


def _act(value: object, file: str) -> str:
    if value not in _ACTS:
        raise ConfigError(f"hidden_act is {show(value)}", file=file, hint=f"known: {', '.join(_ACTS)}")
    return _ACTS[str(value)]


# ----------------------------------------------------------------------------------------------- windows and ropes


def _read_windows(family: Family, keys: _Keys) -> tuple[tuple[int, ...], bool]:
    """The window of every layer, () if none has one."""
    layers = keys.integer("num_hidden_layers", 0)
    config = keys.config
    if not family.window:
        if config.get("sliding_window") is not None or config.get("use_sliding_window"):
            keys.notes.append(f"sliding_window has no effect in a {family.model_type}, as in transformers")
        return (), False
    if family.window == "qwen" and not config.get("use_sliding_window"):
        return (), False
    if "sliding_window" not in config and family.window != "qwen":
        keys.take("sliding_window") if "sliding_window" in family.absent else None
    default = 4096 if family.window == "qwen" else family.absent.get("sliding_window", 0)
    window = 0 if config.get("sliding_window", default) is None else keys.integer("sliding_window", default or 0)  # type: ignore[arg-type]
    types = config.get("layer_types")
    if types is None:
        types = _default_types(family, keys, layers)
    if not isinstance(types, list) or len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ConfigError("layer_types does not say full_attention or sliding_attention per layer", file=keys.file)
    windows = tuple(window if t == "sliding_attention" else 0 for t in types)
    return (windows, True) if any(windows) else ((), False)


def _default_types(family: Family, keys: _Keys, layers: int) -> list[str]:
    """The layers with a window where the config does not list them, as transformers decides it."""
    first = keys.integer("max_window_layers", 28) if family.window == "qwen" and family.model_type != "qwen3_moe" else 0
    sliding: Callable[[int], bool] = (
        (lambda i: (i + 1) % 4 != 0) if family.window == "types" else (lambda i: i >= first)
    )
    return ["sliding_attention" if sliding(i) else "full_attention" for i in range(layers)]


def _read_rope(family: Family, keys: _Keys, windowed: bool) -> tuple[Rope, Rope | None]:
    config, (base_key, fraction_key) = keys.config, family.rope_keys
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise ConfigError("rope_scaling is no mapping", file=keys.file)
    top = {k: config[k] for k in (base_key, fraction_key) if config.get(k) is not None}
    nested = "full_attention" in parameters or "sliding_attention" in parameters
    if family.window == "types":
        # transformers gives a flat dictionary of this family no effect at all
        full = {**(parameters.get("full_attention") or {}), **scaling} if nested else dict(scaling)
        local = dict(parameters.get("sliding_attention") or {}) if nested else {}
        main = _rope(family, full, top, keys)
        other = _rope(family, local, {} if nested else top, keys)
        return main, (other if windowed and other != main else None)
    if nested:
        raise ConfigError(f"rope_parameters by layer type mean nothing in a {family.model_type}", file=keys.file)
    return _rope(family, scaling or parameters, top, keys), None


def _rope(family: Family, given: Config, top: Config, keys: _Keys) -> Rope:
    base_key, fraction_key = family.rope_keys
    numbers = dict(given)
    base = numbers.pop("rope_theta", top.get(base_key, family.theta))
    fraction = numbers.pop("partial_rotary_factor", top.get(fraction_key, family.fraction))
    kind = numbers.pop("rope_type", numbers.pop("type", "default"))
    numbers.pop("type", None)
    if base_key not in top and "rope_theta" not in given:
        keys.notes.append(f"config.json does not say {base_key}: {family.theta:g}, as transformers takes it")
    for name, value in (("rope base", base), ("rotary fraction", fraction)):
        if type(value) not in (int, float) or not 0 < value < 1e15:  # type: ignore[operator]
            raise ConfigError(f"{name} is {show(value)}", file=keys.file)
    if kind not in ("default", "linear", "dynamic", "yarn", "longrope", "llama3"):
        raise ConfigError(f"rope_type is {show(kind)}", file=keys.file)
    if kind in ("llama3", "yarn", "longrope") and keys.config.get("max_position_embeddings"):
        numbers.setdefault("original_max_position_embeddings", keys.config["max_position_embeddings"])
    scaling = {} if kind == "default" else {"type": kind, **{k: v for k, v in numbers.items() if v is not None}}
    return Rope(float(base), float(fraction), scaling)  # type: ignore[arg-type]


def _read_sparse(keys: _Keys) -> tuple[int, ...]:
    """Which layers of a Qwen3-MoE have experts: every decoder_sparse_step-th but the mlp_only_layers."""
    layers, step = keys.integer("num_hidden_layers", 0), keys.integer("decoder_sparse_step", 1)
    dense = keys.config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise ConfigError("mlp_only_layers is no list of layers", file=keys.file)
    sparse = tuple(i for i in range(layers) if i not in dense and step and (i + 1) % step == 0)
    return () if len(sparse) == layers else sparse


# ------------------------------------------------------------------------------------------------------- writing


def write_config(spec: Spec, facts: Config, kind: str, model_type: str) -> Json:
    """The config.json of a family for this spec: classic keys, which transformers 4 and 5 and vLLM all read."""
    family = FAMILIES[model_type]
    config: Json = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {k: v for k, v in facts.items() if k in INERT and k not in ("architectures", "torch_dtype", "dtype")}
    names = {"gelu_tanh": "gelu_pytorch_tanh"}
    for key, name in family.keys.items():
        value = getattr(spec, name)
        config[key] = names.get(value, value) if name == "act" else value
    config["num_attention_heads"] = spec.heads
    if "neox" not in family.model_type:
        config["num_key_value_heads"] = spec.g
    if family.head_dim:
        config["head_dim"] = spec.head_dim
    if family.bias:
        config["attention_bias"] = bool(getattr(spec, family.bias[0]))
    config |= _write_windows(family, spec) | _write_rope(family, spec)
    if model_type == "qwen3_moe":
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [i for i in range(spec.l) if not spec.is_moe(i)]
    config["torch_dtype"] = kind
    return config


def _write_windows(family: Family, spec: Spec) -> Json:
    windows = spec.windows or (0,) * spec.l
    if not family.window:
        return {}
    widest = max(windows)
    types = ["sliding_attention" if w else "full_attention" for w in windows]
    if family.window == "all":
        return {"sliding_window": widest or None}
    if family.window == "types":
        return {"sliding_window": widest or 4096, "layer_types": types}
    if not widest:
        return {"use_sliding_window": False}
    first = types.index("sliding_attention")
    config: Json = {"use_sliding_window": True, "sliding_window": widest}
    return config if family.model_type == "qwen3_moe" else {**config, "max_window_layers": first, "layer_types": types}


def _write_rope(family: Family, spec: Spec) -> Json:
    if spec.rope is None:
        return {}
    base_key, fraction_key = family.rope_keys
    if family.window == "types":
        local = spec.rope_local or spec.rope
        nested = {"full_attention": _parameters(spec.rope), "sliding_attention": _parameters(local)}
        return {"rope_parameters": nested}
    config: Json = {base_key: spec.rope.base}
    if spec.rope.fraction != 1.0 or family.fraction != 1.0:
        config[fraction_key] = spec.rope.fraction
    if spec.rope.scaling:
        config["rope_scaling"] = {k: v for k, v in _parameters(spec.rope).items() if k != "rope_theta"}
    return config


def _parameters(rope: Rope) -> Json:
    rest = {k: v for k, v in rope.scaling.items() if k != "type"}
    return {"rope_type": rope.scaling.get("type", "default"), "rope_theta": rope.base, **rest}


def misfits(spec: Spec, model_type: str) -> dict[str, tuple[object, object]]:
    """The fields in which this family would give another model: {} if it holds the spec exactly."""
    try:
        back, _, _ = read_config(write_config(spec, {}, "float32", model_type), "config.json")
    except (ConfigError, TypeError) as error:
        return {"config": (str(error), None)}
    differences = spec.differences(back)
    return {k: v for k, v in differences.items() if k not in ("family", "v_true")}


def choose_family(spec: Spec) -> str:
    """The family that holds the spec: its own if it can, else the first that can.  Raises ConfigError if none can."""
    order = [spec.family] if spec.family in FAMILIES else []
    order += [name for name in FAMILIES if name not in order]
    gaps = {name: misfits(spec, name) for name in order}
    for name in order:
        if not gaps[name]:
            return name
    nearest = min(order, key=lambda name: len(gaps[name]))
    text = ", ".join(f"{k} is {a!r} (it can hold {b!r})" for k, (a, b) in list(gaps[nearest].items())[:4])
    raise ConfigError(f"no Hugging Face family holds this model; {nearest} comes nearest, but {text}")
