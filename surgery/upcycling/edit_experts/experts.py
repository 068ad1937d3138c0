"""Change the experts of a mixture: prune, keep, duplicate, merge, permute, another top-k; parts -> parts, lazily.

    changed = changed_experts(checkpoint, groups=[(0,), (2, 3)], top_k=1)      # expert 0, and the mean of 2 and 3
    changed = changed_experts(checkpoint, groups={0: [(0,), (1,)], 1: [(2,), (3,)]})      # by layer

Everything is one idea: a new expert is the mean of some old ones, and so is its row of the router.  Permuting keeps the
function; so does duplicating all experts m times where m times as many are chosen: the copies' weights add up to the
old ones, for softmax spreads over them and a sum divides by them.  Experts of a virtual group (equal rows of the
router) are chosen together, so that leaving one of them out, or taking half a group, changes the function.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.errors import ConfigError, UsageError
from surgery.formats.base import Checkpoint
from surgery.model.spec import template_of
from surgery.tensors.gather import Gather, scaled
from surgery.tensors.lazy import Concat, Lazy, Map, Slice
from surgery.upcycling.dense_to_moe.noise import Noisy
from surgery.upcycling.proof import Claim, refuse_losses

Groups = Sequence[tuple[int, ...]]
OF_EXPERTS = ("layers.{l}.router", "layers.{l}.router.bias")  # one row each


@dataclass(frozen=True)
class Changed:
    """A checkpoint made of another's, for `run.carry_out`."""

    checkpoint: Checkpoint
    models: Sequence[Checkpoint]
    name: str
    losses: tuple[str, ...]
    details: dict[str, Any]
    rounds: bool = False
    group: int = 1  # runs of so many experts of the result share a row of the router
    family: str = ""  # as which it has to be written

    def claim(self) -> Claim:
        return Claim(self.name, self.checkpoint.spec, not self.losses, self.rounds, self.group)

    def to_json(self) -> dict[str, Any]:
        spec = self.checkpoint.spec
        return {"operation": self.name, "experts": spec.experts, "top_k": spec.top_k, "exact": not self.losses,
                "losses": list(self.losses), **self.details,
                "parameters": {"total": spec.parameters(), "active": spec.parameters(active=True)}}  # fmt: skip


def changed_experts(
    source: Checkpoint,
    groups: Groups | Mapping[int, Groups],
    top_k: int | None = None,
    copies: int = 1,
    force_lossy: bool = False,
    noise: float = 0.0,
    seed: int = 0,
) -> Changed:
    """`copies`: how often every expert stands in `groups`, side by side, of all layers or by layer; all copies but the
    first get `noise`, in standard deviations of their own weights.  Raises SurgeryError."""
    spec = source.spec
    if not spec.experts:
        raise ConfigError("the model has no experts", hint="surgery upcycle makes some")
    moe = [i for i in range(spec.layers) if spec.is_moe(i)]
    layers = dict(groups) if isinstance(groups, Mapping) else dict.fromkeys(moe, groups)
    left = len(layers[moe[0]])
    if other := [i for i in moe if len(layers[i]) != left]:
        raise UsageError(
            f"layer {moe[0]} would have {left} experts and layer {other[0]} {len(layers[other[0]])}",
            hint="every layer needs as many as the others",
        )
    if not left:
        raise UsageError("no expert would be left")
    k = top_k or min(spec.top_k * copies, left)
    if k > left:
        raise UsageError(f"--top-k {k}: only {left} experts are left")
    losses = tuple(_losses(source, layers, k, copies))
    if noise:
        losses += (f"noise: {noise:g} of the weights' standard deviation is added to the copies",)
    refuse_losses(losses, force_lossy)
    scale = spec.router_scale
    if copies > 1 and spec.router_score == "sigmoid" and not spec.top_k_renormalised:
        scale = (scale or 1.0) / copies  # the copies' scores are not divided by anything
    result = spec.replace(experts=left, top_k=k, router_scale=scale)
    shrunk = copies if spec.router_score == "softmax" else 1
    parts = {name: _part(source, name, layers, shrunk) for name in result.part_names()}
    if noise:
        parts = {name: _noisy(name, part, copies, noise, seed) for name, part in parts.items()}
    made = replace(source, spec=result, parts=parts)
    listed = {i: ["+".join(map(str, group)) for group in groups] for i, groups in layers.items()}
    details: dict[str, Any] = {"from": listed[moe[0]]}
    if any(names != listed[moe[0]] for names in listed.values()):
        details["layers"] = {str(i): names for i, names in listed.items()}
    group = _run_length(router_classes(source, moe[0]), layers[moe[0]])
    return Changed(made, (source,), "experts", losses, details, group=group)


