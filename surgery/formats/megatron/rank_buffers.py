"""Adam's state in the buffers of ranks, as two variants of Megatron's `torch_dist` keep it.

    states = read_states(dcp, args, spec, parts)          # None if the folder holds no such buffers

optimizer.distributed.dp_group_idx_G.                     G: tp + TP * pp, or of the experts etp + ETP * (ep + EP * pp)
    gbuf_idx_I.dtype_(D, GRAD).bucket_idx_B.exp_avg       `dp_reshardable` (core 0.15 and later, by default): a bucket
    param_state/shard_0_1                                 `dp_zero_gather_scatter` (before): what distrib_optim.pt holds
    optimizer/shard_0_1                                   the groups and the step
Where experts have an optimizer of their own, the keys begin with chained_0. (dense) and chained_1. (experts).  Buffers
are of the parameters that a rank holds in memory, so `args` have to say how the model was divided.
Source: megatron/core `optimizer/distrib_optimizer.py` (sharded_param_state_dp_reshardable, .._dp_zero),
`distributed/param_and_grad_buffer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.containers.dcp import Dcp
from surgery.errors import FileError, LayoutError, NoStateError, some
from surgery.formats.flat import cut, fill
from surgery.formats.megatron import entries
from surgery.formats.megatron.optimizer import (
    ALIGN,
    BUFFERS,
    Found,
    Parameter,
    bucket_size,
    buffers_of,
    groups_of,
    put_coalesced,
    put_settings,
    trained_by,
    wanted_buffers,
)
from surgery.formats.megatron.order import place
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
_SIZES = f"the sizes of its run are not those that args say, or its layers are divided unevenly; {ALONE}"


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


def read_states(dcp: Dcp, args: Mapping[str, Any], spec: Spec, parts: Parts) -> States | None:
    """Raises SurgeryError for buffers that are missing, or that the ranks' parameters do not fill."""
    held = _held(dcp)
    if not held:
        return None
    topology, rows = _topology(args, dcp), memory(args)
    entries.check_heads(spec, topology.tp)
    weights = {rank: {name: stored.tensor for name, stored in chunk.items()}
               for rank, chunk in spread(rows, parts, spec, topology).items()}  # fmt: skip
    found, used = Found(), set[tuple[int, int]]()
    apart = any(which for which, _ in held)
    for rank in topology.ranks():
        if rank.chunk:
            continue
        for which in (0, 1) if apart else (0,):
            mine = _parameters(weights, rank, topology, which if apart else None)
            group = which, _group(rank, topology, experts=bool(which))
            used.add(group)
            if mine:
                _put(found, rank, mine, held.get(group), dcp, bucket_size(args, rank))
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


def _parameters(
    weights: Mapping[Rank, Mapping[str, Lazy]], rank: Rank, topology: Topology, which: int | None
) -> list[Parameter]:
    """What a rank trains, in the order of Megatron's modules; of two optimizers, the second has the experts."""
    chunks = ((v, weights[rank._replace(chunk=v)]) for v in range(topology.vpp))
    every = (Parameter(v, name, chunk[name]) for v, chunk in chunks for name in sorted(chunk, key=place))
    return trained_by(which, every)


def _put(
    found: Found, rank: Rank, mine: Sequence[Parameter], held: Held | None, dcp: Dcp, bucket: int | None
) -> None:  # fmt: skip
    """The state of a rank's parameters."""
    if held is None:
        raise FileError(f"holds no optimizer of tensor rank {rank.tp}, stage {rank.pp}, expert rank {rank.ep}",
                        file=dcp.path, hint=_SIZES)  # fmt: skip
    whole = held.object("param_state")
    if whole is not None:
        put_coalesced(found, rank, mine, buffers_of(whole, dcp.folder), bucket, dcp.folder)
    else:
        for owned, buckets in _matched(mine, held, dcp):
            _put_buckets(found, rank, owned, buckets, dcp)
    settings = held.object("optimizer")
    put_settings(found, mine, groups_of(settings, dcp.folder), dcp.folder)


def _matched(
    mine: Sequence[Parameter], held: Held, dcp: Dcp
) -> Iterator[tuple[list[Parameter], list[Mapping[str, Lazy]]]]:
    """The parameters of each buffer, with its buckets in their order."""
    wanted = list(wanted_buffers(mine))
    numbers = sorted(held.buckets)
    if [dtype for dtype, _ in wanted] != [dtype for _, dtype in numbers]:
        raise LayoutError(f"has buffers of {some(d for _, d in numbers)}, the model {some(d for d, _ in wanted)}",
                          file=dcp.path, hint=_SIZES)  # fmt: skip
    for number, (_, owned) in zip(numbers, wanted, strict=True):
        buckets = held.buckets[number]
        yield owned, [buckets[i] for i in sorted(buckets)]


def _put_buckets(
    found: Found, rank: Rank, mine: Sequence[Parameter], buckets: Sequence[Mapping[str, Lazy]], dcp: Dcp
) -> None:
    """Every bucket is filled by the parameters in reverse, each at a multiple of 64."""
    sizes = []
    for bucket in buckets:
        shapes = {tensor.shape for tensor in bucket.values()}
        if bucket.keys() != BUFFERS.keys() or len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise LayoutError(f"has a bucket of {some(sorted(bucket))} in the shapes {some(sorted(shapes))}: flat "
                              f"{some(sorted(BUFFERS))} are read", file=dcp.path, hint=ALONE)  # fmt: skip
        sizes.append(next(iter(shapes))[0])
    places = fill([p.weight.shape for p in reversed(mine)], sizes, ALIGN)
    if places is None:
        raise LayoutError(f"has buckets of {some(sizes)} elements, which the {len(mine)} parameters of tensor rank "
                          f"{rank.tp}, stage {rank.pp}, do not fill", file=dcp.path, hint=_SIZES)  # fmt: skip
    for parameter, (number, start) in zip(reversed(mine), places, strict=True):
        for key, role in BUFFERS.items():
            found.put(role, rank, parameter, cut(buckets[number][key], start, parameter.weight.shape))
