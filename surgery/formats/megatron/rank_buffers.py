"""Adam's state in the buffers of ranks, as two variants of Megatron's `torch_dist` keep it.

    states = read_states(dcp, args, spec, parts)          # None if the folder holds no such buffers

optimizer.distributed.dp_group_idx_G.                     G: tp + TP * pp, or of the experts etp + ETP * (ep + EP * pp)
    gbuf_idx_I.dtype_(D, GRAD).bucket_idx_B.exp_avg       `dp_reshardable` (core 0.15 and later, by default): a bucket
    param_state/shard_0_1                                 `dp_zero_gather_scatter` (before): what distrib_optim.pt holds
    optimizer/shard_0_1                                   the groups and the step
Where experts have an optimizer of their own, the keys begin with chained_0. (dense) and chained_1. (experts).  Buffers
are of the parameters that a rank holds in memory, so `args` have to say how the model was divided; how many layers a
stage has, its buffers tell (stages.py).
Source: megatron/core `optimizer/distrib_optimizer.py` (sharded_param_state_dp_reshardable, .._dp_zero),
`distributed/param_and_grad_buffer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from surgery.containers.dcp import Dcp
from surgery.errors import FileError, LayoutError, NoStateError, some
from surgery.formats.megatron import entries
from surgery.formats.megatron.buffers import (
    OTHER_SIZES,
    Buffer,
    borders_of,
    buffer_of,
    buffers_of,
    put_buffers,
    wanted_buffers,
)
from surgery.formats.megatron.parameters import Found, Parameter, groups_of, in_order, put_settings, trained_by
from surgery.formats.megatron.stages import Filled, all_on_the_first, layer_counts
from surgery.formats.megatron.table import table
from surgery.formats.optimizer import ALONE, States, one_step
from surgery.formats.table import Table
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import Parts, spread
from surgery.model.spec import Spec
from surgery.tensors.lazy import Lazy

KEY = re.compile(r"(?:chained_(\d{1,6})\.)?optimizer\.distributed\.dp_group_idx_(\d{1,6})\.(.+)")
_BUCKET = re.compile(r"gbuf_idx_(\d{1,6})\.dtype_\(torch\.(\w+), torch\.\w+\)\.bucket_idx_(\d{1,6})\.(\w+)")
_OBJECT = "{}/shard_0_1"


@dataclass
class Held:
    """What a folder keeps of one optimizer of one rank."""

    entries: dict[str, Any] = field(default_factory=dict)  # objects, by what is behind their group
    buckets: dict[tuple[int, str], dict[int, dict[str, Lazy]]] = field(default_factory=dict)

    def object(self, name: str) -> Any:
        """What an object holds; None if there is none."""
        load = self.entries.get(_OBJECT.format(name))
        found = load() if load else None
        return found[0] if isinstance(found, list) and len(found) == 1 else found

    def buffers(self, dcp: Dcp) -> list[Buffer]:
        """In their order, of chunks and dtypes."""
        if self.coalesced is not None:
            return buffers_of(self.coalesced, dcp.folder)
        return [buffer_of(dtype, [buckets[i] for i in sorted(buckets)], dcp.folder)
                for (_, dtype), buckets in sorted(self.buckets.items(), key=lambda pair: pair[0])]  # fmt: skip

    @cached_property
    def coalesced(self) -> Any:
        return self.object("param_state")


def read_states(dcp: Dcp, args: Mapping[str, Any], spec: Spec, parts: Parts) -> States | None:
    """Raises SurgeryError for buffers that are missing, or that the ranks' parameters do not fill."""
    held = _held(dcp)
    if not held:
        return None
    topology, rows = _topology(args, dcp), memory(args)
    entries.check_heads(spec, topology.tp)
    _check_ranks(held, topology, spec, dcp)
    apart = any(which for which, _ in held)

    def divided(topology: Topology) -> Mapping[Rank, Mapping[str, Lazy]]:
        return {rank: {name: stored.tensor for name, stored in chunk.items()}
                for rank, chunk in spread(rows, parts, spec, topology).items()}  # fmt: skip

    if topology.pp * topology.vpp > 1:
        first = divided(all_on_the_first(topology, spec.layers))
        filled = _filled(held, topology, 0 if apart else None, args, dcp)
        topology = replace(topology, stages=layer_counts(topology, spec.layers, first, filled))
    weights, found, used = divided(topology), Found(), set[tuple[int, int]]()
    for rank in topology.ranks():
        if rank.chunk:
            continue
        for which in (0, 1) if apart else (0,):
            mine = _parameters(weights, rank, topology, which if apart else None)
            used.add((which, _group(rank, topology, experts=bool(which))))
            if mine:
                own = _of(held, which, rank, topology, dcp)
                put_buffers(found, rank, mine, own.buffers(dcp), borders_of(args, rank), dcp.folder)
                put_settings(found, mine, groups_of(own.object("optimizer"), dcp.folder), dcp.folder)
    if surplus := sorted(held.keys() - used):
        raise LayoutError(f"holds an optimizer of the ranks {some(number for _, number in surplus)}, which args do not "
                          "have", file=dcp.path, hint=ALONE)  # fmt: skip
    return States({role: shards for role, shards in found.roles.items() if shards}, one_step(found.steps, dcp.folder),
                  found.groups, table=rows, weights=weights, topology=topology)  # fmt: skip


