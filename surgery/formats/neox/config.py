"""GPT-NeoX's YAML configuration -> Spec, with what the tensors show.

    config = merge([("13B.yml", {...}), ("local.yml", {...})])       # one configuration, keys with underscores
    reading = read_config(config, "configs", evidence, qkv="auto", release="auto")
    reading.spec, reading.qkv, reading.notes

Defaults are those of `NeoXArgs` (megatron/neox_arguments/neox_args.py).  Sizes are taken from the tensors where these
show them, since the meaning of `intermediate_size` has changed; the configuration is a cross-check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from surgery.errors import ConfigError, show, some
from surgery.formats.neox.inert import INERT
from surgery.formats.neox.releases import Config, Evidence, choose_qkv, ffn_width, writer
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
_READ = frozenset(
    """
    activation attention_config attention_type bias_gelu_fusion expansion_factor gpt_j_residual hidden_size
    intermediate_size layernorm_epsilon make_vocab_size_divisible_by max_position_embeddings mlp_multiple_of mlp_type
    model_parallel_size no_weight_tying norm num_attention_heads num_kv_heads num_layers onnx_safe
    output_layer_parallelism padded_vocab_size pipe_parallel_size pos_emb precision rms_norm_epsilon rotary_emb_base
    rotary_pct seq_length sliding_window_width use_bias_in_attn_linear use_bias_in_mlp
    """.split()
)
# key -> (the values that change nothing, what any other means)
_REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = MappingProxyType(
    {
        "gpt_j_tied": ((None, False), "one norm for attention and mlp"),
        "use_qk_layernorm": ((None, False), "a norm of queries and keys over all heads of a rank"),
        "use_mup": ((None, False), "the scales of maximal update parametrisation"),
        "moe_num_experts": ((None, 0, 1), "a mixture of experts"),
        "num_experts": ((None, 0, 1), "a mixture of experts"),
        "opt_pos_emb_offset": ((None, 0), "positions that do not begin at 0"),
        "te_mha": ((None, False), "Transformer Engine's attention"),
        "te_fp8_mha": ((None, False), "Transformer Engine's attention"),
        "te_layernorm_mlp": ((None, False), "Transformer Engine's mlp"),
        "apply_residual_connection_post_layernorm": ((None, False), "residuals after the norms"),
        "rope_scaling": ((None, {}), "a scaled rope"),
    }
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


class _Keys:
    """Typed access to a configuration that remembers which defaults were taken."""

    def __init__(self, config: Config, file: str) -> None:
        self.config, self.file = config, file
        self.defaults: list[str] = []

    def _default(self, key: str, value: object) -> object:
        said = self.config.get(key)
        if said is None and value is not None:
            self.defaults.append(f"{key} ({value:g})" if isinstance(value, float) else f"{key} ({str(value).lower()})")
        return value if said is None else said

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._default(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ConfigError(f"{key} is {show(value)}, not a positive whole number", file=self.file)
        return value

    def real(self, key: str, default: float) -> float:
        value = self._default(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e15:  # type: ignore[operator]
            raise ConfigError(f"{key} is {show(value)}, not a positive number", file=self.file)
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._default(key, default)
        if type(value) is not bool:
            raise ConfigError(f"{key} is {show(value)}, not true or false", file=self.file)
        return value

    def word(self, key: str, default: str) -> str:
        value = self._default(key, default)
        if type(value) is not str:
            raise ConfigError(f"{key} is {show(value)}, not a word", file=self.file)
        return value.lower()


def read_config(config: Config, file: str, found: Evidence, *, qkv: str = "auto", release: str = "auto") -> Reading:
    """What the model is.  Raises ConfigError on values that make no sense, contradict the tensors, or cannot be
    represented, and AmbiguousError where the files leave two readings."""
    _refuse(config, file)
    keys = _Keys(config, file)
    layers, width, heads = keys.integer("num_layers"), keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if width % heads or width // heads % 2:
        raise ConfigError(f"hidden_size {width} does not give {heads} heads of an even width", file=file)
    if layers != found.layers:
        raise ConfigError(f"num_layers is {layers}, but the files hold {found.layers} layers", file=file)
    dim = width // heads
    groups = _groups(keys, found, heads, dim)
    norm, eps = _norm(keys)
    act, glu = _activation(keys, found)
    parallel = keys.flag("gpt_j_residual")
    tied = not keys.flag("no_weight_tying")
    _check_head(tied, found, file)
    rope, learned = _positions(keys, found, dim)
    biases = _biases(keys, found)
    if parallel and not found.mlp_bias:
        raise ConfigError("gpt_j_residual without biases in the mlp: GPT-NeoX leaves out the attention's output then, "
                          "which no other program computes", file=file,
                          hint="train or convert it with use_bias_in_mlp: true")  # fmt: skip
    spec = Spec(
        family="llama" if glu and norm == "rms" else "gpt_neox", layers=layers, width=width, vocab=found.vocab,
        kv_heads=groups,
        group=heads // groups, head_dim=dim, ffn=found.ffn, learned_positions=learned, norm=norm, norm_eps=eps,
        rope=rope,
        windows=_windows(keys, layers), qkv_bias=found.qkv_bias, o_bias=found.o_bias, act=act, glu=glu,
        mlp_bias=found.mlp_bias, parallel=parallel, tied=tied, context=_context(keys),
    )  # fmt: skip
    layout, why = choose_qkv(config, found, spec, file, qkv=qkv, release=release)
    notes = [*biases, *_notes(config, keys, found, spec, layout), *why]
    return Reading(spec, layout, writer(found, layout, spec, config), tuple(notes))


def _refuse(config: Config, file: str) -> None:
    """Raise ConfigError naming all that the anatomy has no words for."""
    problems = [f"{key}: {means}" for key, (fine, means) in _REFUSED.items() if config.get(key) not in fine]
    tuning = config.get("soft_prompt_tuning")
    if isinstance(tuning, dict) and tuning.get("enabled"):
        problems.append("soft_prompt_tuning: a trained prompt")
    unique = config.get("num_unique_layers")
    if unique is not None and unique != config.get("num_layers"):
        problems.append("num_unique_layers: layers that share their weights")
    if config.get("train_impl") == "rm":
        problems.append("train_impl rm: a reward model")
    if problems:
        raise ConfigError(f"this model is not understood: {'; '.join(problems)}", file=file)


def _groups(keys: _Keys, found: Evidence, heads: int, dim: int) -> int:
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


def _norm(keys: _Keys) -> tuple[str, float]:
    name = keys.word("norm", "layernorm")
    if name not in NORMS:
        raise ConfigError(f"norm is {show(name)}", file=keys.file, hint=f"known: {', '.join(NORMS)}")
    kind, key, default = NORMS[name]
    return kind, keys.real(key, default)


def _activation(keys: _Keys, found: Evidence) -> tuple[str, bool]:
    name = keys.word("activation", "gelu")
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


def _check_head(tied: bool, found: Evidence, file: str) -> None:
    if tied and found.head:
        raise ConfigError("no_weight_tying is false, but there is a final_linear.weight", file=file)
    if not tied and not found.head:
        raise ConfigError("no_weight_tying is true, but there is no final_linear.weight", file=file)


def _positions(keys: _Keys, found: Evidence, dim: int) -> tuple[Rope | None, int]:
    """The rope, and the rows of learned positions."""
    kind = keys.word("pos_emb", "learned")
    if kind not in ("rotary", "learned", "none"):
        raise ConfigError(f"pos_emb is {show(kind)}", file=keys.file, hint="known: rotary, learned, none")
    if (kind == "learned") != (found.positions > 0):
        has = f"{found.positions} rows of" if found.positions else "no"
        raise ConfigError(f"pos_emb is {kind}, but there are {has} position_embeddings", file=keys.file)
    if kind != "rotary":
        return None, found.positions
    fraction = keys.real("rotary_pct", 1.0)
    if fraction > 1 or int(dim * fraction) < 2:
        raise ConfigError(f"rotary_pct is {fraction:g} of heads of width {dim}", file=keys.file)
    return Rope(keys.real("rotary_emb_base", 10000.0), fraction), 0


def _context(keys: _Keys) -> int:
    return keys.integer("max_position_embeddings")


def _biases(keys: _Keys, found: Evidence) -> list[str]:
    """The tensors say which biases there are; notes where the configuration says something else."""
    said = {"use_bias_in_attn_linear": found.qkv_bias or found.o_bias}
    if found.mlp == "linear":
        said["use_bias_in_mlp"] = found.mlp_bias
    wrong = [key for key, has in said.items() if keys.flag(key, True) != has]
    return [f"{key} does not agree with the tensors, which decide" for key in wrong]


def _windows(keys: _Keys, layers: int) -> tuple[int, ...]:
    """Per layer the window; only flash attention has one (its width does not count the token itself)."""
    types = attention_types(keys.config.get("attention_config"), layers, keys.file)
    odd = sorted(set(types) - {"global", "flash"})
    if odd:
        raise ConfigError(f"attention_config has layers of type {some(map(show, odd))}", file=keys.file,
                          hint="understood are global and flash, which are the same function")  # fmt: skip
    if keys.config.get("sliding_window_width") is None:
        return ()
    width = keys.integer("sliding_window_width") + 1
    windows = tuple(width if t == "flash" else 0 for t in types)
    return windows if any(windows) else ()


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


def _notes(config: Config, keys: _Keys, found: Evidence, spec: Spec, layout: str) -> list[str]:
    notes = []
    unknown = sorted(
        k for k, v in config.items() if k not in INERT | _READ | _REFUSED.keys() | _SPECIAL and v is not None
    )
    notes += [f"configuration key {show(k)} is not understood and has no effect here" for k in unknown]
    if keys.defaults:
        notes.append(f"not stated, so GPT-NeoX's defaults are taken: {', '.join(dict.fromkeys(keys.defaults))}")
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


_SPECIAL = frozenset(("soft_prompt_tuning", "num_unique_layers", "train_impl", "sparsity_config", "tokenizer_type"))
