"""Hugging Face `config.json` <-> Spec, for every family, from one table of keys.

    spec, facts, notes = read_config({"model_type": "llama", "hidden_size": 4096, ...}, "config.json")
    config = write_config(spec, facts, kind="bfloat16")

`FAMILIES` says per `model_type` which keys mean which field, what transformers assumes when a key is absent, and
what is always so.  Whether a family can hold a model is not written down anywhere: its config is written, read back,
and must give the same Spec.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from surgery.errors import ConfigError, show
from surgery.formats.hf.families import ACTS, EXTRA, FAMILIES, INERT, REFUSED, Family
from surgery.formats.hf.moe import read_moe, write_moe
from surgery.model.spec import Rope, Spec
from surgery.model.wording import in_words

Config = Mapping[str, object]
Json = dict[str, object]
ELSEWHERE = {  # what is written and not read
    "attention_moe": "what --attention-experts made is for transformers (trust_remote_code=True) alone; change the "
    "model that it was made of (surgery.json says which), then add attention experts again",
}


def read_config(config: Config, file: str) -> tuple[Spec, Json, list[str]]:
    """The Spec behind a config.json, the inert facts, and notes on what was absent or not understood.

    Raises ConfigError on an unknown family, a wrong type, or a key that would change the model unseen.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        hint = ELSEWHERE.get(str(kind), f"known families: {', '.join(FAMILIES)}")
        raise ConfigError(f"model_type is {show(kind)}", file=file, hint=hint)
    for key, why in REFUSED.items():
        if config.get(key) and not (key == "auto_map" and family.architecture in _names(config)):
            raise ConfigError(f"{key} is set: {why}", file=file)
    config = _usual(config, family, file)
    keys = _Keys(config, family, file)
    fields: Json = {name: keys.take(key) for key, name in family.keys.items()} | dict(family.always)
    fields["act"] = _act(fields["act"], file)
    fields |= keys.heads()
    fields |= dict.fromkeys(family.bias, bool(keys.take("attention_bias"))) if family.bias else {}
    fields["windows"], windowed = _read_windows(family, keys)
    fields["rope"], fields["rope_local"] = _read_rope(family, keys, windowed)
    fields["clip_after_norm"] = bool(fields.get("clip_qkv") and fields.get("qk_norm"))
    fields |= read_moe(family, config, fields, file)
    fields["learned_positions"] = fields["context"] if family.learned else 0
    spec = Spec(**{"family": family.model_type, **fields})  # type: ignore[arg-type]
    facts = {k: v for k, v in config.items() if k in INERT}
    own = {*family.keys, *family.fixed, *family.switches, *family.aliases.values(), *(family.shared or ())[:1]}
    known = INERT | set(EXTRA) | own | {"auto_map", *REFUSED}
    odd = sorted(k for k in config if k not in known and config[k] is not None)
    notes = keys.notes + [f"config key {show(k)} is not understood and has no effect here" for k in odd]
    return spec, facts, notes


def _usual(config: Config, family: Family, file: str) -> Config:
    """The config under the usual names of its keys (transformers' attribute_map)."""
    if not family.renamed:
        return config
    back = {own: usual for usual, own in family.renamed.items()}
    out = {back.get(k, k): v for k, v in config.items() if back.get(k, k) == k or v is not None}
    if out.get("intermediate_size") is None and type(out.get("hidden_size")) is int:
        out["intermediate_size"] = 4 * out["hidden_size"]  # type: ignore[operator]
    if out.pop("scale_attn_weights", True) is not True:
        raise ConfigError("scale_attn_weights is false: attention is not scaled, which no other format does", file=file)
    return out


def _names(config: Config) -> tuple[str, ...]:
    names = config.get("architectures")
    return tuple(n for n in names if isinstance(n, str)) if isinstance(names, list) else ()


