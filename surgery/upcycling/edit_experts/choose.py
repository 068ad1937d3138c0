"""What a selection means for a model: which old experts are behind every new one.

    changed = chosen(checkpoint, Selection(default=Choice("best", count=4)))     # the four that the router weighs most
    changed.checkpoint.spec.experts, changed.losses

Norms are taken of the source's own weights; experts of a virtual group are chosen together.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.errors import ConfigError, UsageError, some
from surgery.formats.base import Checkpoint
from surgery.tensors.gather import MATRICES, blocks
from surgery.upcycling.edit_experts.experts import Changed, changed_experts, group_size, router_classes
from surgery.upcycling.edit_experts.selection import LARGEST, Choice, Groups, Selection


def chosen(source: Checkpoint, wanted: Selection) -> Changed:
    """Raises ConfigError for a dense model, UsageError if the selection does not fit it or changes what it computes."""
    spec = source.spec
    if not spec.experts:
        raise ConfigError("the model has no experts", hint="surgery upcycle makes them")
    moe = [i for i in range(spec.layers) if spec.is_moe(i)]
    if odd := [i for i in wanted.layers if i not in moe]:
        raise UsageError(f"layer {odd[0]} has no experts", hint=f"layers with experts: {some(moe, 12)}")
    if spec.experts * wanted.duplicate > LARGEST:
        raise UsageError(
            f"--duplicate {wanted.duplicate} would make {spec.experts * wanted.duplicate} experts of {spec.experts}"
        )
    groups = {i: tuple(g for g in groups_for(source, wanted, i) for _ in range(wanted.duplicate)) for i in moe}
    return changed_experts(source, groups, wanted.top_k, wanted.duplicate, wanted.force_lossy, wanted.noise,
                           wanted.seed)  # fmt: skip


def groups_for(source: Checkpoint, wanted: Selection, layer: int) -> Groups:
    """The old experts behind every new one, before they are duplicated."""
    e, choice = source.spec.experts, wanted.for_layer(layer)
    if choice is None:
        return tuple((i,) for i in range(e))
    named = [i for g in choice.groups for i in g]
    if missing := [i for i in named if i >= e]:
        raise UsageError(f"there is no expert {missing[0]} in layer {layer}, it has 0 to {e - 1}")
    made: dict[str, Callable[[], Groups]] = {
        "keep": lambda: choice.groups,
        "prune": lambda: tuple((i,) for i in range(e) if i not in set(named)),
        "permute": lambda: _permuted(choice, e),
        "merge": lambda: choice.groups,
        "best": lambda: _best(source, wanted.by, choice.count, layer),
    }
    return made[choice.how]()


def _permuted(choice: Choice, e: int) -> Groups:
    if len(choice.groups) != e:
        missing = sorted(set(range(e)) - {i for g in choice.groups for i in g})
        raise UsageError(
            f"--permute does not say where {some(missing)} of {e} experts go", hint="--keep leaves some out"
        )
    return choice.groups


def _best(source: Checkpoint, by: str, count: int, layer: int) -> Groups:
    """The `count` experts of the largest norm; whole virtual groups, by the sum of their experts' squares."""
    e = source.spec.experts
    if count > e:
        raise UsageError(f"--best {count}: there are {e} experts")
    squares = NORMS[by](source, layer)
    classes = router_classes(source, layer)
    size = group_size(classes)
    if count % size:
        raise UsageError(
            f"--best {count} leaves part of a virtual group of {size} experts", hint=f"choose a multiple of {size}"
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
    for i in range(source.spec.experts):
        parts = [source.parts.get(f"layers.{layer}.experts.{i}.{x}") for x in MATRICES]
        out.append(sum(float(t.double().pow(2).sum()) for p in parts if p is not None for t in blocks(p)))
    return out


NORMS = {"router-norm": _router_norm, "weight-norm": _weight_norm}
