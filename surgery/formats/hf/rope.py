"""Rotary embeddings in Hugging Face's `config.json` <-> Rope: classic keys, or transformers 5's `rope_parameters`.

    rope, local = read_rope(family, keys, windowed=False)
    write_rope(family, spec)             # {"rope_theta": 10000.0, "rope_scaling": {...}}

Source: transformers `modeling_rope_utils.py` (standardize_rope_params and the functions of each type).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from surgery.errors import ConfigError, show
from surgery.formats.hf.families import Family
from surgery.formats.keys import Keys
from surgery.model.spec import Rope, Spec

Config = Mapping[str, object]
Json = dict[str, object]
ORIGINAL = "original_max_position_embeddings"
NUMBERS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", ORIGINAL, "attention_factor",
           "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned", "short_factor", "long_factor",
           "low_freq_factor", "high_freq_factor")  # fmt: skip
CLASSIC = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", ORIGINAL)
TWO = "programs differ in which of them they take: remove the wrong one"
TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def read_rope(family: Family, keys: Keys, windowed: bool) -> tuple[Rope | None, Rope | None]:
    """The rope, and that of layers with a window where it differs.  Raises ConfigError."""
    if family.learned:
        return None, None
    config, (base_key, fraction_key) = keys.config, family.rope_keys
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise ConfigError("rope_scaling is no mapping", file=keys.file)
    names = (base_key, fraction_key, ORIGINAL)
    top = {k: v for k in names if (v := config.get(k, family.absent.get(k) if k == ORIGINAL else None)) is not None}
    nested = "full_attention" in parameters or "sliding_attention" in parameters
    if family.window == "types":
        # transformers gives a flat dictionary of this family no effect at all
        full = {**(parameters.get("full_attention") or {}), **scaling} if nested else dict(scaling)
        local = dict(parameters.get("sliding_attention") or {}) if nested else {}
        for own in (full, local):
            _one_base(own, top, base_key, keys)
        if nested:  # a length beside dictionaries by layer type has no effect
            top.pop(ORIGINAL, None)
        main = _rope(family, full, top, keys)
        other = _rope(family, local, {} if nested else top, keys)
        return main, (other if windowed and other != main else None)
    if nested:
        raise ConfigError(f"rope_parameters by layer type mean nothing in a {family.model_type}", file=keys.file)
    for own in (scaling, parameters):
        _one_base(own, top, base_key, keys)
    found = _rope(family, scaling or parameters, top, keys)
    if scaling and parameters and found != _rope(family, parameters, top, keys):
        raise ConfigError("rope_scaling and rope_parameters say different things", file=keys.file, hint=TWO)
    return found, None


def _one_base(given: Config, top: Config, base_key: str, keys: Keys) -> None:
    """Raise ConfigError if the base, or the length before scaling, stands in two places and is not the same."""
    for inside, outside in (("rope_theta", base_key), (ORIGINAL, ORIGINAL)):
        if inside in given and outside in top and given[inside] != top[outside]:
            what = f"{outside} is {show(top[outside])}, but {show(given[inside])} in the rope's own section"
            raise ConfigError(what, file=keys.file, hint=TWO)


def _rope(family: Family, given: Config, top: Config, keys: Keys) -> Rope:
    base_key, fraction_key = family.rope_keys
    numbers = dict(given)
    keys.over(given, "the rope's parameters", inert=NUMBERS)  # any other is not understood
    base = numbers.pop("rope_theta", top.get(base_key, family.theta))
    fraction = numbers.pop("partial_rotary_factor", top.get(fraction_key, family.fraction))
    kind = numbers.pop("rope_type", numbers.pop("type", "default"))
    numbers.pop("type", None)
    if base_key not in top and "rope_theta" not in given:
        keys.unstated.append(f"{base_key} = {family.theta:g}")
    for name, value in (("rope base", base), ("rotary fraction", fraction)):
        if type(value) not in (int, float) or not 0 < value < 1e15:  # type: ignore[operator]
            raise ConfigError(f"{name} is {show(value)}", file=keys.file)
    if fraction != 1 and not family.partial:
        raise ConfigError(f"{fraction_key} is {show(fraction)}, but transformers turns all of a head in a "
                          f"{family.model_type}: programs differ in what this model is", file=keys.file)  # fmt: skip
    if kind not in (family.ropes or TYPES):
        raise ConfigError(f"rope_type is {show(kind)}", file=keys.file)
    if kind in ("llama3", "yarn", "longrope") and keys.config.get("max_position_embeddings"):
        numbers.setdefault(ORIGINAL, keys.config["max_position_embeddings"])
        if top.get(ORIGINAL) is not None:  # beside the scaling it counts, as in transformers
            numbers[ORIGINAL] = top[ORIGINAL]
    if kind == "yarn":
        numbers = _plain_yarn(numbers)
    scaling = {} if kind == "default" else {"type": kind, **{k: v for k, v in numbers.items() if v is not None}}
    return Rope(float(base), float(fraction), scaling)  # type: ignore[arg-type]


def check_factors(rope: Rope | None, head_dim: int, file: str) -> None:
    """Raise ConfigError if longrope does not give a factor for every pair of features that is turned."""
    if rope is None or rope.scaling.get("type") != "longrope":
        return
    pairs = int(head_dim * rope.fraction) // 2
    for name in ("short_factor", "long_factor"):
        factors = rope.scaling.get(name)
        if not isinstance(factors, Sequence) or isinstance(factors, str) or len(factors) != pairs:
            raise ConfigError(f"{name} is {show(factors, 60)}, but {pairs} pairs of a head are turned", file=file)


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


def write_rope(family: Family, spec: Spec) -> Json:
    """The keys that `read_rope` reads."""
    if spec.rope is None:
        return {}
    if family.window == "types":
        local = spec.rope_local or spec.rope
        nested = {"full_attention": _parameters(spec.rope), "sliding_attention": _parameters(local)}
        classic = _classic(family, spec.rope) if local in (spec.rope, Rope(spec.rope.base)) else {}
        return {**(classic if not local.scaling else {}), "rope_parameters": nested}
    return _classic(family, spec.rope)


def _classic(family: Family, rope: Rope) -> Json:
    """The keys that every version of transformers reads, and other programs."""
    base_key, fraction_key = family.rope_keys
    config: Json = {base_key: rope.base}
    if rope.fraction != 1.0 or family.fraction != 1.0:
        config[fraction_key] = rope.fraction
    if rope.scaling:
        config["rope_scaling"] = {k: v for k, v in _parameters(rope).items() if k != "rope_theta"}
        outside = ORIGINAL in family.absent or rope.scaling.get("type") == "longrope"  # where transformers 4 looks
        if outside and ORIGINAL in rope.scaling:
            config[ORIGINAL] = rope.scaling[ORIGINAL]
    return config


def both_spellings(config: Config) -> Json:
    """The config of any family with the classic keys beside `rope_parameters`, which transformers 4 and others do not
    read; parts of it too.  As it is where they cannot say the same."""
    inner: Json = {k: both_spellings(v) for k, v in config.items() if isinstance(v, dict) and "rope_parameters" in v}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope or set(rope) - set(NUMBERS):
        return {**config, **inner}
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
    classic = {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope.get("partial_rotary_factor"),
               "rope_scaling": scaling if scaled else None}  # fmt: skip
    missing = {k: v for k, v in classic.items() if v is not None and config.get(k) is None}
    return {**config, **inner, **missing}


def _parameters(rope: Rope) -> Json:
    rest = {k: v for k, v in rope.scaling.items() if k != "type"}
    if rope.scaling.get("type") == "yarn" and (factor := _attention_factor(rest)) is not None:
        rest.setdefault("attention_factor", factor)
    return {"rope_type": rope.scaling.get("type", "default"), "rope_theta": rope.base, **rest}
