"""How many layers each pipeline stage holds, told by its buffers: one layer more, or less, would not fill them.

    counts = layer_counts(topology, spec.layers, divided(all_on_the_first(topology, spec.layers)), filled)

What args say of uneven stages has many forms (`decoder_first_pipeline_num_layers`, `pipeline_model_parallel_layout`,
`account_for_loss_in_pipeline_split` ...); the sizes of the buffers decide alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from surgery.errors import LayoutError
from surgery.formats.megatron.buffers import OTHER_SIZES
from surgery.formats.megatron.order import LAYER
from surgery.formats.megatron.parameters import Parameter, in_order
from surgery.formats.topology import Rank, Topology
from surgery.tensors.lazy import Lazy

Filled = Callable[[Rank, Sequence[Parameter]], bool]


def all_on_the_first(topology: Topology, layers: int) -> Topology:
    """The same ranks, the first of which has all layers."""
    return replace(topology, stages=(layers, *(0,) * (topology.pp * topology.vpp - 1)))


def layer_counts(
    topology: Topology, layers: int, weights: Mapping[Rank, Mapping[str, Lazy]], filled: Filled
) -> tuple[int, ...]:
    """Layers per (chunk, stage), in the order of the layers.

    `weights` are those of `all_on_the_first`; `filled` says whether some parameters fill the next buffers of a stage.
    Raises LayoutError for buffers that no number of layers fills.
    """
    inside: dict[int, dict[str, Lazy]] = {}
    for name, weight in weights[Rank()].items():
        if m := LAYER.fullmatch(name):
            inside.setdefault(int(m[1]), {})[m[2]] = weight
    counts: list[int] = []
    slots = [Rank(pp=pp, chunk=chunk) for chunk in range(topology.vpp) for pp in range(topology.pp)]
    for rank in slots:
        first, left = sum(counts), layers - sum(counts)
        outside = {name: weight for name, weight in weights[rank].items() if not LAYER.fullmatch(name)}

        def held(n: int, first: int = first, outside: Mapping[str, Lazy] = outside) -> dict[str, Lazy]:
            mine = {f"decoder.layers.{i}.{name}": w for i in range(n) for name, w in inside[first + i].items()}
            return {**outside, **mine}

        tried = [left] if rank == slots[-1] else range(left + 1)
        count = next((n for n in tried if filled(rank, in_order(rank.chunk, held(n)))), None)
        if count is None:
            raise LayoutError(f"has buffers of stage {rank.pp}, chunk {rank.chunk}, which the layers from number "
                              f"{first} on do not fill, however many they are", hint=OTHER_SIZES)  # fmt: skip
        counts.append(count)
    return tuple(counts)
