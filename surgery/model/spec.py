"""The neutral hub: what the axes of a model measure (`Spec`), and the parts that it consists of.

    spec.part_names()      ["embed", "layers.0.attn_norm", "layers.0.attn.q", ...]
    layout("attn.q")       (g n d) h

Every format is described against these parts, never against another format.  Weights are named without a suffix,
biases end in `.bias`.  The axes:

    l layer     h model width      g key/value head     n query heads per key/value head   d = two x half: head width
    v vocabulary  p learned position  f dense ffn width   e expert   m expert ffn width   s shared-expert ffn width
    a group of heads that is an expert

Rotary embeddings turn the first half of a head (`two` = 0) against the second (`two` = 1), as Hugging Face does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType

from surgery.errors import ConfigError
from surgery.model import fields as about
from surgery.model.sparse import Sparse
from surgery.tensors.axes import Axes, parse


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings: the base, the share of a head that turns, and how long contexts are reached.

    `scaling` is empty or holds `type` (llama3, linear, dynamic, yarn, longrope) and that type's own numbers under
    the names of Hugging Face's `rope_scaling`.
    """

    base: float = 10000.0
    fraction: float = 1.0
    scaling: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", MappingProxyType(dict(self.scaling)))

    def __str__(self) -> str:
        numbers = ", ".join(f"{k} {about.plain(v)}" for k, v in self.scaling.items() if k != "type")
        scaling = f", scaled as {about.plain(self.scaling.get('type'))} ({numbers})" if self.scaling else ""
        share = f" on {self.fraction:g} of a head" if self.fraction != 1 else ""
        return f"base {self.base:g}{share}{scaling}"


# What fields depend on, for their declaration below.


def _said(value: object) -> str:
    return "none" if value is None else str(value)


def _local_rope(spec: Spec) -> Rope | None:
    return spec.rope_local or spec.rope


def _stretched(spec: Spec) -> bool:
    """Whether the rotary embeddings depend on the longest context."""
    scaling = spec.rope.scaling if spec.rope else {}
    by_length = scaling.get("type") == "longrope" and scaling.get("factor") is scaling.get("attention_factor") is None
    return by_length or scaling.get("type") == "dynamic"


def _by_width(scale: float | None) -> str:
    return "1 / sqrt(head width)" if scale is None else f"{scale:g}"


def _not_one(factor: str) -> about.Test:
    return lambda spec: getattr(spec, factor) != 1


def _score_scale(spec: Spec) -> float:
    return spec.head_dim**-0.5 if spec.score_scale is None else spec.score_scale


def _windows(spec: Spec) -> tuple[int, ...]:
    return spec.windows or (0,) * spec.layers


def _any_window(spec: Spec) -> bool:
    return any(spec.windows)


def _clipped(spec: Spec) -> bool:
    return spec.clip_qkv is not None


def _grouped(spec: Spec) -> bool:
    return spec.attn_experts > 0


def _moe_layers(spec: Spec) -> list[bool]:
    return [spec.is_moe(layer) for layer in range(spec.layers)]


def _any_dense(spec: Spec) -> bool:
    return not all(_moe_layers(spec))


def _sparse(spec: Spec) -> bool:
    return spec.experts > 0


