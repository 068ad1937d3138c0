"""Which families can hold the result: a table, and reasons where they cannot.

    spec, target = fitted(layout, dense_spec, "auto", normalise=True)

Whether a family holds a model exactly is not written down: its config is written for the wanted Spec, read back, and
has to mean the same (`misfits` of formats/hf/config.py).  The table says what may be added without changing the
function: biases of zeros, a shared expert whose `down` is zero, an output head of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgery.errors import ConfigError, UsageError
from surgery.formats.hf.config import misfits
from surgery.formats.hf.families import COUNTED, FAMILIES
from surgery.model.spec import Spec
from surgery.model.wording import in_words
from surgery.upcycling.dense_to_moe.resolve import Layout

IDLE = 16  # neurons of a shared expert that a family insists on


@dataclass(frozen=True)
class Target:
    """A family.  `shared`: it always has a shared expert; `biases`: readers expect biases of q, k, v; `untied`:
    readers expect an output head; `exact_router`: it computes the router's logits in fp32, so that none tie in bf16;
    `undivided`: a program that does not divide the chosen weights by their sum, whatever the config says; `spoilt`:
    what else a program makes of it that transformers does not.
    """

    family: str
    shared: bool = False
    biases: bool = False
    untied: bool = False
    exact_router: bool = False
    undivided: str = ""
    spoilt: str = ""
    about: str = ""


TARGETS: Mapping[str, Target] = {
    t.family: t
    for t in (
        Target("mixtral", about="Llama and Mistral"),
        Target("granitemoeshared", about="Llama and Granite with a shared expert"),
        Target("granitemoe", about="Llama and Granite"),
        Target(
            "qwen2_moe",
            shared=True,
            biases=True,
            undivided="llama.cpp",
            about="Llama and Qwen2; layers may stay dense",
            spoilt="llama.cpp computes NaN where the shared expert's gate is 0, as it is here",
        ),
        Target("qwen3_moe", about="Qwen3; layers may stay dense"),
        Target("flex_olmo", about="OLMo 2"),
        Target("olmoe", undivided="vLLM", about="models that norm all of q and k, norms in front"),
        Target(
            "glm4_moe", shared=True, untied=True, exact_router=True, about="Llama; a factor on the router's weights"
        ),
        Target("ernie4_5_moe", exact_router=True, about="Llama; a bias for balancing"),
    )
}


def fitted(layout: Layout, dense: Spec, target: str, normalise: bool) -> tuple[Spec, Target]:
    """The Spec of the result and its family: the given one, or the first that holds it.

    Raises UsageError for a family that is no target, ConfigError with the reasons where none fits.
    """
    if target != "auto" and target not in TARGETS:
        raise UsageError(f"there is no target {target!r}", hint=f"targets: auto, {', '.join(TARGETS)}")
    if target != "auto":
        found = candidate(layout, dense, TARGETS[target], normalise)
        if gaps := misfits(found, target):
            fits = [name for name, t in TARGETS.items() if not misfits(candidate(layout, dense, t, normalise), name)]
            raise ConfigError(
                f"a {target} cannot hold this model: {why(gaps)}",
                hint=f"these can: {', '.join(fits)}" if fits else "no family can with these settings",
            )
        return found, TARGETS[target]
    refusals = []
    for name, t in TARGETS.items():
        found = candidate(layout, dense, t, normalise)
        gaps = misfits(found, name)
        if not gaps:
            return found, t
        refusals.append(f"\n  {name}: {why(gaps)}")
    raise ConfigError(f"no family can hold the experts of this {dense.family}:{''.join(refusals)}")


def candidate(layout: Layout, dense: Spec, target: Target, normalise: bool) -> Spec:
    """The Spec that the result would have in a family."""
    family = FAMILIES[target.family]
    keys, always = family.keys.values(), family.always
    s = layout.s
    if target.shared and not s:
        s = layout.m if (family.shared or ("",))[0] in COUNTED else min(IDLE, layout.m)
    scale = layout.weight
    return dense.replace(
        family=target.family,
        experts=layout.experts,
        expert_ffn=layout.m,
        shared_ffn=s,
        ffn=dense.ffn if "ffn" in keys or layout.dense else 0,
        top_k=layout.top_k,
        top_k_renormalised=normalise,
        moe_layers=tuple(i for i in range(dense.layers) if i not in layout.dense) if layout.dense else (),
        router_score=str(always.get("router_score", "softmax")),
        router_bias=bool(always.get("router_bias", False)),
        router_scale=1.0 if scale is None and "router_scale" in keys else scale,
        shared_gate=bool(always.get("shared_gate", False)),
        qkv_bias=dense.qkv_bias or target.biases,
        tied=dense.tied and not target.untied,
    )


def why(gaps: Mapping[str, tuple[object, object]]) -> str:
    """In words what a family cannot hold.  `gaps` are pairs of what the model has and what the family would make it."""
    if "moe_layers" in gaps:
        gaps = {name: pair for name, pair in gaps.items() if name != "ffn"}
    return in_words(gaps, 3)
