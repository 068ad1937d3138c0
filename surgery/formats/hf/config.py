"""Hugging Face `config.json` <-> Spec, for every family, from one table of keys.

    spec, facts, notes = read_config({"model_type": "llama", "hidden_size": 4096, ...}, "config.json")
    config = write_config(spec, facts, "bfloat16", "llama")

`FAMILIES` says per `model_type` which keys mean which field, what transformers assumes when a key is absent, and
what is always so.  Whether a family can hold a model is not written down anywhere: its config is written, read back,
and must give the same Spec.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from surgery.errors import ConfigError, show
from surgery.formats.hf.families import EXTRA, FAMILIES, REFUSED, USUAL, Family
from surgery.formats.hf.further import without
from surgery.formats.hf.inert import INERT
from surgery.formats.hf.moe import read_moe, write_moe
from surgery.formats.hf.rope import check_factors, read_rope, write_rope
from surgery.formats.hf.sparse import read_sparse, write_sparse
from surgery.formats.keys import Keys, read, write
from surgery.formats.unknown import Unknown
from surgery.model.spec import Spec
from surgery.model.wording import in_words

Config = Mapping[str, Any]
Json = dict[str, Any]
RENAMED = (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts"))  # by transformers 5


def read_config(config: Config, file: str) -> tuple[Spec, Json, list[str]]:
    """The Spec behind a config.json, the inert facts, and notes on what was absent or not understood.

    Raises ConfigError on an unknown family, a wrong type, or a key that would change the model unseen.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ConfigError(f"model_type is {show(kind)}", file=file, hint=f"known families: {', '.join(FAMILIES)}")
    for key, why in REFUSED.items():
        if config.get(key) and not (key == "auto_map" and family.architecture in _names(config)):
            raise ConfigError(f"{key} is set: {why}", file=file)
    config, notes = _usual(config, family, file)
    optional = dict.fromkeys((*EXTRA, *family.switches, *(family.shared or ())[:1]))
    keys = Keys(config, file, absent={**optional, **family.absent}, nulls=True)
    fields = {"family": family.model_type, **read(family.entries, keys), **family.always, **_heads(family, keys)}
    fields["windows"] = _read_windows(family, keys)
    fields["score_scale"] = _read_scores(family, keys, fields["head_dim"])
    fields["sparse"] = read_sparse(config, fields["kv_heads"] * fields["group"], file)
    if fields["sparse"] and family.code:
        raise ConfigError(f"sparse_attention is set, but a {kind} has attention of its own", file=file)
    fields["rope"], fields["rope_local"] = read_rope(family, keys, bool(fields["windows"]))
    for rope in (fields["rope"], fields["rope_local"]):
        check_factors(rope, fields["head_dim"], file)
    fields["clip_after_norm"] = bool(fields.get("clip_qkv") and fields.get("qk_norm"))
    fields |= read_moe(family, keys, fields)
    fields["learned_positions"] = fields["context"] if family.learned else 0
    facts = {k: v for k, v in config.items() if k in INERT}
    unknown = keys.unknown({*INERT, *EXTRA, *family.fixed, *family.aliases.values(), "auto_map", *REFUSED}, (None,))
    notes += keys.note("transformers")
    notes += [Unknown(key, value) for key, value in unknown.items() if USUAL.get(key) is not value]
    return Spec(**fields), facts, notes


def _usual(config: Config, family: Family, file: str) -> tuple[Config, list[str]]:
    """The config under the usual names of its keys (transformers' attribute_map), and notes."""
    back = {own: usual for usual, own in family.renamed.items()}
    out = {back.get(k, k): v for k, v in config.items() if back.get(k, k) == k or v is not None}
    for own, usual in back.items():
        _agree(own, config.get(own), usual, config.get(usual), file)
    for usual, alias in (*RENAMED, *family.aliases.items()):
        if usual in family.keys:
            _agree(usual, out.get(usual), alias, out.get(alias), file)
            if out.get(usual) is None and out.get(alias) is not None:
                out[usual] = out[alias]
    implied = "intermediate_size" in family.renamed and out.get("intermediate_size") is None
    if implied and type(out.get("hidden_size")) is int:
        out["intermediate_size"] = 4 * out["hidden_size"]
    if out.get("max_position_embeddings") == -1:
        out["max_position_embeddings"] = None
        return out, ["config.json says -1 for the longest context, as OLMo-core does where it does not know it"]
    return out, []


def _agree(a: str, one: object, b: str, other: object, file: str) -> None:
    """Raise ConfigError if two spellings of the same thing say different things."""
    if one is not None and other is not None and one != other:
        raise ConfigError(f"{a} is {show(one)}, but {b}, another spelling of it, is {show(other)}", file=file,
                          hint="programs differ in which of them they take: remove the wrong one")  # fmt: skip


def _names(config: Config) -> tuple[str, ...]:
    names = config.get("architectures")
    return tuple(n for n in names if isinstance(n, str)) if isinstance(names, list) else ()