class _Keys:
    """Typed access to a config that remembers which significant keys were absent."""

    # transformers 5 renamed one
    _ALIASES: Mapping[str, str] = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
    _INTS = frozenset("layers width vocab ffn expert_ffn experts top_k context".split())
    _FLAGS = frozenset("tied mlp_bias parallel top_k_renormalised qkv_bias".split())

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
        if key == "max_position_embeddings" and value == -1:
            self.notes.append(
                "config.json says -1 for the longest context, as OLMo-core does where it does not know it"
            )
            return None
        self._check(key, value)
        return value

    def _check(self, key: str, value: object) -> None:
        name = self.family.keys.get(key)
        fits = True
        if name in self._INTS:
            fits = type(value) is int and 0 < value < 1 << 31
        elif name in self._FLAGS:
            fits = type(value) is bool
        elif name in ("norm_eps", "clip_qkv", "router_scale"):
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
        """Key/value heads, group and head width from the numbers of heads and their width."""
        heads = self.integer("num_attention_heads", 0)
        width = self.integer("hidden_size", 0)
        default = self.family.absent.get("num_key_value_heads", heads)
        groups = heads if self.family.all_heads else self.integer("num_key_value_heads", default)  # type: ignore[arg-type]
        if not heads or not groups or heads % groups:
            raise ConfigError(f"{heads} attention heads cannot share {groups} key/value heads", file=self.file)
        dim = width // heads
        if self.family.head_dim:
            dim = self.integer("head_dim", self.family.absent.get("head_dim", dim))  # type: ignore[arg-type]
        elif width % heads:
            raise ConfigError(f"hidden_size {width} is no multiple of {heads} heads", file=self.file)
        if not dim or dim % 2:
            raise ConfigError(f"heads of width {dim} cannot turn in pairs", file=self.file)
        return {"kv_heads": groups, "group": heads // groups, "head_dim": dim}


def _act(value: object, file: str) -> str:
    if value not in ACTS:
        raise ConfigError(f"hidden_act is {show(value)}", file=file, hint=f"known: {', '.join(ACTS)}")
    return ACTS[str(value)]


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
    if family.model_type == "qwen2_moe":  # every other layer up to the first so many
        last = keys.integer("max_window_layers", 28)
        return ["full_attention" if i % 2 or i >= last else "sliding_attention" for i in range(layers)]
    first = keys.integer("max_window_layers", 28) if family.window == "qwen" and family.model_type != "qwen3_moe" else 0
    sliding: Callable[[int], bool] = (
        (lambda i: (i + 1) % 4 != 0) if family.window == "types" else (lambda i: i >= first)
    )
    return ["sliding_attention" if sliding(i) else "full_attention" for i in range(layers)]


def _read_rope(family: Family, keys: _Keys, windowed: bool) -> tuple[Rope | None, Rope | None]:
    if family.learned:
        return None, None
    config, (base_key, fraction_key) = keys.config, family.rope_keys
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise ConfigError("rope_scaling is no mapping", file=keys.file)
    names = (base_key, fraction_key, "original_max_position_embeddings")
    top = {k: config[k] for k in names if config.get(k) is not None}
    nested = "full_attention" in parameters or "sliding_attention" in parameters
    if family.window == "types":
        # transformers gives a flat dictionary of this family no effect at all
        full = {**(parameters.get("full_attention") or {}), **scaling} if nested else dict(scaling)
        local = dict(parameters.get("sliding_attention") or {}) if nested else {}
        if nested:  # a length beside dictionaries by layer type has no effect
            top.pop("original_max_position_embeddings", None)
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
        length = "original_max_position_embeddings"
        numbers.setdefault(length, keys.config["max_position_embeddings"])
        if top.get(length) is not None:  # beside the scaling it counts, as in transformers
            numbers[length] = top[length]
    if kind == "yarn":
        numbers = _plain_yarn(numbers)
    scaling = {} if kind == "default" else {"type": kind, **{k: v for k, v in numbers.items() if v is not None}}
    return Rope(float(base), float(fraction), scaling)  # type: ignore[arg-type]


def _plain_yarn(numbers: Json) -> Json:
    """YaRN's numbers without those that say what transformers computes anyway; the ends of the ramp always said."""
    out = {"beta_fast": 32.0, "beta_slow": 1.0} | {k: v for k, v in numbers.items() if v is not None}
    if out.get("truncate") is True:
        del out["truncate"]
    if out.get("attention_factor") is not None and out["attention_factor"] == _attention_factor(out):
        del out["attention_factor"]
    return out


def _attention_factor(numbers: Config) -> float | None:
    """What YaRN multiplies attention by unless told otherwise."""
    factor = numbers.get("factor")
    if type(factor) not in (int, float) or factor < 1 or "mscale" in numbers or "mscale_all_dim" in numbers:  # type: ignore[operator]
        return None
    return 0.1 * math.log(factor) + 1.0  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- writing


def write_config(spec: Spec, facts: Config, kind: str, model_type: str) -> Json:
    """The config.json of a family for this spec: classic keys, which transformers 4 and 5 and vLLM all read."""
    family = FAMILIES[model_type]
    config: Json = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {k: v for k, v in facts.items() if k in INERT and k not in ("architectures", "torch_dtype", "dtype")}
    names = {"gelu_tanh": "gelu_pytorch_tanh"}
    for key, name in family.keys.items():
        value = getattr(spec, name)
        if (name, value) != ("context", None):
            config[key] = names.get(value, value) if name == "act" else value
    config["num_attention_heads"] = spec.heads
    if not family.all_heads:
        config["num_key_value_heads"] = spec.kv_heads
    if family.head_dim:
        config["head_dim"] = spec.head_dim
    if family.bias:
        config["attention_bias"] = bool(getattr(spec, family.bias[0]))
    config |= _write_windows(family, spec) | _write_rope(family, spec)
    config |= write_moe(family, spec)
    config |= {also: config[key] for key, also in family.aliases.items()}
    if {"ffn", "expert_ffn"} <= set(family.keys.values()):
        config["intermediate_size"] = spec.ffn or spec.expert_ffn  # which no layer has if all have experts
    config["torch_dtype"] = kind
    return {family.renamed.get(k, k): v for k, v in config.items()}


def _write_windows(family: Family, spec: Spec) -> Json:
    windows = spec.windows or (0,) * spec.layers
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
    if rope.scaling.get("type") == "yarn" and (factor := _attention_factor(rest)) is not None:
        rest.setdefault("attention_factor", factor)
    return {"rope_type": rope.scaling.get("type", "default"), "rope_theta": rope.base, **rest}


def misfits(spec: Spec, model_type: str) -> dict[str, tuple[object, object]]:
    """The fields in which this family would give another model: {} if it holds the spec exactly."""
    try:
        back, _, _ = read_config(write_config(spec, {}, "float32", model_type), "config.json")
    except (ConfigError, TypeError) as error:
        return {"config": (str(error), None)}
    unlike = spec.differences(back) if spec.context else {}  # every family's config says the context, if it is known
    return spec.changes(back) | {k: v for k, v in unlike.items() if k == "context"}


def choose_family(spec: Spec) -> str:
    """The family that holds the spec: its own if it can, else the first that can.  Raises ConfigError if none can."""
    order = [spec.family] if spec.family in FAMILIES else []
    order += [name for name in FAMILIES if name not in order]
    gaps = {name: misfits(spec, name) for name in order}
    for name in order:
        if not gaps[name]:
            return name
    nearest = min(order, key=lambda name: ("config" in gaps[name], len(gaps[name])))
    has = in_words(gaps[nearest])
    raise ConfigError(f"no Hugging Face family holds this model; {nearest} comes nearest, but: {has}")