@dataclass(frozen=True)
class Spec:
    """A model's measures and the choices that its function depends on.  Frozen; `replace` makes a changed one."""

    family: str = about.name("family")  # Hugging Face's model_type where there is one: a hint
    layers: int = about.needed("layers", "l")
    width: int = about.needed("model width", "h", "features")
    vocab: int = about.needed("vocabulary", "v", "tokens")
    kv_heads: int = about.needed("key/value heads", "g", "key/value heads")
    group: int = about.needed("query heads per key/value head", "n")
    head_dim: int = about.needed("head width")
    ffn: int = about.size("ffn width", "f", "ffn neurons", _any_dense)
    experts: int = about.size("experts", "e", "experts")
    expert_ffn: int = about.size("expert ffn width", "m", "neurons of an expert", _sparse)
    shared_ffn: int = about.size("shared expert width", "s", "neurons of the shared expert", _sparse)
    learned_positions: int = about.size("learned positions", "p")
    # norms
    norm: str = about.part("norm", "rms", about.NORMS)
    norm_at: str = about.part("place of the norms", "pre", about.NORM_PLACES)
    norm_eps: float = about.choice("norm eps", 1e-5)
    qk_norm: str = about.part("query and key norms", "", about.QK_NORMS)
    # attention
    rope: Rope | None = about.choice("rope", Rope(), _said)
    rope_local: Rope | None = about.choice("rope of layers with a window", None, _said, _any_window, _local_rope)
    windows: tuple[int, ...] = about.choice("sliding window", (), about.window_words, None, _windows)  # () = all 0
    sparse: Sparse | None = about.choice("sparse attention", None, _said)
    qkv_bias: bool = about.part("biases of queries, keys and values", False)
    o_bias: bool = about.part("bias of the attention's output", False)
    clip_qkv: float | None = about.choice("clip of q, k and v", None)
    clip_after_norm: bool = about.choice("clip after the norms of q and k", False, used=_clipped)  # OLMoE
    score_scale: float | None = about.choice("scale of attention scores", None, _by_width, None, _score_scale)
    # attention as a mixture: neighbouring heads are an expert, a token's output is the weighted sum of those it chooses
    attn_experts: int = about.size("groups of attention heads", "a", "groups of attention heads")
    attn_top_k: int = about.choice("groups of heads per token", 0, used=_grouped)
    attn_scale: float | None = about.choice("scale of the groups' weights", None, used=_grouped)
    # feed forward
    act: str = about.choice("activation", "silu")  # silu | gelu | gelu_tanh | relu | relu2
    glu: bool = about.part("gated mlp", True)
    mlp_bias: bool = about.part("biases of the mlp", False)
    parallel: bool = about.choice("parallel residual", False)  # attention and mlp read the same input
    # mixture of experts
    moe_layers: tuple[int, ...] = about.part("layers with experts", (), about.layer_words, _sparse, _moe_layers)
    top_k: int = about.choice("experts per token", 0, used=_sparse)
    top_k_renormalised: bool = about.choice("renormalised experts' weights", False, used=_sparse)  # to a sum of 1
    router_bias: bool = about.part("router bias", False, used=_sparse)  # only ranks the experts (DeepSeek-V3)
    router_score: str = about.choice("router score", "softmax", used=_sparse)  # softmax | sigmoid
    router_scale: float | None = about.choice("scale of the experts' weights", None, used=_sparse)
    shared_gate: bool = about.part("gate of the shared expert", False, used=_sparse)
    # factors of what flows (Granite)
    embed_scale: float = about.choice("scale of the embedding", 1.0, used=_not_one("embed_scale"))
    residual_scale: float = about.choice("scale of what layers add", 1.0, used=_not_one("residual_scale"))
    logits_divisor: float = about.choice("divisor of the logits", 1.0, used=_not_one("logits_divisor"))
    # the rest
    tied: bool = about.part("tied embeddings", False)
    context: int | None = about.name("context", None, _stretched)  # the longest that the model was made for
    true_vocab: int | None = about.name("tokens that are no padding", None)

    def __post_init__(self) -> None:
        for name, known in FIELDS.items():
            if known.kind == about.NEEDED and getattr(self, name) < 1:
                raise ConfigError(f"{known.label}: {getattr(self, name)}, but a model needs at least 1")
        if self.head_dim % 2:
            raise ConfigError(f"heads have two halves of equal width, this one's are {self.head_dim} wide")
        for chosen, there, what in ((self.top_k, self.experts, "experts"),
                                    (self.attn_top_k, self.attn_experts, "groups of heads")):  # fmt: skip
            if chosen > there > 0:
                raise ConfigError(f"a token takes {chosen} {what}, but there are {there}")

    @cached_property
    def sizes(self) -> dict[str, int]:
        """What each axis letter measures."""
        measured = {letter: int(getattr(self, name)) for letter, name in AXES.items()}
        return measured | {"two": 2, "half": self.head_dim // 2, "u": 1}

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def is_moe(self, layer: int) -> bool:
        return self.experts > 0 and (not self.moe_layers or layer in self._sparse_layers)

    @cached_property
    def _sparse_layers(self) -> frozenset[int]:
        return frozenset(self.moe_layers)

    def part_names(self) -> Iterator[str]:
        """Every part that this model has, in the order of the model."""
        for template, part in PARTS.items():
            if "{l}" not in template and part.when(self, 0) and not template.startswith(_LAST):
                yield template
        for layer in range(self.layers):
            yield from self._layer_parts(layer)
        for template, part in PARTS.items():
            if template.startswith(_LAST) and part.when(self, 0):
                yield template

    def part_count(self) -> int:
        """How many parts this model has, without naming them."""
        total = 0
        for template, part in PARTS.items():
            layers = range(self.layers) if "{l}" in template else range(1)
            total += (self.experts if "{e}" in template else 1) * sum(part.when(self, layer) for layer in layers)
        return total

    def _layer_parts(self, layer: int) -> Iterator[str]:
        for template, part in PARTS.items():
            if "{l}" in template and part.when(self, layer):
                if "{e}" not in template:
                    yield template.format(l=layer)
                    continue
                for expert in range(self.experts):
                    yield template.format(l=layer, e=expert)

    def has(self, template: str, layer: int = 0) -> bool:
        """Whether the model has the part of this template (in this layer)."""
        return PARTS[template].when(self, layer)

    def differences(self, other: Spec) -> dict[str, tuple[object, object]]:
        """The fields in which two specs differ."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in FIELDS}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def changes(self, other: Spec) -> dict[str, tuple[object, object]]:
        """The differences that make it another function: those of fields that a model uses, and means otherwise."""
        return {n: pair for n, pair in self.differences(other).items() if _meaning(self, n) != _meaning(other, n)}

    def same_function(self, other: Spec) -> bool:
        """Whether two models with the same weights compute the same."""
        return not self.changes(other)

    def parameters(self, active: bool = False) -> int:
        """How many weights the model has; with `active`, how many of them one token uses (top_k of e experts)."""
        total = 0
        for template, part in PARTS.items():
            size = 1
            for group in part.layout:
                for axis in group:
                    size *= self.sizes[axis]
            layers = range(self.layers) if "{l}" in template else range(1)
            experts = (self.top_k if active else self.experts) if "{e}" in template else 1
            total += size * experts * sum(part.when(self, layer) for layer in layers)
        return total

    replace = replace


FIELDS: Mapping[str, about.Field] = MappingProxyType({f.name: f.metadata[about.KEY] for f in fields(Spec)})
# letter in patterns -> the field that it measures; `two` and `half` make up a head
AXES: Mapping[str, str] = MappingProxyType({known.axis: name for name, known in FIELDS.items() if known.axis})


def _meaning(spec: Spec, name: str) -> object:
    """The value of a field, the same for all ways to write it; None where the model does not use the field."""
    known = FIELDS[name]
    if known.used and not known.used(spec):
        return None
    return known.means(spec) if known.means else getattr(spec, name)


_LAST = ("final_norm", "lm_head")
VOCABULARY = ("embed", "lm_head")  # the parts whose rows are tokens


@dataclass(frozen=True)
class Part:
    """A kind of part: its canonical layout and which models (layers) have it."""

    layout: Axes
    when: Callable[[Spec, int], bool]


def _pre(s: Spec, _: int) -> bool:
    return s.norm != "none" and s.norm_at == "pre"


def _post(s: Spec, _: int) -> bool:
    return s.norm != "none" and s.norm_at == "post"


def _dense(s: Spec, layer: int) -> bool:
    return not s.is_moe(layer)


def _norm_bias(when: Callable[[Spec, int], bool]) -> Callable[[Spec, int], bool]:
    return lambda s, layer: s.norm == "layer" and when(s, layer)


def _table() -> dict[str, Part]:
    rows: list[tuple[str, str, Callable[[Spec, int], bool]]] = [
        ("embed", "v h", lambda s, _: True),
        ("positions", "p h", lambda s, _: s.learned_positions > 0),
        ("layers.{l}.attn_norm", "h", _pre),
        ("layers.{l}.attn_norm.bias", "h", _norm_bias(_pre)),
        ("layers.{l}.attn.q", "(g n d) h", lambda s, _: True),
        ("layers.{l}.attn.q.bias", "(g n d)", lambda s, _: s.qkv_bias),
        ("layers.{l}.attn.k", "(g d) h", lambda s, _: True),
        ("layers.{l}.attn.k.bias", "(g d)", lambda s, _: s.qkv_bias),
        ("layers.{l}.attn.v", "(g d) h", lambda s, _: True),
        ("layers.{l}.attn.v.bias", "(g d)", lambda s, _: s.qkv_bias),
        ("layers.{l}.attn.q_norm", "(g n d)", lambda s, _: s.qk_norm == "full"),
        ("layers.{l}.attn.k_norm", "(g d)", lambda s, _: s.qk_norm == "full"),
        ("layers.{l}.attn.q_head_norm", "d", lambda s, _: s.qk_norm == "head"),
        ("layers.{l}.attn.k_head_norm", "d", lambda s, _: s.qk_norm == "head"),
        ("layers.{l}.attn.o", "h (g n d)", lambda s, _: True),
        ("layers.{l}.attn.o.bias", "h", lambda s, _: s.o_bias),
        ("layers.{l}.attn.router", "a h", lambda s, _: s.attn_experts > 0),
        ("layers.{l}.attn_post_norm", "h", _post),
        ("layers.{l}.mlp_norm", "h", _pre),
        ("layers.{l}.mlp_norm.bias", "h", _norm_bias(_pre)),
        ("layers.{l}.mlp.gate", "f h", lambda s, i: _dense(s, i) and s.glu),
        ("layers.{l}.mlp.gate.bias", "f", lambda s, i: _dense(s, i) and s.glu and s.mlp_bias),
        ("layers.{l}.mlp.up", "f h", _dense),
        ("layers.{l}.mlp.up.bias", "f", lambda s, i: _dense(s, i) and s.mlp_bias),
        ("layers.{l}.mlp.down", "h f", _dense),
        ("layers.{l}.mlp.down.bias", "h", lambda s, i: _dense(s, i) and s.mlp_bias),
        ("layers.{l}.router", "e h", lambda s, i: s.is_moe(i)),
        ("layers.{l}.router.bias", "e", lambda s, i: s.is_moe(i) and s.router_bias),
        ("layers.{l}.experts.{e}.gate", "m h", lambda s, i: s.is_moe(i) and s.glu),
        ("layers.{l}.experts.{e}.up", "m h", lambda s, i: s.is_moe(i)),
        ("layers.{l}.experts.{e}.down", "h m", lambda s, i: s.is_moe(i)),
        ("layers.{l}.shared.gate", "s h", lambda s, i: s.is_moe(i) and s.shared_ffn > 0 and s.glu),
        ("layers.{l}.shared.up", "s h", lambda s, i: s.is_moe(i) and s.shared_ffn > 0),
        ("layers.{l}.shared.down", "h s", lambda s, i: s.is_moe(i) and s.shared_ffn > 0),
        ("layers.{l}.shared_gate", "u h", lambda s, i: s.is_moe(i) and s.shared_gate),
        ("layers.{l}.mlp_post_norm", "h", _post),
        ("final_norm", "h", lambda s, _: s.norm != "none"),
        ("final_norm.bias", "h", lambda s, _: s.norm == "layer"),
        ("lm_head", "v h", lambda s, _: not s.tied),
    ]
    return {name: Part(parse(layout), when) for name, layout, when in rows}


PARTS: Mapping[str, Part] = MappingProxyType(_table())


def template_of(name: str) -> str:
    """ "layers.3.attn.q" -> "layers.{l}.attn.q": the template of a part's name."""
    name = re.sub(r"^layers\.\d+\.", "layers.{l}.", name)
    return re.sub(r"\.experts\.\d+\.", ".experts.{e}.", name)


def layout(name: str) -> Axes:
    """The canonical layout of a part, by its name or template."""
    return PARTS[template_of(name)].layout


def full_template(name: str) -> str:
    """ "attn.q" -> "layers.{l}.attn.q"; names of parts outside the layers stay as they are."""
    return name if name in PARTS else f"layers.{{l}}.{name}"
