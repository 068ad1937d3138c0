"""Say in words what a model has that a format (or a family) cannot hold.

check_held("OLMo", spec, read_back, ignore=("context",))
    # ConfigError: OLMo cannot hold this olmo3: it has sliding windows of 9 in 4 of 6 layers (would become none)

Whether a format can hold a model is not written down anywhere: its config is written, read back, and must give the
same Spec.  What differs is then said here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from surgery.errors import ConfigError, show
from surgery.model.spec import Rope, Spec

NAMES_ONLY = ("family", "true_vocab", "context")  # fields that do not change what a model computes
Gaps = Mapping[str, tuple[object, object]]


def check_held(who: str, spec: Spec, back: Spec, ignore: Iterable[str] = NAMES_ONLY, hint: str | None = None) -> None:
    """Raise ConfigError if `back`, what the format makes of `spec`, is another model."""
    unused = {"ffn"} if spec.experts and not spec.moe_layers else set()  # no layer is dense
    gaps = {name: pair for name, pair in spec.differences(back).items() if name not in unused.union(ignore)}
    if gaps:
        raise ConfigError(f"{who} cannot hold this {spec.family}: it has {in_words(gaps)}", hint=hint)


def in_words(gaps: Gaps, limit: int = 5) -> str:
    """{"tied": (True, False)} -> "tied embeddings (would become untied)"."""
    said = [f"{say(name, has)} (would become {say(name, gets, short=True)})" for name, (has, gets) in gaps.items()]
    more = f" and {len(said) - limit} more" if len(said) > limit else ""
    return ", ".join(said[:limit]) + more


def say(name: str, value: object, short: bool = False) -> str:
    """say("tied", True) -> "embeddings tied"; `short` leaves out what it is about."""
    about, words = _FIELDS.get(name, (name, _plain))
    text = words(value) if callable(words) else words.get(value, _plain(value))
    return text if short or not about else f"{about} {text}"


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value) if isinstance(value, (int, str)) else show(value)


def _rope(value: Any) -> str:
    if value is None:
        return "none"
    assert isinstance(value, Rope)
    numbers = ", ".join(f"{k} {_plain(v)}" for k, v in value.scaling.items() if k != "type")
    scaling = f", scaled as {_plain(value.scaling.get('type'))} ({numbers})" if value.scaling else ""
    share = f" on {value.fraction:g} of a head" if value.fraction != 1 else ""
    return f"base {value.base:g}{share}{scaling}"


def _windows(value: Any) -> str:
    inside = [w for w in value if w]
    widths = " and ".join(str(w) for w in sorted(set(inside)))
    return f"of {widths} in {len(inside)} of {len(value)} layers" if inside else "none"


def _layers(value: Any) -> str:
    return f"in layers {', '.join(map(str, value))}" if value else "in all layers"


_YES: Mapping[object, str] = {True: "present", False: "absent"}
Words = Mapping[object, str] | Callable[[Any], str]
# field -> (what it is about, its values in words)
_FIELDS: Mapping[str, tuple[str, Words]] = {
    "layers": ("layers:", _plain), "width": ("a model width of", _plain), "vocab": ("a vocabulary of", _plain),
    "ffn": ("an ffn width of", _plain),
    "kv_heads": ("key/value heads:", _plain), "group": ("query heads per key/value head:", _plain),
    "experts": ("experts:", _plain),
    "expert_ffn": ("an expert width of", _plain), "shared_ffn": ("a shared expert of width", _plain),
    "learned_positions": ("learned positions:", _plain),
    "head_dim": ("heads of a width of", _plain),
    "norm": ("", {"rms": "RMSNorm", "layer": "LayerNorm with biases", "layer_no_bias": "LayerNorm without biases",
                  "none": "LayerNorm without weights"}),
    "norm_at": ("norms", {"pre": "before attention and mlp", "post": "after attention and mlp"}),
    "norm_eps": ("a norm epsilon of", _plain),
    "qk_norm": ("query and key norms", {"": "absent", "head": "over each head", "full": "over all heads"}),
    "rope": ("rotary embeddings:", _rope), "rope_local": ("rotary embeddings of the windowed layers:", _rope),
    "windows": ("sliding windows", _windows), "qkv_bias": ("biases of queries, keys and values", _YES),
    "o_bias": ("a bias of the attention's output", _YES), "mlp_bias": ("biases of the mlp", _YES),
    "clip_qkv": ("queries, keys and values clipped to", _plain), "clip_after_norm": ("clipping behind the norms", _YES),
    "act": ("the activation", _plain), "glu": ("a gated mlp", _YES), "parallel": ("a parallel residual", _YES),
    "moe_layers": ("experts", _layers), "top_k": ("top_k", _plain),
    "top_k_renormalised": ("renormalised expert weights", _YES), "router_bias": ("a router bias", _YES),
    "router_score": ("router scores by", _plain), "router_scale": ("a router scale of", _plain),
    "shared_gate": ("a gate of the shared expert", _YES), "tied": ("embeddings", {True: "tied", False: "untied"}),
    "config": ("", lambda value: "another model" if value is None else str(value)),
}  # fmt: skip
