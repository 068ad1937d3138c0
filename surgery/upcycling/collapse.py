"""A mixture of experts back into a dense model: exactly where the experts are copies, else by averaging.

    collapsed(checkpoint, "exact")          # the inverse of copies and virtual groups; refused where it is none
    collapsed(checkpoint, "average")        # the mean of the experts (of the copies of each shard)
    collapsed(checkpoint, "by-router")      # weighted by how much the router uses them on a text

The structure is found in the weights: experts whose router rows are equal in runs of G are the shards of one mlp, as
long as the experts of all groups agree ("exact") or not ("average").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.anatomy import Spec
from surgery.dialects.hf_config import choose_family, misfits
from surgery.errors import ConfigError, UsageError
from surgery.formats import Checkpoint
from surgery.lazy import Concat, Lazy, Map, boxes, same_bits
from surgery.upcycling.build import NEURONS
from surgery.upcycling.experts import Changed
from surgery.upcycling.nodes import scaled

MODES = ("exact", "average", "by-router")
BLOCK = 4 << 20
ORDER = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo", "olmo3")


def collapsed(source: Checkpoint, mode: str = "exact", force_lossy: bool = False) -> Changed:
    """Raises UsageError where another function would come out and that was not allowed, ConfigError where nothing dense
    can come out."""
    spec = source.spec
    if not spec.e:
        raise ConfigError("the model has no experts", hint="surgery upcycle makes some")
    if mode not in MODES:
        raise UsageError(f"--collapse {mode} is unknown", hint=f"choose from {', '.join(MODES)}")
    layers = [i for i in range(spec.l) if spec.is_moe(i)]
    g = _granularity(source, layers)
    losses = _reasons(source, layers, g)
    if losses and (mode == "exact" or not force_lossy):
        hint = "--collapse average or by-router takes means; --force-lossy allows it"
        raise UsageError(f"no dense model computes the same: {'; '.join(losses)}", hint=hint)
    if _shared_factor(source, layers) is None:
        raise ConfigError("the shared expert has a gate that depends on the token: no dense mlp can take its place")
    weights = _shares(source, layers) if mode == "by-router" else {i: [1.0 / spec.e] * spec.e for i in layers}
    shared = _shared_factor(source, layers)
    factor = _factor(spec, g)
    silent = bool(shared) and all(
        _zero(source.parts[f"layers.{i}.experts.{e}.down"]) for i in layers for e in range(spec.e)
    )
    parts: dict[str, Lazy] = {}
    for layer in layers:
        for which, dim in NEURONS.items():
            pieces = _strands(source, layer, which, g, weights[layer] if losses else None)
            joined = Concat(pieces, dim) if len(pieces) > 1 else pieces[0]
            if which == "down":
                joined = scaled(joined, factor)
            if shared:
                always = source.parts[f"layers.{layer}.shared.{which}"]
                always = scaled(always, shared) if which == "down" else always
                joined = always if silent else Concat([always, joined], dim)
            parts[f"layers.{layer}.mlp.{which}"] = joined
    result = _dense(source, parts, layers)
    made = {name: parts.get(name) or source.parts[name] for name in result.part_names()}
    checkpoint = replace(source, spec=result, parts=made)
    return Changed(checkpoint, (source,), f"collapse, {mode}", tuple(losses), {"granularity": g})


def _dense(source: Checkpoint, parts: Mapping[str, Lazy], layers: Sequence[int]) -> Spec:
    """The dense Spec, of the first family that holds it; biases of zeros are dropped where that helps."""
    spec = source.spec
    f = parts[f"layers.{layers[0]}.mlp.gate"].shape[0]
    if len(layers) < spec.l and f != spec.f:
        raise ConfigError(f"the collapsed layers are {f} wide and the dense ones {spec.f}: no family has both")
    fields: dict[str, Any] = {"e": 0, "m": 0, "s": 0, "f": f, "top_k": 0, "moe_layers": (), "router_bias": False,
                              "top_k_renormalised": False, "router_score": "softmax", "router_scale": None,
                              "shared_gate": False}  # fmt: skip
    if spec.qkv_bias and all(
        _zero(source.parts[n]) for n in source.parts if n.endswith(("q.bias", "k.bias", "v.bias"))
    ):
        fields["qkv_bias"] = False
    dense = spec.replace(**fields)
    order = ORDER if spec.h % spec.heads == 0 else ORDER[1:]  # transformers' Llama insists on whole heads
    first = next((name for name in order if not misfits(dense, name)), None)
    return dense.replace(family=first or choose_family(dense))


def _strands(source: Checkpoint, layer: int, which: str, g: int, weights: Sequence[float] | None) -> list[Lazy]:
    """The shards of the mlp: of the first group, or the means over all groups."""
    parts = [source.parts[f"layers.{layer}.experts.{e}.{which}"] for e in range(source.spec.e)]
    if weights is None:
        return parts[:g]
    return [Map(_weighted([weights[e] for e in range(s, len(parts), g)]), parts[s::g]) for s in range(g)]


def _weighted(weights: Sequence[float]) -> Any:
    total = sum(weights) or 1.0

    def mix(*tensors: Any) -> Any:
        out = tensors[0].float() * (weights[0] / total)
        for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
            out = out + tensor.float() * (weight / total)
        return out.to(tensors[0].dtype)

    return mix


def _granularity(source: Checkpoint, layers: Sequence[int]) -> int:
    """How many neighbouring experts share a row of the router, in every layer."""
    e = source.spec.e
    if source.spec.router_bias and not all(_zero(source.parts[f"layers.{i}.router.bias"]) for i in layers):
        return 1
    found = e
    for layer in layers:
        rows = source.parts[f"layers.{layer}.router"].full()
        for g in sorted((d for d in range(1, found + 1) if e % d == 0), reverse=True):
            if g < e and all(bool((rows[i] == rows[i // g * g]).all()) for i in range(e)):
                found = g
                break
    return 1 if found == e else found


def _copies(source: Checkpoint, layers: Sequence[int], g: int) -> bool:
    """Whether expert i is the same as expert i mod g, bit for bit."""
    for layer in layers:
        for which in NEURONS:
            first = [source.parts[f"layers.{layer}.experts.{e}.{which}"] for e in range(g)]
            for e in range(g, source.spec.e):
                if not _same(first[e % g], source.parts[f"layers.{layer}.experts.{e}.{which}"]):
                    return False
    return True


def _reasons(source: Checkpoint, layers: Sequence[int], g: int) -> list[str]:
    spec, out = source.spec, []
    if not _copies(source, layers, g):
        out.append("the experts are no copies of each other")
    if not spec.top_k_renormalised and spec.top_k < spec.e:
        out.append("the chosen experts' weights do not sum to one")
    if spec.top_k % g:
        out.append(f"top-{spec.top_k} takes no whole groups of {g}")
    if spec.s and _shared_factor(source, layers) is None:
        out.append("the shared expert has a gate that depends on the token")
    return out


def _factor(spec: Spec, g: int) -> float:
    """What a chosen group's sum has to be multiplied by: its weights sum to one, each shard's share is 1 / g."""
    return (spec.router_scale or 1.0) / g


def _shared_factor(source: Checkpoint, layers: Sequence[int]) -> float | None:
    """The factor on the shared expert's output: None if it is not constant, 0 if there is none or it adds nothing."""
    spec = source.spec
    if not spec.s or all(_zero(source.parts[f"layers.{i}.shared.down"]) for i in layers):
        return 0.0
    if not spec.shared_gate:
        return 1.0
    return 0.5 if all(_zero(source.parts[f"layers.{i}.shared_gate"]) for i in layers) else None


def _shares(source: Checkpoint, layers: Sequence[int]) -> dict[int, list[float]]:
    """Per layer, how much of the routers' weight each expert gets on a text."""
    from surgery.upcycling.layerwise import forward
    from surgery.upcycling.proof import prose_tokens

    tokens, _ = prose_tokens(source, 256)
    routes = forward(source, tokens, "float32").routes
    out = {}
    for layer in layers:
        chances = routes[layer].logits.softmax(-1)
        chosen = chances.gather(-1, routes[layer].chosen)
        used = chances.new_zeros(source.spec.e).index_add(
            0, routes[layer].chosen.flatten(), (chosen / chosen.sum(-1, keepdim=True)).flatten()
        )
        out[layer] = [float(x) for x in used / used.sum()]
    return out


def _same(a: Lazy, b: Lazy) -> bool:
    return all(same_bits(a.read(box), b.read(box)) for box in boxes(a.shape, 4, BLOCK))


def _zero(part: Lazy) -> bool:
    return all(not bool(part.read(box).any()) for box in boxes(part.shape, 4, BLOCK))
