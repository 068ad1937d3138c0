"""Adam's state as Megatron's legacy files number it, without a distributed optimizer.

    state, replicas = tree(written, {Rank(): {"embedding.word_embeddings.weight": stored, ...}}, False, Wanted())

Of bf16 and fp16 weights the masters stand beside the state; an fp32 model has torch's bare state dict.  FusedAdam of
Transformer Engine and of Apex counts updates by group, and Transformer Engine's knows no state but the moments; torch's
AdamW counts them for every parameter.
Source: TransformerEngine `pytorch/optimizers/fused_adam.py` (load_state_dict, step), apex `optimizers/fused_adam.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.formats.megatron.dist_optimizer import Rates, megatron_groups
from surgery.formats.megatron.optimizer import MASTERS, decays
from surgery.formats.optimizer import MASTER, MOMENTS, Written
from surgery.formats.topology import Rank
from surgery.formats.torch_states import STEP
from surgery.formats.weave import Stored
from surgery.tensors.lazy import Fill

Chunks = Mapping[Rank, Mapping[str, Stored]]
Owned = tuple[Rank, str]


@dataclass(frozen=True)
class Wanted:
    """Who loads the state: FusedAdam or torch's AdamW, and the rates by which core 0.19 tells its groups."""

    fused: bool = True
    rates: Rates = field(default_factory=dict)


def tree(written: Written, chunks: Chunks, apart: bool, wanted: Wanted) -> tuple[Any, set[str]]:
    """The entry `optimizer` of a rank's file, and the paths in the file of replicas.

    `apart`: the experts have an optimizer of their own.
    """
    owned = [(rank, name) for rank, chunk in chunks.items() for name in chunk]
    if not apart or not any(".experts." in name for _, name in owned):
        state, replicas = _one(written, owned, False, wanted)
        return state, {f"optimizer.{path}" for path in replicas}
    both = [
        _one(written, [o for o in owned if (".experts." in o[1]) == experts], experts, wanted)
        for experts in (False, True)
    ]
    return [state for state, _ in both], {
        f"optimizer.{i}.{path}" for i, (_, paths) in enumerate(both) for path in paths
    }


def _one(written: Written, owned: Sequence[Owned], experts: bool, wanted: Wanted) -> tuple[dict[str, Any], set[str]]:
    names = {name: written.roles[MOMENTS[0]][rank][name] for rank, name in owned}
    kinds = [[o for o in owned if _decays(written, o) == kind] for kind in (True, False)]
    groups, numbers, replicas = (
        megatron_groups(written, names, wanted.rates),
        [o for kind in kinds for o in kind],
        set[str](),
    )
    at = 0
    for group, kind in zip(groups, kinds, strict=True):
        group |= {"params": list(range(at, at + len(kind))), "is_expert_parallel": experts}
        at += len(kind)
    state = {
        i: {
            # its own: torch adds to a shared one once for every parameter
            **({} if wanted.fused else {STEP: Fill((), "float32", written.step)}),
            **{role: written.roles[role][rank][name].tensor for role in MOMENTS},
        }
        for i, (rank, name) in enumerate(numbers)
    }
    inner = {"state": state, "param_groups": [g for g in groups if g["params"]]}
    masters = [[written.roles[MASTER][rank][name] for rank, name in kind if name in written.roles[MASTER][rank]]
               for kind in kinds if kind]  # fmt: skip
    nested = any(masters)
    start = "optimizer." if nested else ""
    for i, (rank, name) in enumerate(numbers):
        replicas |= {f"{start}state.{i}.{role}" for role in MOMENTS if written.roles[role][rank][name].copy}
    if not nested:
        return inner, replicas
    replicas |= {f"{MASTERS[0]}.{g}.{i}" for g, own in enumerate(masters) for i, s in enumerate(own) if s.copy}
    return {"optimizer": inner, MASTERS[0]: [[s.tensor for s in own] for own in masters]}, replicas


def _decays(written: Written, owned: Owned) -> bool:
    rank, name = owned
    return decays(name, written.roles[MOMENTS[0]][rank][name].tensor.shape)
