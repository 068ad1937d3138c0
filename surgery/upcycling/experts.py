"""Experts of a mixture pruned, kept, duplicated, averaged or reordered: parts -> parts, all of them lazy.

    made = chosen(open_checkpoint("Mixtral-8x7B"), from_flags({"prune": ("4",)}))
    made.checkpoint.spec.e, made.layers[0], made.losses

Every new expert is the mean of some old ones, mostly of one: its matrices, its row of the router and its bias.  Experts
of a virtual group (equal rows of the router) belong together: a token takes all of them, so that a selection that
leaves one of them out, or a top-k that takes half a group, is refused unless it is forced.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.dialects.hf_config import choose_family
from surgery.errors import ConfigError, LayoutError, UsageError, some
from surgery.formats import Checkpoint
from surgery.lazy import ITEMSIZE, Concat, Lazy, Map, Slice, boxes
from surgery.upcycling.claim import Claim
from surgery.upcycling.nodes import Gather, scaled
from surgery.upcycling.selection import Choice, Groups, Selection

if TYPE_CHECKING:
    import torch

BLOCK = 8 << 20
MATRICES = ("gate", "up", "down")
_EXPERT = re.compile(r"layers\.(\d+)\.experts\.(\d+)\.(\w+)$")


@dataclass(frozen=True)
class Chosen:
    """The result before it is written; `layers` gives, by layer, the old experts behind every new one."""

    checkpoint: Checkpoint
    wanted: Selection
    layers: Mapping[int, Groups]
    losses: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return not self.losses

    def claim(self) -> Claim:
        """What the proof holds the result to."""
        spec = self.checkpoint.spec
        return Claim("surgery experts", spec.replace(family=choose_family(spec)), self.exact)

    def to_json(self) -> dict[str, Any]:
        spec = self.checkpoint.spec
        return {
            "settings": self.wanted.to_json(),
            "experts": spec.e,
            "top_k": spec.top_k,
            "layers": {str(i): [list(g) for g in groups] for i, groups in self.layers.items()},
            "exact": self.exact,
            "losses": list(self.losses),
            "parameters": {"total": spec.parameters(), "active": spec.parameters(active=True)},
        }


def chosen(source: Checkpoint, wanted: Selection) -> Chosen:
    """Raises ConfigError for a dense model, UsageError if the selection does not fit it or breaks virtual groups."""
    spec = source.spec
    if not spec.e:
        raise ConfigError("the model has no experts", hint="surgery upcycle makes them")
    moe = [i for i in range(spec.l) if spec.is_moe(i)]
    if odd := [i for i in wanted.layers if i not in moe]:
        raise UsageError(f"layer {odd[0]} has no experts", hint=f"layers with experts: {_ranges(moe)}")
    classes = {i: router_classes(source, i) for i in moe}
    layers = {i: _duplicated(_groups(source, wanted, i, classes[i]), wanted.duplicate) for i in moe}
    counts = {i: len(groups) for i, groups in layers.items()}
    e = counts[moe[0]]
    if other := [i for i in moe if counts[i] != e]:
        raise UsageError(
            f"layer {moe[0]} would have {e} experts and layer {other[0]} {counts[other[0]]}",
            hint="every layer needs as many as the others",
        )
    top_k = wanted.top_k or spec.top_k * wanted.duplicate
    if top_k > e:
        raise UsageError(f"a token uses {top_k} experts, and {e} are left", hint=f"--top-k {e}")
    broken = _broken(layers, classes, top_k)
    if broken and not wanted.force_lossy:
        raise UsageError(broken, hint="choose whole groups (surgery.json tells the granularity), or --force-lossy")
    losses = [*_losses(source, layers, top_k, wanted.duplicate), *([broken] if broken else [])]
    made = spec.replace(e=e, top_k=top_k)
    parts = {name: _part(source, name, layers) for name in made.part_names()}
    if wanted.duplicate > 1 and spec.router_bias and spec.router_score == "softmax":
        parts = _less_biased(parts, wanted.duplicate)
    notes = [*source.notes, *(["the result computes another function: " + "; ".join(losses)] if losses else [])]
    return Chosen(replace(source, spec=made, parts=parts, notes=tuple(notes)), wanted, layers, tuple(losses))


# ------------------------------------------------------------------------------------------------- which experts


def _groups(source: Checkpoint, wanted: Selection, layer: int, classes: Sequence[int]) -> Groups:
    """The old experts behind every new one, before they are duplicated."""
    e, choice = source.spec.e, wanted.for_layer(layer)
    if choice is None:
        return tuple((i,) for i in range(e))
    named = [i for g in choice.groups for i in g]
    if missing := [i for i in named if i >= e]:
        raise UsageError(f"there is no expert {missing[0]} in layer {layer}, it has 0 to {e - 1}")
    return {
        "keep": lambda: choice.groups,
        "drop": lambda: tuple((i,) for i in range(e) if i not in set(named)),
        "permute": lambda: _permuted(choice, e),
        "merge": lambda: _merged(choice, e),
        "prune": lambda: _pruned(source, wanted.by, choice.count, layer, classes),
    }[choice.how]()


def _permuted(choice: Choice, e: int) -> Groups:
    if len(choice.groups) != e:
        missing = sorted(set(range(e)) - {i for g in choice.groups for i in g})
        raise UsageError(f"--permute does not say where {some(missing)} of {e} experts go", hint="--keep drops some")
    return choice.groups


def _merged(choice: Choice, e: int) -> Groups:
    """Those that are merged stand where the first of them stood; the others stay."""
    first = {min(g): g for g in choice.groups}
    gone = {i for g in choice.groups for i in g} - first.keys()
    return tuple(first.get(i, (i,)) for i in range(e) if i not in gone)


def _pruned(source: Checkpoint, by: str, count: int, layer: int, classes: Sequence[int]) -> Groups:
    """The `count` experts of the largest norm; whole virtual groups, by the sum of their experts' squares."""
    e = source.spec.e
    if count > e:
        raise UsageError(f"--prune {count}: there are {e} experts")
    squares = NORMS[by](source, layer)
    size = max(Counter(classes).values()) if len(set(Counter(classes).values())) == 1 else 1
    if count % size:
        raise UsageError(
            f"--prune {count} leaves part of a virtual group of {size} experts", hint=f"choose a multiple of {size}"
        )
    kinds = classes if size > 1 else range(e)
    total: dict[int, float] = {}
    for i, kind in enumerate(kinds):
        total[kind] = total.get(kind, 0.0) + squares[i]
    best = set(sorted(total, key=lambda kind: (-total[kind], kind))[: count // size])
    return tuple((i,) for i, kind in enumerate(kinds) if kind in best)


def _router_norm(source: Checkpoint, layer: int) -> list[float]:
    rows = source.parts[f"layers.{layer}.router"].full().double()
    return [float(x) for x in rows.pow(2).sum(1)]


def _weight_norm(source: Checkpoint, layer: int) -> list[float]:
    out = []
    for i in range(source.spec.e):
        parts = [source.parts.get(f"layers.{layer}.experts.{i}.{x}") for x in MATRICES]
        out.append(sum(float(t.double().pow(2).sum()) for p in parts if p is not None for t in blocks(p)))
    return out


NORMS = {"router-norm": _router_norm, "weight-norm": _weight_norm}


def blocks(part: Lazy) -> Any:
    """A lazy tensor's data in blocks of bounded size."""
    return (part.read(box) for box in boxes(part.shape, ITEMSIZE[part.kind], BLOCK))


def _duplicated(groups: Groups, times: int) -> Groups:
    return tuple(g for g in groups for _ in range(times))


# --------------------------------------------------------------------------------------------- what it means


def router_classes(source: Checkpoint, layer: int) -> list[int]:
    """For each expert, the number of the first expert with the same row (and bias) in the router."""
    from surgery.lazy import bytes_of

    rows = source.parts[f"layers.{layer}.router"].full()
    bias = source.parts.get(f"layers.{layer}.router.bias")
    keys = [hashlib.sha256(bytes_of(row.contiguous())) for row in rows]
    if bias is not None:
        for key, value in zip(keys, bias.full(), strict=True):
            key.update(bytes_of(value.reshape(1)))
    first: dict[bytes, int] = {}
    return [first.setdefault(key.digest(), i) for i, key in enumerate(keys)]


def _broken(layers: Mapping[int, Groups], classes: Mapping[int, Sequence[int]], top_k: int) -> str:
    """How virtual groups would be broken; empty if they are whole, or there are none."""
    for layer, groups in layers.items():
        kinds = classes[layer]
        sizes = set(Counter(kinds).values())
        if sizes == {1} or len(sizes) > 1:
            continue
        size = sizes.pop()
        if size == len(kinds):  # all tie: pieces of one mlp, or a router that was not drawn
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


def _losses(source: Checkpoint, layers: Mapping[int, Groups], top_k: int, duplicate: int) -> list[str]:
    """Every reason why the result computes another function."""
    spec, out = source.spec, []
    used = [{i for g in groups for i in g} for groups in layers.values()]
    fewest = min(len(u) for u in used)
    if fewest < spec.e:
        out.append(f"{spec.e - fewest} of {spec.e} experts are left out")
    if any(len(set(g)) > 1 for groups in layers.values() for g in groups):
        out.append("experts are averaged")
    if top_k != spec.top_k * duplicate:
        out.append(f"a token uses {top_k} experts instead of {spec.top_k * duplicate}")
    if duplicate > 1 and spec.router_score == "sigmoid" and not spec.top_k_renormalised:
        out.append(f"the router's weights are not normalised, so that copies add up to {duplicate} times the output")
    return out


# -------------------------------------------------------------------------------------------------------- parts


def _part(source: Checkpoint, name: str, layers: Mapping[int, Groups]) -> Lazy:
    match = _EXPERT.match(name)
    if match:
        group = layers[int(match[1])][int(match[2])]
        return mean([source.parts[f"layers.{match[1]}.experts.{i}.{match[3]}"] for i in group])
    if name.endswith((".router", ".router.bias")):
        return _rows(source.parts[name], layers[int(name.split(".")[1])])
    return source.parts[name]


def _rows(router: Lazy, groups: Groups) -> Lazy:
    """The rows of a router that belong to the new experts."""
    if all(len(g) == 1 for g in groups):
        return Gather(router, 0, [g[0] for g in groups])
    return Concat([mean([Slice(router, 0, i, i + 1) for i in group]) for group in groups], 0)


def _less_biased(parts: Mapping[str, Lazy], times: int) -> dict[str, Lazy]:
    """Copies share the softmax's mass, so that what is added to it for ranking has to shrink along."""
    return {n: scaled(p, 1 / times) if n.endswith(".router.bias") else p for n, p in parts.items()}


def mean(srcs: Sequence[Lazy], weights: Sequence[float] | None = None) -> Lazy:
    """The mean of tensors, in double precision, rounded once; of equal tensors it is that tensor, bit for bit.

    `weights` (they sum to one) make it a weighted mean.  Raises LayoutError if shapes or dtypes differ.
    """
    if len(srcs) == 1:
        return srcs[0]
    first, *rest = srcs
    if any((s.shape, s.kind) != (first.shape, first.kind) for s in rest):
        raise LayoutError(f"cannot average {first!r} and others: {', '.join(map(repr, rest[:3]))}")
    share = weights or [1 / len(srcs)] * len(srcs)

    def average(a: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        start = a.double()
        total = start.clone()
        for weight, other in zip(share[1:], others, strict=True):
            total += weight * (other.double() - start)
        return total.to(a.dtype)

    return Map(average, srcs)


def _ranges(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) == numbers[-1] - numbers[0] + 1 else some(numbers, 12)