def _heads(family: Family, keys: Keys) -> Json:
    """Key/value heads, group and head width from the numbers of heads and their width."""
    heads, width = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    groups = heads if family.all_heads else keys.maybe_integer("num_key_value_heads") or heads
    if heads % groups:
        raise ConfigError(f"{heads} attention heads cannot share {groups} key/value heads", file=keys.file)
    dim = (keys.maybe_integer("head_dim") if family.head_dim else None) or width // heads
    if not family.head_dim and width % heads:
        raise ConfigError(f"hidden_size {width} is no multiple of {heads} heads", file=keys.file)
    if not family.head_dim and keys.get("head_dim") not in (None, dim):
        raise ConfigError(f"head_dim is {show(keys.get('head_dim'))}, but {heads} heads of a {family.model_type} with "
                          f"hidden_size {width} are {dim} wide", file=keys.file)  # fmt: skip
    if not dim or dim % 2:
        raise ConfigError(f"heads of width {dim} cannot turn in pairs", file=keys.file)
    return {"kv_heads": groups, "group": heads // groups, "head_dim": dim}


def _read_scores(family: Family, keys: Keys, head_dim: int) -> float | None:
    """The factor on attention scores; None for the usual one, which in single precision is the same number."""
    said, usual = keys.real(family.scores) if family.scores else head_dim**-0.5, head_dim**-0.5
    return None if struct.pack("f", said) == struct.pack("f", usual) else said


def _read_windows(family: Family, keys: Keys) -> tuple[int, ...]:
    """The window of every layer, () if none has one."""
    layers, config = keys.integer("num_hidden_layers"), keys.config
    if not family.window:
        if config.get("sliding_window") is not None or config.get("use_sliding_window"):
            keys.unstated.append(f"sliding_window without effect in a {family.model_type}")
        return ()
    if family.window == "qwen" and not config.get("use_sliding_window"):
        return ()
    stated_none = "sliding_window" in config and config["sliding_window"] is None
    window = 0 if stated_none else keys.maybe_integer("sliding_window", 0) or 0
    types = keys.get("layer_types")
    if types is None:
        types = _default_types(family, keys, layers)
    if not isinstance(types, list) or len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ConfigError("layer_types does not say full_attention or sliding_attention per layer", file=keys.file)
    windows = tuple(window if t == "sliding_attention" else 0 for t in types)
    return windows if any(windows) else ()


def _default_types(family: Family, keys: Keys, layers: int) -> list[str]:
    """The layers with a window where the config does not list them, as transformers decides it."""
    if family.model_type == "qwen2_moe":  # every other layer up to the first so many
        last = keys.integer("max_window_layers", 0)
        return ["full_attention" if i % 2 or i >= last else "sliding_attention" for i in range(layers)]
    first = keys.integer("max_window_layers", 0) if family.window == "qwen" and family.model_type != "qwen3_moe" else 0
    sliding: Callable[[int], bool] = (
        (lambda i: (i + 1) % 4 != 0) if family.window == "types" else (lambda i: i >= first)
    )
    return ["sliding_attention" if sliding(i) else "full_attention" for i in range(layers)]


# ------------------------------------------------------------------------------------------------------- writing


def write_config(spec: Spec, facts: Mapping[str, object], dtype: str, model_type: str) -> Json:
    """The config.json of a family for this spec: classic keys, which transformers 4 and 5 and vLLM all read."""
    family = FAMILIES[model_type]
    if family.whole_heads and spec.width % spec.heads:
        raise ConfigError(f"transformers takes no {model_type} whose width, {spec.width}, is no multiple of its "
                          f"{spec.heads} heads")  # fmt: skip
    config: Json = {"architectures": [family.architecture], "model_type": family.model_type, "pad_token_id": None}
    config |= {k: v for k, v in facts.items() if k in INERT and k not in ("architectures", "torch_dtype", "dtype")}
    config |= write(family.entries, spec)
    if family.code:
        code, name = family.code.removesuffix(".py"), family.architecture.removesuffix("ForCausalLM")
        config["auto_map"] = {"AutoConfig": f"{code}.{name}Config",
                              "AutoModelForCausalLM": f"{code}.{family.architecture}"}  # fmt: skip
    config["num_attention_heads"] = spec.heads
    if not family.all_heads:
        config["num_key_value_heads"] = spec.kv_heads
    if family.head_dim:
        config["head_dim"] = spec.head_dim
    if family.scores:
        config[family.scores] = spec.head_dim**-0.5 if spec.score_scale is None else spec.score_scale
    config |= _write_windows(family, spec) | write_rope(family, spec) | write_moe(family, spec)
    config |= write_sparse(spec.sparse)
    config |= {also: config[key] for key, also in family.aliases.items()}
    if {"ffn", "expert_ffn"} <= set(family.keys.values()):
        config["intermediate_size"] = spec.ffn or spec.expert_ffn  # which no layer has if all have experts
    config = {**without(config), "torch_dtype": dtype}
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


def misfits(spec: Spec, model_type: str) -> dict[str, tuple[object, object]]:
    """The fields in which this family would give another model: {} if it holds the spec exactly."""
    try:
        back, _, _ = read_config(write_config(spec, {}, "float32", model_type), "config.json")
    except (ConfigError, TypeError) as error:
        return {"config": (error.what if isinstance(error, ConfigError) else str(error), None)}
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
    own = f"; a {order[0]} does not: {gaps[order[0]]['config'][0]}" if "config" in gaps[order[0]] else ""
    raise ConfigError(f"no Hugging Face family holds this model{own}; {nearest} comes nearest, but: {has}")