def memory(args: Mapping[str, Any]) -> Table:
    """The table of the parameters as they lie in memory, which names them as the legacy files do."""
    local = args.get("transformer_impl") == "local"
    grouped = args.get("moe_use_legacy_grouped_gemm") or local
    experts = ("grouped" if grouped else "te_grouped") if args.get("moe_grouped_gemm") else "sequential"
    return table("local" if local else "te", experts)


def _topology(args: Mapping[str, Any], dcp: Dcp) -> Topology:
    tp, pp, ep, etp = entries.parallel_sizes(args, dcp.folder)
    vpp = args.get("virtual_pipeline_model_parallel_size")
    return Topology(tp, pp, ep, vpp if type(vpp) is int and 0 < vpp < 1 << 16 else 1, etp=None if etp == tp else etp)


def _check_ranks(held: Collection[tuple[int, int]], topology: Topology, spec: Spec, dcp: Dcp) -> None:
    """Raise LayoutError for more ranks than the folder can be of, before anything is made for each of them."""
    there = sum(not which for which, _ in held)
    if topology.tp * topology.pp > there or topology.ep > max(1, spec.experts):
        raise LayoutError(f"holds optimizers of {there} ranks, and args say tp {topology.tp}, pp {topology.pp}, ep "
                          f"{topology.ep} for {spec.experts} experts", file=dcp.path, hint=OTHER_SIZES)  # fmt: skip


def _group(rank: Rank, topology: Topology, *, experts: bool) -> int:
    """The number of a rank among those that divide the model, tensor ranks first."""
    if not experts:
        return rank.tp + topology.tp * rank.pp
    etp = topology.expert_tp
    return rank.tp % etp + etp * (rank.ep + topology.ep * rank.pp)


def _held(dcp: Dcp) -> dict[tuple[int, int], Held]:
    """By optimizer (dense, experts) and group of ranks.  Raises NoStateError for optimizers of other kinds."""
    out: dict[tuple[int, int], Held] = {}
    for name, value in (*dcp.tensors.items(), *dcp.objects.items()):
        if not (m := KEY.fullmatch(name)):
            continue
        which = int(m[1] or 0)
        if which > 1:
            raise NoStateError(f"holds {which + 1} optimizers: those of dense and of expert parameters are read",
                               file=dcp.path, hint=ALONE)  # fmt: skip
        mine = out.setdefault((which, int(m[2])), Held())
        if not isinstance(value, Lazy):
            mine.entries[m[3]] = value
        elif b := _BUCKET.fullmatch(m[3]):
            mine.buckets.setdefault((int(b[1]), b[2]), {}).setdefault(int(b[3]), {})[b[4]] = value
        else:
            raise NoStateError(f"holds {some([name])}, which is no bucket of Adam's state", file=dcp.path, hint=ALONE)
    return out


def _of(held: Mapping[tuple[int, int], Held], which: int, rank: Rank, topology: Topology, dcp: Dcp) -> Held:
    """Raises FileError if a rank's optimizer is not there."""
    found = held.get((which, _group(rank, topology, experts=bool(which))))
    if found is None:
        raise FileError(f"holds no optimizer of tensor rank {rank.tp}, stage {rank.pp}, expert rank {rank.ep}",
                        file=dcp.path, hint=OTHER_SIZES)  # fmt: skip
    return found


def _filled(
    held: Mapping[tuple[int, int], Held], topology: Topology, dense: int | None, args: Mapping[str, Any], dcp: Dcp
) -> Filled:
    """Whether parameters of a stage fill its next dense buffers: those behind what was filled before."""
    at: dict[int, int] = {}

    def filled(rank: Rank, every: Sequence[Parameter]) -> bool:
        wanted, stage = list(wanted_buffers(trained_by(dense, every))), Rank(pp=rank.pp)
        begin = at.get(rank.pp, 0)
        there = _of(held, 0, stage, topology, dcp).buffers(dcp)[begin : begin + len(wanted)]
        good = [dtype for dtype, _ in wanted] == [buffer.dtype for buffer in there] and all(
            buffer.places(owned, borders_of(args, stage)) for (_, owned), buffer in zip(wanted, there, strict=True)
        )
        if good:
            at[rank.pp] = begin + len(wanted)
        return good and bool(wanted)

    return filled


def _parameters(
    weights: Mapping[Rank, Mapping[str, Lazy]], rank: Rank, topology: Topology, which: int | None
) -> list[Parameter]:
    """What a rank trains; of two optimizers, the second has the experts."""
    return trained_by(which, (p for v in range(topology.vpp) for p in in_order(v, weights[rank._replace(chunk=v)])))
