"""Rotary embeddings and sliding windows of OLMo-core's configs <-> Rope and windows.

    keys = Keys({"name": "default", "theta": 500000, "scaling": {...}}, file="config.json")
    rope, interleaved = read_rope(keys, head_dim=128)
    write_rope(rope, head_dim=128)

Source: OLMo-core `nn/rope.py`, `nn/attention/__init__.py` (SlidingWindowAttentionConfig).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import ConfigError, show
from surgery.formats.keys import Keys
from surgery.model.spec import Rope

CLASS = "_CLASS_"
_MODULE = "olmo_core.nn.rope."
ROPE = {"name": "default", "theta": 500000, "no_global_rope": False, "scaling": None, "partial_rotary_factor": 1.0}
_SCALINGS: Mapping[str, Mapping[str, Any]] = {
    "ABFRoPEScalingConfig": {"attention_rescale_factor": 1.0, "new_theta": 8_000_000},
    "PIRoPEScalingConfig": {"attention_rescale_factor": 1.0, "factor": 2.0},
    "StepwiseRoPEScalingConfig": {
        "attention_rescale_factor": 1.0, "factor": 32.0, "low_freq_proportion": 0.0, "high_freq_proportion": 0.25,
        "old_context_len": 8192,
    },
    "YaRNRoPEScalingConfig": {"factor": 8.0, "beta_fast": 32, "beta_slow": 1, "old_context_len": 8192},
    "RoPEScalingConfig": {  # the only one of early releases: Llama 3's
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192,
    },
}  # fmt: skip


def read_rope(keys: Keys, head_dim: int) -> tuple[Rope, bool]:
    """(rotary embeddings, whether pairs lie side by side).  Raises ConfigError."""
    interleaved = keys.choice("name", ("default", "fused", "complex")) == "complex"
    if keys.flag("no_global_rope"):
        raise ConfigError(
            f"{keys.path('no_global_rope')}: layers without rotary embeddings are not supported", file=keys.file
        )
    base, fraction = keys.real("theta"), keys.real("partial_rotary_factor")
    scaling: Mapping[str, Any] = {}
    if keys.section("scaling"):
        base, scaling = _read_scaling(keys, base)
    rope = Rope(base, fraction, scaling)
    _check_ramp(rope, head_dim, keys.file)
    return rope, interleaved


def _read_scaling(keys: Keys, base: float) -> tuple[float, Mapping[str, Any]]:
    """(base, scaling) under Hugging Face's names; a new base is just a base."""
    name = str(keys.section("scaling").get(CLASS, "")).rpartition(".")[2]
    if name not in _SCALINGS:
        raise ConfigError(
            f"{keys.path('scaling')} is of the class {show(name)}",
            file=keys.file,
            hint=f"known: {', '.join(_SCALINGS)}",
        )
    found = keys.below("scaling", _SCALINGS[name], (CLASS,))
    if "attention_rescale_factor" in _SCALINGS[name] and found.real("attention_rescale_factor") != 1.0:
        raise ConfigError(
            f"{found.path('attention_rescale_factor')} is not 1, which no other format holds", file=keys.file
        )
    if name == "ABFRoPEScalingConfig":
        return found.real("new_theta"), {}
    factor = found.real("factor")
    if name == "PIRoPEScalingConfig":
        return base, {"type": "linear", "factor": factor}
    length = {"original_max_position_embeddings": found.integer("old_context_len")}
    if name == "YaRNRoPEScalingConfig":
        betas = {"beta_fast": found.real("beta_fast"), "beta_slow": found.real("beta_slow")}
        return base, {"type": "yarn", "factor": factor, **betas, **length}
    if name == "RoPEScalingConfig":
        low, high = found.real("low_freq_factor"), found.real("high_freq_factor")
    else:
        share, high = found.get("low_freq_proportion"), 1 / found.real("high_freq_proportion")
        if type(share) not in (int, float) or not 0 <= share < 1:
            raise found.bad("low_freq_proportion", share, "a number from 0 up to 1")
        low = 1 / (1 - share)
    return base, {"type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high, **length}


def _check_ramp(rope: Rope, head_dim: int, file: str) -> None:
    """OLMo-core ends YaRN's ramp at half a head, others at a whole one: refuse where that makes a difference."""
    if rope.scaling.get("type") != "yarn":
        return
    dim, slow = int(head_dim * rope.fraction), rope.scaling["beta_slow"]
    length = rope.scaling["original_max_position_embeddings"]
    assert isinstance(slow, (int, float))
    assert isinstance(length, int)
    high = math.ceil(dim * math.log(length / (slow * 2 * math.pi)) / (2 * math.log(rope.base)))
    if high > dim // 2 - 1:
        raise ConfigError(
            f"base {rope.base:g} and {length} positions give YaRN another ramp in OLMo-core than elsewhere",
            file=file,
        )


def write_rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """The section `rope`.  Raises ConfigError if OLMo-core has no such scaling."""
    if rope.base != int(rope.base):
        raise ConfigError(f"OLMo-core cannot hold a rope base of {rope.base}: its theta is a whole number")
    config: dict[str, Any] = {"name": "default", "theta": int(rope.base), "full_precision": True,
                              "no_global_rope": False}  # fmt: skip
    if rope.scaling:
        config["scaling"] = _write_scaling(rope)
        _check_ramp(rope, head_dim, "config.json")
    return {**config, "partial_rotary_factor": rope.fraction, CLASS: _MODULE + "RoPEConfig"}


def _write_scaling(rope: Rope) -> dict[str, Any]:
    numbers: dict[str, Any] = dict(rope.scaling)
    kind, length = numbers.pop("type"), numbers.pop("original_max_position_embeddings", None)
    try:
        if kind == "linear":
            name, config = "PIRoPEScalingConfig", {"factor": numbers.pop("factor")}
        elif kind == "yarn":
            betas = {k: int(numbers.pop(k)) for k in ("beta_fast", "beta_slow")}
            name, config = (
                "YaRNRoPEScalingConfig",
                {"factor": numbers.pop("factor"), **betas, "old_context_len": length},
            )
        elif kind == "llama3":
            low, high = numbers.pop("low_freq_factor"), numbers.pop("high_freq_factor")
            shares = {"low_freq_proportion": 1 - 1 / low, "high_freq_proportion": 1 / high}
            name = "StepwiseRoPEScalingConfig"
            config = {"factor": numbers.pop("factor"), **shares, "old_context_len": length}
        else:
            raise KeyError(kind)
    except (KeyError, TypeError, ZeroDivisionError):
        raise ConfigError(f"OLMo-core cannot hold the rope scaling {dict(rope.scaling)}") from None
    if numbers:
        raise ConfigError(f"OLMo-core cannot hold {', '.join(sorted(numbers))} of a rope scaling of type {kind}")
    return {**config, CLASS: _MODULE + name}


# --------------------------------------------------------------------------------------------------- sliding windows


def read_window(keys: Keys, layer: int, layers: int) -> int:
    """The window of one layer, 0 if it sees everything; `keys` are those of an attention."""
    if not keys.section("sliding_window"):
        return 0
    absent = {"force_full_attention_on_first_layer": True, "force_full_attention_on_last_layer": True}
    found = keys.below("sliding_window", absent, (CLASS,))
    pattern = found.get("pattern")
    if not isinstance(pattern, list) or not pattern or any(type(w) is not int or (w < 1 and w != -1) for w in pattern):
        raise found.bad("pattern", pattern, "a list of window sizes, -1 for none")
    first, last = (found.flag(f"force_full_attention_on_{which}_layer") for which in ("first", "last"))
    if (first and layer == 0) or (last and layer == layers - 1):
        return 0
    window: int = pattern[(layer - first) % len(pattern)]
    return max(0, window)


def write_window(windows: Sequence[int]) -> dict[str, Any]:
    """The section `sliding_window` that gives these windows: the shortest pattern, nothing forced."""
    pattern = [w or -1 for w in windows]
    size = next(n for n in range(1, len(pattern) + 1) if all(w == pattern[i % n] for i, w in enumerate(pattern)))
    return {
        "pattern": pattern[:size],
        "force_full_attention_on_first_layer": False,
        "force_full_attention_on_last_layer": False,
        CLASS: "olmo_core.nn.attention.SlidingWindowAttentionConfig",
    }
