"""Experts in another order: `align: experts` finds which expert of a model is which of the first model's.

    opened, notes = aligned(recipe, opened)         # the same models, experts and router rows in matching order

Two experts are as similar as their router rows and their weights (the mean of the cosines); the assignment with the
largest total is found by scipy.  A network does not change when its experts change places together with the router's
rows, so runs that were upcycled or trained apart may hold the same experts in different orders, and the mean of two
experts that do different things is neither.  An option of surgery; mergekit averages what has the same number.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.errors import ConfigError, LayoutError, UsageError
from surgery.formats.base import Checkpoint
from surgery.merging.recipe import Recipe
from surgery.merging.references import Opened
from surgery.merging.vocabulary import Rows
from surgery.tensors.lazy import Lazy, boxes

if TYPE_CHECKING:
    import torch

PIECE = 1 << 16  # elements of every expert that are compared at a time


def aligned(recipe: Recipe, opened: Opened) -> tuple[Opened, list[str]]:
    """The models with their experts in the order of the donor's.  Raises ConfigError, LayoutError and UsageError."""
    _contract(recipe, opened)
    leader = opened[recipe.donor]
    out, notes = {recipe.donor: leader}, []
    for model, checkpoint in opened.items():
        if model != recipe.donor:
            out[model], note = _like(leader, checkpoint)
            notes.append(f"{model}: {note}")
    return out, notes


def _contract(recipe: Recipe, opened: Opened) -> None:
    spec = opened[recipe.donor].spec
    if not spec.experts:
        raise ConfigError("align: experts is given, but the models have no experts", hint="remove it")
    for model, checkpoint in opened.items():
        if checkpoint.spec.experts != spec.experts or checkpoint.spec.layers != spec.layers:
            has = f"{checkpoint.spec.layers} layers of {checkpoint.spec.experts} experts"
            raise LayoutError(f"align: {model} has {has}, {recipe.donor} {spec.layers} of {spec.experts}")
    for s in recipe.slices:
        if len({source.layers for source in s.sources}) > 1:
            raise ConfigError("align: experts needs the same layers of every model in a slice")
    if importlib.util.find_spec("scipy") is None:
        raise UsageError("align: experts needs scipy", hint="pip install 'checkpoint-surgery[merge]'")


def _like(leader: Checkpoint, other: Checkpoint) -> tuple[Checkpoint, str]:
    """`other` with its experts where the leader has the ones that they resemble, and what was done in words."""
    from scipy.optimize import linear_sum_assignment

    parts, moved, layers = dict(other.parts), 0, 0
    before = after = 0.0
    for layer in range(leader.spec.layers):
        if not leader.spec.is_moe(layer):
            continue
        scores = similarity(leader, other, layer)
        order = [int(i) for i in linear_sum_assignment(scores.numpy(), maximize=True)[1]]
        layers += 1
        moved += order != list(range(len(order)))
        before += float(scores.diagonal().mean())
        after += float(sum(scores[i, j] for i, j in enumerate(order)) / len(order))
        parts |= _reordered(other.parts, f"layers.{layer}.", order)
    note = f"experts of {moved} of {layers} layers were reordered; mean similarity {before / max(1, layers):.3f} -> "
    return replace(other, parts=parts), note + f"{after / max(1, layers):.3f}"


def _reordered(parts: Mapping[str, Lazy], layer: str, order: Sequence[int]) -> dict[str, Lazy]:
    """The parts of a layer whose expert i is what was expert `order[i]`."""
    out: dict[str, Lazy] = {}
    for name in [n for n in parts if n.startswith(layer + "experts.0.")]:
        rest = name.removeprefix(layer + "experts.0.")
        out |= {f"{layer}experts.{i}.{rest}": parts[f"{layer}experts.{j}.{rest}"] for i, j in enumerate(order)}
    for name in (layer + "router", layer + "router.bias"):
        if name in parts:
            out[name] = Rows([parts[name]], [((0, j),) for j in order], 0)
    return out


def similarity(a: Checkpoint, b: Checkpoint, layer: int) -> torch.Tensor:
    """[experts of a, experts of b]: the mean of the cosines of the router's rows and of each weight.  fp64."""
    import torch

    at = f"layers.{layer}."
    names = [n.removeprefix(at + "experts.0.") for n in a.parts if n.startswith(at + "experts.0.")]
    count = range(a.spec.experts)
    groups = [[[c.parts[f"{at}experts.{i}.{name}"] for i in count] for c in (a, b)] for name in names]
    scores = [_cosines(ours, theirs) for ours, theirs in groups]
    routers = [c.parts[at + "router"].full().double() for c in (a, b)]
    scores.append(_normed(routers[0] @ routers[1].T, *(r.square().sum(1) for r in routers)))
    return torch.stack(scores).mean(0)


def _cosines(ours: Sequence[Lazy], theirs: Sequence[Lazy]) -> torch.Tensor:
    """Of every tensor of one list with every one of the other, piece by piece."""
    import torch

    products = torch.zeros(len(ours), len(theirs), dtype=torch.float64)
    squares = [torch.zeros(len(ours), dtype=torch.float64), torch.zeros(len(theirs), dtype=torch.float64)]
    for box in boxes(ours[0].shape, 1, PIECE):
        left, right = (torch.stack([t.read(box).reshape(-1).float() for t in side]) for side in (ours, theirs))
        products += (left @ right.T).double()
        squares[0] += left.double().square().sum(1)
        squares[1] += right.double().square().sum(1)
    return _normed(products, *squares)


def _normed(products: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return products / a.sqrt().outer(b.sqrt()).clamp(min=1e-30)
