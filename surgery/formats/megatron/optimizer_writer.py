"""Adam's state as Megatron's legacy files hold it: numbered, or in the flat buffers of the distributed optimizer.

    found = entry(written, {Rank(): {"embedding.word_embeddings.weight": stored}}, Topology(), args, Wanted())
    found.tree, found.beside          # for model_optim_rng.pt, for distrib_optim.pt

Numbered, the masters of bf16 and fp16 weights stand beside the state; an fp32 model has torch's bare state dict.
FusedAdam of Transformer Engine and of Apex counts updates by group, and Transformer Engine's knows no state but the
moments; torch's AdamW counts them for every parameter.  The distributed optimizer counts by group for both.
Source: TransformerEngine `pytorch/optimizers/fused_adam.py` (load_state_dict, step), apex `optimizers/fused_adam.py`,
megatron/core `optimizer/distrib_optimizer.py` (state_dict, save_parameter_state).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.formats.megatron.buffers import borders_of, coalesced, holder
from surgery.formats.megatron.dist_optimizer import Rates, megatron_groups
from surgery.formats.megatron.optimizer import MASTERS
from surgery.formats.megatron.parameters import Chunks, parameters_of, state_of, trained_by
from surgery.formats.optimizer import MASTER, MOMENTS, Written
from surgery.formats.topology import Topology
from surgery.formats.torch_states import STEP
from surgery.tensors.lazy import Fill


@dataclass(frozen=True)
class Wanted:
    """Who loads the state: the plain or the distributed optimizer, with FusedAdam or torch's AdamW, and the rates by
    which core 0.19 tells its groups."""

    fused: bool = True
    rates: Rates = field(default_factory=dict)
    distributed: bool = False


@dataclass(frozen=True)
class Entry:
    """A rank's state: the entry `optimizer` of its file, the paths in that of replicas, and what stands in
    distrib_optim.pt beside it, if anything does."""

    tree: Any
    replicas: frozenset[str] = frozenset()
    beside: Any = None


def entry(written: Written, chunks: Chunks, topology: Topology, args: Mapping[str, Any], wanted: Wanted) -> Entry:
    """The state of a rank, in one optimizer or, where ranks divide the experts, in two: on stages without any, too."""
    both = topology.ep > 1 and bool(args.get("num_experts"))
    each: tuple[int | None, ...] = (0, 1) if both else (None,)
    if wanted.distributed:
        return _flat(written, chunks, topology, args, wanted, each)
    found = [_numbered(written, chunks, which, wanted) for which in each]
    starts = [f"optimizer.{i}." if both else "optimizer." for i in range(len(each))]
    replicas = {start + path for start, (_, paths) in zip(starts, found, strict=True) for path in paths}
    return Entry(_one_or_both([tree for tree, _ in found]), frozenset(replicas))


def _groups(written: Written, chunks: Chunks, which: int | None, wanted: Wanted) -> list[dict[str, Any]]:
    """What decays and what does not, of one optimizer; where it has no parameters, with the settings of the others.

    Experts have nothing that does not, and releases up to 0.13 at least stop at a group more than theirs.
    """
    every = parameters_of(chunks)
    names = [p.name for p in trained_by(which, every) or every]
    groups = [{**group, "is_expert_parallel": bool(which)} for group in megatron_groups(written, names, wanted.rates)]
    return groups[:1] if which else groups


def _one_or_both(found: Sequence[Any]) -> Any:
    return found[0] if len(found) == 1 else list(found)


def _flat(
    written: Written, chunks: Chunks, topology: Topology, args: Mapping[str, Any], wanted: Wanted,
    each: Sequence[int | None],
) -> Entry:  # fmt: skip
    """Of several ranks that have the same parameters, the first stores their buffers."""
    rank = next(iter(chunks))._replace(chunk=0)
    trees, held = [], []
    for which in each:
        trees.append({"optimizer": {"param_groups": _groups(written, chunks, which, wanted)}})
        first = holder(rank, topology, experts=bool(which)) == rank
        held.append(coalesced(written, chunks, which, borders_of(args, rank)) if first else None)
    return Entry(_one_or_both(trees), beside=_one_or_both(held) if any(held) else None)


def _numbered(written: Written, chunks: Chunks, which: int | None, wanted: Wanted) -> tuple[dict[str, Any], set[str]]:
    """States by number, masters by group."""
    mine, groups = trained_by(which, parameters_of(chunks)), _groups(written, chunks, which, wanted)
    held = [[state_of(written, chunks, p) for p in mine if p.decays == bool(group["wd_mult"])] for group in groups]
    numbers = iter(range(len(mine)))
    groups = [{**group, "params": list(itertools.islice(numbers, len(own)))}
              for group, own in zip(groups, held, strict=True)]  # fmt: skip
    each = [one for own in held for one in own]
    state = {
        i: {
            # its own: torch adds to a shared one once for every parameter
            **({} if wanted.fused else {STEP: Fill((), "float32", written.step)}),
            **{role: one[role].tensor for role in MOMENTS},
        }
        for i, one in enumerate(each)
    }
    inner = {"state": state, "param_groups": groups}
    masters = [[one[MASTER] for one in own if MASTER in one] for own in held]
    nested = any(written.roles[MASTER][rank] for rank in chunks)
    start = "optimizer." if nested else ""
    replicas = {f"{start}state.{i}.{role}" for i, one in enumerate(each) for role in MOMENTS if one[role].copy}
    if not nested:
        return inner, replicas
    replicas |= {f"{MASTERS[0]}.{g}.{i}" for g, own in enumerate(masters) for i, s in enumerate(own) if s.copy}
    return {"optimizer": inner, MASTERS[0]: [[s.tensor for s in own] for own in masters]}, replicas
