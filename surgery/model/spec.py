"""The neutral hub: what the axes of a model measure (`Spec`), and the parts that it consists of.

    spec.part_names()      ["embed", "layers.0.attn_norm", "layers.0.attn.q", ...]
    layout("attn.q")       (g n d) h

Every format is described against these parts, never against another format.  Weights are named without a suffix,
biases end in `.bias`.  The axes:

    l layer     h model width      g key/value head     n query heads per key/value head   d = two x half: head width
    v vocabulary  p learned position  f dense ffn width   e expert   m expert ffn width   s shared-expert ffn width

Rotary embeddings turn the first half of a head (`two` = 0) against the second (`two` = 1), as Hugging Face does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType

from surgery.errors import ConfigError
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


@dataclass(frozen=True)
class Spec:
    """A model's measures and the choices that its function depends on.  Frozen; `replace` makes a changed one."""

    family: str  # Hugging Face's model_type where there is one: a hint, the other fields decide
    layers: int
    width: int
    vocab: int
    kv_heads: int
    group: int
    head_dim: int
    ffn: int = 0
    experts: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    learned_positions: int = 0
    # norms
    norm: str = "rms"  # rms | layer (with biases) | layer_no_bias | none (LayerNorm without weights)
    norm_at: str = "pre"  # pre: before attention and mlp | post: after them, inside the residual branch (OLMo2)
    norm_eps: float = 1e-5
    qk_norm: str = ""  # "" | head (over d, shared by the heads) | full (over all heads at once)
    # attention
    rope: Rope | None = Rope()
    rope_local: Rope | None = None  # of the layers with a window, where it differs
    windows: tuple[int, ...] = ()  # per layer the sliding window (counting the token itself), 0 = all; () = all 0
    qkv_bias: bool = False
    o_bias: bool = False
    clip_qkv: float | None = None
    clip_after_norm: bool = False  # clipped behind the query and key norms (Hugging Face's OLMoE), not before them
    # feed forward
    act: str = "silu"  # silu | gelu | gelu_tanh | relu | relu2
    glu: bool = True
    mlp_bias: bool = False
    parallel: bool = False  # attention and mlp read the same input, their outputs are added together
    # mixture of experts
    moe_layers: tuple[int, ...] = ()  # which layers have experts; () with e > 0 = all
    top_k: int = 0
    top_k_renormalised: bool = False  # the chosen experts' weights are divided by their sum
    router_bias: bool = False  # a per-expert bias that only ranks (DeepSeek-V3, Megatron's expert_bias)
    router_score: str = "softmax"  # softmax | sigmoid: what makes the router's logits weights
    router_scale: float | None = None  # the chosen experts' weights are multiplied by it
    shared_gate: bool = False
    # the rest
    tied: bool = False
    context: int | None = None  # the longest context that the model was made for
    true_vocab: int | None = None  # rows of the vocabulary that are no padding, where that is known

    def __post_init__(self) -> None:
        for name, what in _AT_LEAST_ONE.items():
            if getattr(self, name) < 1:
                raise ConfigError(f"a model needs at least one {what}, this one says {getattr(self, name)}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"heads have two halves of equal width, this one's are {self.head_dim} wide")

    @cached_property
    def sizes(self) -> dict[str, int]:
        """What each axis letter measures."""
        measured = {letter: int(getattr(self, name)) for letter, name in AXES.items()}
        return measured | {"two": 2, "half": self.head_dim // 2, "u": 1}

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def is_moe(self, layer: int) -> bool:
        return self.experts > 0 and (not self.moe_layers or layer in self.moe_layers)

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
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

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


AXES: Mapping[str, str] = MappingProxyType(
    {
        "l": "layers",
        "e": "experts",
        "v": "vocab",
        "h": "width",
        "f": "ffn",
        "m": "expert_ffn",
        "s": "shared_ffn",
        "g": "kv_heads",
        "n": "group",
        "p": "learned_positions",
    }
)  # letter in patterns -> the field that it measures; `two` and `half` make up a head
_AT_LEAST_ONE = {"layers": "layer", "width": "model dimension", "vocab": "token", "kv_heads": "key/value head",
                 "group": "query head"}  # fmt: skip
COUNTED: Mapping[str, str] = MappingProxyType(
    {
        "g": "key/value heads",
        "v": "tokens",
        "f": "ffn neurons",
        "m": "neurons of an expert",
        "s": "neurons of the shared expert",
        "h": "features",
        "e": "experts",
    }
)  # what ranks share, in the plural
_LAST = ("final_norm", "lm_head")


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
