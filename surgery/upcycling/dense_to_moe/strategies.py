"""Which neurons of the dense mlp each expert gets, and with which factors: data, not tensors.

    shared, experts = pieces(layout, settings, layer=3, f=1536)
    experts[9]                     # Piece(neurons=range(192, 384), source=0, gate=1, up=1, down=8)

A neuron is a row of `gate`, a row of `up` and a column of `down`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.tensors.random import permutation
from surgery.upcycling.dense_to_moe.resolve import Layout
from surgery.upcycling.dense_to_moe.settings import Settings

if TYPE_CHECKING:
    from surgery.upcycling.dense_to_moe.measures import Measured


@dataclass(frozen=True)
class Piece:
    """Neurons of one dense mlp, in order, and the factors on their weights."""

    neurons: Sequence[int]
    source: int = 0
    gate: float = 1.0
    up: float = 1.0
    down: float = 1.0


Cut = Callable[[Layout, Sequence[int]], list[tuple[Sequence[int], int]]]  # neurons and source of each expert


def _copies(layout: Layout, neurons: Sequence[int]) -> list[tuple[Sequence[int], int]]:
    return [(neurons, 0)] * layout.experts


def _shards(layout: Layout, neurons: Sequence[int]) -> list[tuple[Sequence[int], int]]:
    """Expert i holds shard i mod G, so that the experts of a group stand side by side, as Megatron has them."""
    m, g = layout.m, layout.granularity
    return [(neurons[i % g * m : (i % g + 1) * m], 0) for i in range(layout.experts)]


def _parts(layout: Layout, neurons: Sequence[int]) -> list[tuple[Sequence[int], int]]:
    return [(neurons[i * layout.m : (i + 1) * layout.m], 0) for i in range(layout.experts)]


CUTS: Mapping[str, Cut] = {
    "copy": _copies,
    "virtual-group": _shards,
    "partition": _parts,
    "drop": _copies,
    "mix": _copies,
}


def redrawn_places(wanted: Settings, layer: int, expert: int, which: str, m: int) -> list[int]:
    """drop: which of an expert's `m` neurons are drawn anew in gate, up or down: the same in all three, or others in
    each (as the published script has it, Nakamura et al. 2502.19261)."""
    name = f"layers.{layer}.experts.{expert}.redrawn" + (f".{which}" if wanted.reinit_indices == "independent" else "")
    return permutation(wanted.seed, name, m)[: round(wanted.reinit * m)]


def pieces(
    layout: Layout, wanted: Settings, layer: int, f: int, measured: Measured | None = None
) -> tuple[Piece | None, list[Piece]]:
    """The shared expert (None without one) and the routed ones of a layer whose mlp has `f` neurons."""
    order: Sequence[int] = range(f)
    if wanted.order == "random":
        order = permutation(wanted.seed, f"layers.{layer}.order", f)
    if measured and layer in measured.orders:
        order = measured.orders[layer]
    shared, rest = (order, order) if layout.whole_shared else (order[: layout.s], order[layout.s :])
    if not isinstance(order, range):
        shared = sorted(shared)
    cut = CUTS[layout.strategy](layout, rest)
    if not isinstance(order, range):  # within an expert neurons may stand in any order: ascending is read fastest
        cut = [(sorted(neurons), source) for neurons, source in cut]
    if layout.strategy == "mix":  # expert i of N comes from model i M // N
        models = 1 + len(wanted.sources)
        cut = [(neurons, i * models // layout.experts) for i, (neurons, _) in enumerate(cut)]
    routed = [Piece(neurons, source, layout.gate, layout.up, layout.down) for neurons, source in cut]
    return (Piece(shared) if layout.s else None), routed