def _losses(source: Checkpoint, layers: Mapping[int, Groups], k: int, copies: int) -> list[str]:
    e, out = source.spec.experts, []
    flats = [[i for group in groups for i in group] for groups in layers.values()]
    if any(len(group) > 1 for groups in layers.values() for group in groups):
        out.append("experts are merged")
    if missing := max(e - len(set(flat)) for flat in flats):
        out.append(f"{missing} of {e} experts are gone")
    if k != source.spec.top_k * copies:
        out.append(f"{k} experts are chosen, and {source.spec.top_k * copies} would preserve the function")
    if copies == 1 and any(len(set(flat)) != len(flat) for flat in flats):
        out.append("some experts stand there twice")
    if torn := torn_groups(source, layers, k):
        out.append(torn)
    return out


def router_classes(source: Checkpoint, layer: int) -> list[int]:
    """For each expert, the number of the first expert with the same row (and bias) in the router."""
    from surgery.tensors.lazy import bytes_of

    rows = source.parts[f"layers.{layer}.router"].full()
    bias = source.parts.get(f"layers.{layer}.router.bias")
    keys = [bytes(bytes_of(row.contiguous())) for row in rows]
    if bias is not None:
        keys = [key + bytes(bytes_of(b.reshape(1))) for key, b in zip(keys, bias.full(), strict=True)]
    first: dict[bytes, int] = {}
    return [first.setdefault(key, i) for i, key in enumerate(keys)]


def group_size(classes: Sequence[int]) -> int:
    """How many experts a virtual group has: 1 if there are none, or if all experts tie."""
    sizes = set(Counter(classes).values())
    size = sizes.pop() if len(sizes) == 1 else 1
    return 1 if size == len(classes) else size


def torn_groups(source: Checkpoint, layers: Mapping[int, Groups], top_k: int) -> str:
    """How virtual groups would be torn apart; empty if they stay whole, or there are none."""
    for layer, groups in layers.items():
        kinds = router_classes(source, layer)
        size = group_size(kinds)
        if size == 1:
            continue
        place = {i: kinds[:i].count(kinds[i]) for i in range(len(kinds))}  # which of its group an expert is
        found: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
        for group in groups:
            key = tuple(sorted(kinds[i] for i in group))
            found.setdefault(key, Counter())[tuple(sorted({place[i] for i in group}))] += 1
        copies = set()
        for got in found.values():
            if any(len(p) != 1 for p in got) or len(got) != size or len(set(got.values())) != 1:
                return f"layer {layer}: a virtual group of {size} experts would be incomplete"
            copies.add(next(iter(got.values())))
        if len(copies) > 1 or top_k % (size * copies.pop()):
            return f"layer {layer}: top-{top_k} takes no whole virtual groups of {size} experts"
    return ""


def _part(source: Checkpoint, name: str, layers: Mapping[int, Groups], shrunk: int) -> Lazy:
    """A part of the result.  Copies share the softmax's mass: a bias that is added to it for ranking shrinks along."""
    if template_of(name) not in OF_EXPERTS and ".experts." not in name:
        return source.parts[name]
    groups = layers[int(name.split(".")[1])]
    if ".experts." in name:
        layer, _, rest = name.partition(".experts.")
        number, _, which = rest.partition(".")
        olds = [source.parts[f"{layer}.experts.{i}.{which}"] for i in groups[int(number)]]
        return olds[0] if len(olds) == 1 else Map(mean, olds)
    old = source.parts[name]
    if name.endswith(".bias") and shrunk > 1:
        old = scaled(old, 1 / shrunk)
    if all(len(group) == 1 for group in groups):
        return Gather(old, 0, [group[0] for group in groups])
    rows = [[Slice(old, 0, i, i + 1) for i in group] for group in groups]
    return Concat([row[0] if len(row) == 1 else Map(mean, row) for row in rows], 0)


def _noisy(name: str, part: Lazy, copies: int, noise: float, seed: int) -> Lazy:
    """The part itself, unless it belongs to a copy that is not the first of its expert."""
    _, _, place = name.partition(".experts.")
    return Noisy(part, noise, f"{name}.noise", seed) if place and int(place.partition(".")[0]) % copies else part


def _run_length(kinds: Sequence[int], groups: Groups) -> int:
    """How many neighbours of the new experts share a row of the router, if all runs are as long; else 1."""
    keys = [tuple(kinds[i] for i in group) for group in groups]
    runs = {len(list(run)) for _, run in itertools.groupby(keys)}
    size = runs.pop() if len(runs) == 1 else 1
    return size if size * len(set(keys)) == len(keys) > size else 1


def mean(*tensors: Any) -> Any:
    """In fp32, in the given order, rounded once."""
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return (total / len(tensors)).to(tensors[0].dtype)
