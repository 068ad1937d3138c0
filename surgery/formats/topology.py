"""Which rank stores what: tensor, pipeline (virtual and uneven) and expert parallelism.

Topology(tp=2, pp=4, vpp=2).places(32)      # for each of 32 layers: its stage, its chunk, its number there
list(Topology(tp=2, ep=2, etp=1).grid())    # [(0, 0), (1, 1)]: the pairs of tp and ep that exist
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from surgery.errors import LayoutError, UsageError, show


class Rank(NamedTuple):
    """Who stores a tensor: the tensor-, pipeline- and expert-parallel rank, and the virtual pipeline chunk."""

    tp: int = 0
    pp: int = 0
    ep: int = 0
    chunk: int = 0


@dataclass(frozen=True)
class Topology:
    """How many ranks share the tensors: tp divides the `cut` axes, pp the layers, ep the experts.

    `vpp` chunks of layers per pipeline stage (interleaved schedule); `stages` gives, for uneven pipelines, how many
    layers each (chunk, stage) holds, chunk by chunk in the order of the layers.  `etp` ranks divide the `cut` axes
    of experts where that differs from tp; it divides tp.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    vpp: int = 1
    stages: tuple[int, ...] = ()
    etp: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("stages", "etp") and type(value) is not int:
                raise UsageError(f"{name} must be a whole number, not {show(value)}")
        if self.etp is not None and self.tp % self.etp:
            raise LayoutError(f"{self.etp} expert-tensor-parallel ranks do not divide {self.tp} tensor-parallel ranks")

    @property
    def expert_tp(self) -> int:
        """How many ranks divide the `cut` axes of experts."""
        return self.tp if self.etp is None else self.etp

    def layer_counts(self, layers: int) -> tuple[int, ...]:
        """Layers per (chunk, stage), in the order of the layers."""
        slots = self.pp * self.vpp
        if self.stages:
            if len(self.stages) != slots or sum(self.stages) != layers:
                raise LayoutError(f"stages of {list(self.stages)} layers do not make {layers} layers on {slots} stages")
            return self.stages
        if layers % slots:
            fit = [str(pp) for pp in range(1, layers // self.vpp + 1) if layers % (pp * self.vpp) == 0]
            raise LayoutError(f"cannot divide {layers} layers among {slots} pipeline stages",
                              hint=f"--pp {', '.join(fit)}" if fit else "choose another --vpp")  # fmt: skip
        return (layers // slots,) * slots

    @cache  # noqa: B019  a frozen record of a few numbers: asked once per tensor, kept by the few topologies there are
    def places(self, layers: int) -> list[tuple[int, int, int]]:
        """For every layer: its pipeline stage, its chunk and its number there."""
        counts = self.layer_counts(layers)
        return [(slot % self.pp, slot // self.pp, i) for slot, count in enumerate(counts) for i in range(count)]

    @cache  # noqa: B019  as above
    def grid(self) -> list[tuple[int, int]]:
        """The pairs of tensor- and expert-parallel ranks that exist.

        Ranks are numbered tp first for dense layers and etp first, then ep, for experts; with etp < tp only some
        pairs meet (Megatron-LM, core/parallel_state.py).
        """
        experts = self.expert_tp
        world = range(math.lcm(self.tp, experts * self.ep))
        return sorted({(r % self.tp, r // experts % self.ep) for r in world}, key=lambda pair: pair[::-1])

    def ranks(self) -> Iterator[Rank]:
        for pp in range(self.pp):
            for tp, ep in self.grid():
                for chunk in range(self.vpp):
                    yield Rank(tp, pp, ep, chunk)


ONE_RANK = Topology()
