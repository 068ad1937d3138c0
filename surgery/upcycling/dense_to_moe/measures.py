"""What an upcycling learns from weights and activations before it begins: which neurons go together, where tokens lie.

    found = measured(checkpoint, settings, layout)          # None where nothing has to be measured
    found.orders[3]                                         # neurons: the shared ones, then expert after expert
    found.rows[3]                                           # [experts, h] of the router

Orders (Zhu et al. 2406.16554 and LLaMA-MoE v2; Zhang et al. 2110.01786):

    clustering      balanced k-means of the rows of gate (clustering-up: of up), each of length one
    co-activation   balanced k-means of the neurons' |activations| over a text, each of length one
    gradient        balanced k-means of the tokens, and each cluster's expert gets the neurons whose |h dL/dh| is
                    largest there; without sharing the best pair of cluster and neuron is taken first

The shared expert gets the neurons that matter most: by norms of their weights, by mean |activation|, or those in the
best of most clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.errors import UsageError, show
from surgery.formats.base import Checkpoint
from surgery.running.activations import each_layer
from surgery.running.device import CPU, Device
from surgery.running.tokens import tokens_of
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import Lazy
from surgery.upcycling.dense_to_moe.clusters import Clusters, balanced, unit
from surgery.upcycling.dense_to_moe.resolve import Layout
from surgery.upcycling.dense_to_moe.settings import Settings

if TYPE_CHECKING:
    import torch

ACTIVATIONS = ("co-activation", "gradient")  # orders that run the model
WEIGHTS = ("clustering", "clustering-up")
STD = 1.0  # of a k-means router's logits


@dataclass
class Measured:
    """By layer: neurons in the order in which they are cut, and rows of the router (float64)."""

    orders: dict[int, Sequence[int]] = field(default_factory=dict)
    rows: dict[int, torch.Tensor] = field(default_factory=dict)


def measured(source: Checkpoint, wanted: Settings, layout: Layout, on: Device = CPU) -> Measured | None:
    """Measure what the settings need; the same bits for the same seed.

    Raises SurgeryError for a bad text, or one that nothing would read.
    """
    start, argument = wanted.router_kind
    run = wanted.order in ACTIVATIONS or start == "kmeans"
    if wanted.text and not run:
        raise UsageError("--text is for orders and routers that run the model on it, and neither does",
                         hint=f"--order {' or '.join(ACTIVATIONS)}, or --router kmeans")  # fmt: skip
    if not run and wanted.order not in WEIGHTS and start not in ("prompts", "domains"):
        return None
    found = Measured()
    layers = [i for i in range(source.spec.layers) if i not in layout.dense]
    if wanted.order in WEIGHTS:
        for i in layers:
            found.orders[i] = _by_weights(source, wanted, layout, i)
    if run:
        tokens = tokens_of(source, wanted.text or None, wanted.text_tokens)
        look = _Look(wanted, layout, layers, found, _std(argument))
        each_layer(source, tokens, look, wanted.order == "gradient", on=on)
    if start in ("prompts", "domains"):
        from surgery.upcycling.dense_to_moe.prompts import router_rows

        found.rows |= router_rows(source, start, argument, router_size(layout), layers, on)
    return found


def router_size(layout: Layout) -> int:
    """How many different rows the router has."""
    return layout.copies if layout.grouped else layout.experts


def cuts(layout: Layout) -> int:
    """Into how many pieces the mlp is cut."""
    return {"virtual-group": layout.granularity, "partition": layout.experts}.get(layout.strategy, 1)


def _std(argument: str) -> float:
    try:
        std = float(argument or STD)
    except ValueError:
        std = -1.0
    if not 0 < std < 1000:
        raise UsageError(f"--router kmeans:{show(argument)} is no standard deviation", hint="--router kmeans:1")
    return std


class _Look:
    """Sees the activations of one layer after the other, and keeps what follows from them."""

    def __init__(self, wanted: Settings, layout: Layout, layers: Sequence[int], found: Measured, std: float) -> None:
        self.wanted, self.layout, self.layers, self.found, self.std = wanted, layout, layers, found, std

    def __call__(self, layer: int, inputs: Any, hidden: Any, by_hidden: Any = None) -> None:
        if layer not in self.layers:
            return
        wanted, layout = self.wanted, self.layout
        if wanted.router_kind[0] == "kmeans":
            self.found.rows[layer] = kmeans_rows(inputs, router_size(layout), wanted.seed, layer, self.std)
        if wanted.order == "co-activation":
            self.found.orders[layer] = _by_activation(hidden, wanted, layout, layer)
        elif wanted.order == "gradient":
            labels = token_clusters(inputs, cuts(layout), wanted.seed, layer)[0].labels
            scores = importance(hidden, by_hidden, labels, cuts(layout))
            self.found.orders[layer] = by_importance(scores, layout.s, layout.m, wanted.sharing)


# ------------------------------------------------------------------------------------------------------- orders


def _by_weights(source: Checkpoint, wanted: Settings, layout: Layout, layer: int) -> list[int]:
    at = f"layers.{layer}.mlp."
    gate, up, down = (source.parts[at + x].full().float() for x in ("gate", "up", "down"))
    rows = up if wanted.order == "clustering-up" else gate
    weight = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    return _cut(unit(rows), weight, wanted, layout, layer)


def _by_activation(hidden: torch.Tensor, wanted: Settings, layout: Layout, layer: int) -> list[int]:
    size = hidden.abs().float()
    return _cut(unit(size.T), size.mean(0), wanted, layout, layer)


def _cut(rows: torch.Tensor, weight: torch.Tensor, wanted: Settings, layout: Layout, layer: int) -> list[int]:
    """The `s` neurons of the largest weight, then the clusters of the others."""
    import torch

    best = torch.argsort(weight, descending=True, stable=True)
    shared = [] if layout.whole_shared else sorted(best[: layout.s].tolist())
    left = torch.ones(len(rows), dtype=torch.bool)
    left[shared] = False
    rest = left.nonzero().reshape(-1)
    found = balanced(rows[rest], cuts(layout), wanted.seed, f"layers.{layer}.order")
    return shared + [int(rest[i]) for c in range(cuts(layout)) for i in found.members(c)]


def importance(hidden: torch.Tensor, by_hidden: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """[k, f]: the sum of |h dL/dh| over the tokens of each cluster."""
    import torch

    size = (hidden.double() * by_hidden.double()).abs()
    return torch.zeros(k, hidden.shape[1], dtype=torch.float64).index_add(0, labels, size)


def by_importance(scores: torch.Tensor, s: int, m: int, sharing: bool) -> list[int]:
    """Neurons for scores [experts, f]: s shared ones, then m of every expert; with `sharing`, experts may overlap."""
    import torch

    k, f = scores.shape
    left = torch.ones(f, dtype=torch.bool)
    shared: list[int] = []
    if s:
        top = scores.argsort(dim=1, descending=True, stable=True)[:, :m]
        count = torch.zeros(f, dtype=torch.float64).index_add(0, top.reshape(-1), torch.ones(k * m).double())
        share = scores.sum(0)
        shared = sorted(sorted(range(f), key=lambda j: (-float(count[j]), -float(share[j]), j))[:s])
        left[shared] = False
    free = scores.masked_fill(~left, -1.0)
    if sharing:
        best = free.argsort(dim=1, descending=True, stable=True)[:, :m]
        return shared + [j for row in best.tolist() for j in sorted(row)]
    return shared + _greedy(free, m, int(left.sum()))


def _greedy(scores: torch.Tensor, m: int, left: int) -> list[int]:
    """Every neuron to one expert, the best pairs first, m to each."""
    k, f = scores.shape
    members: list[list[int]] = [[] for _ in range(k)]
    taken = [False] * f
    for at in scores.reshape(-1).argsort(descending=True, stable=True).tolist():
        c, j = divmod(at, f)
        if not taken[j] and len(members[c]) < m:
            taken[j] = True
            members[c].append(j)
            left -= 1
            if not left:
                break
    return [j for group in members for j in sorted(group)]


# ------------------------------------------------------------------------------------------------------- routers


def token_clusters(inputs: torch.Tensor, k: int, seed: int, layer: int) -> tuple[Clusters, torch.Tensor]:
    """Clusters of tokens by the direction of what the router sees, and those directions [tokens, h].

    What all tokens have in common (the direction of their mean) is left out: a linear router cannot tell by it.
    """
    x = inputs.double()
    common = unit(x.mean(0, keepdim=True))
    z = unit(x - (x @ common.T) * common)
    if len(z) < k:
        raise UsageError(f"{len(z)} tokens are too few for {k} clusters", hint="--text-tokens N")
    return balanced(z, k, seed, f"layers.{layer}.tokens"), z


def kmeans_rows(inputs: torch.Tensor, k: int, seed: int, layer: int, std: float = STD) -> torch.Tensor:
    """[k, h] float64: the directions of the centres of tokens, so long that the logits' standard deviation is `std`."""
    rows = unit(token_clusters(inputs, k, seed, layer)[0].centres)
    return scaled_to(rows, inputs, std)


def scaled_to(rows: torch.Tensor, inputs: torch.Tensor, std: float) -> torch.Tensor:
    """Rows so long that a token's logits vary by `std` on these inputs."""
    logits = inputs.double() @ rows.T
    spread = float((logits - logits.mean(1, keepdim=True)).pow(2).mean().sqrt())
    return rows * (std / spread) if spread > 0 else rows


def held_rows(rows: Mapping[int, torch.Tensor], layer: int, dtype: str) -> Lazy:
    """The rows of a layer's router as a part."""
    return InMemory(rows[layer], dtype)
