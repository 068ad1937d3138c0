"""What a Megatron rank trains, by which optimizer and in which group, and what was found of its state.

    mine = trained_by(None, [Parameter(0, "embedding.word_embeddings.weight", weight)])
    found.put("exp_avg", Rank(), mine[0], tensor)           # Found(), which collects them over all ranks

Which parameters decay is told by `wd_mult` and their dimensions.  Experts of expert parallelism have an optimizer of
their own, the second of two.
Source: megatron/core `optimizer/__init__.py` (get_megatron_optimizer, _get_param_groups).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from surgery.errors import NoStateError
from surgery.formats.megatron.order import place
from surgery.formats.optimizer import ROLES, Group, Written, group_of
from surgery.formats.topology import Rank
from surgery.formats.torch_states import STEP, Fields, step_of
from surgery.formats.weave import Stored
from surgery.tensors.lazy import Lazy, Shape

Chunks = Mapping[Rank, Mapping[str, Stored]]
_NO_PARAMETER = re.compile(r"\.expert_bias$|inv_freq$|tokens_per_expert$")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a rank: in which chunk, its name there, and the weight."""

    chunk: int
    name: str
    weight: Lazy

    @property
    def decays(self) -> bool:
        return decays(self.name, self.weight.shape)

    @property
    def trained(self) -> bool:
        """Whether it is a parameter at all, and no buffer."""
        return not _NO_PARAMETER.search(self.name)


def decays(name: str, shape: Shape) -> bool:
    """Whether Megatron lets a parameter decay: matrices that are no bias."""
    return len(shape) > 1 and not name.endswith(".bias")


@dataclass
class Found:
    """What was found so far, over all ranks."""

    roles: dict[str, dict[Rank, dict[str, Lazy]]] = field(default_factory=lambda: {role: {} for role in ROLES})
    steps: list[float] = field(default_factory=list)
    groups: dict[str, Group] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def put(self, role: str, rank: Rank, parameter: Parameter, tensor: Lazy) -> None:
        self.roles[role].setdefault(rank._replace(chunk=parameter.chunk), {})[parameter.name] = tensor


def in_order(chunk: int, weights: Mapping[str, Lazy]) -> list[Parameter]:
    """The parameters of a chunk as Megatron's modules register them."""
    return [Parameter(chunk, name, weights[name]) for name in sorted(weights, key=place)]


def parameters_of(chunks: Chunks) -> list[Parameter]:
    """What a rank is to store."""
    return [Parameter(rank.chunk, name, s.tensor) for rank, chunk in chunks.items() for name, s in chunk.items()]


def state_of(written: Written, chunks: Chunks, p: Parameter) -> dict[str, Stored]:
    """What a rank is to store of a parameter's state, by role: no masters of what is fp32 itself."""
    rank = next(rank for rank in chunks if rank.chunk == p.chunk)
    return {role: shards[rank][p.name] for role, shards in written.roles.items() if p.name in shards[rank]}


def trained_by(which: int | None, parameters: Iterable[Parameter]) -> list[Parameter]:
    """Those that an optimizer trains: all (None), or of two the dense ones (0) and the experts (1)."""
    return [p for p in parameters if p.trained and (which is None or (".experts." in p.name) == bool(which))]


def groups_of(inner: object, path: Path) -> list[Fields]:
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise NoStateError("holds an optimizer without groups of parameters", file=path)
    return groups


def put_settings(found: Found, mine: Sequence[Parameter], groups: Sequence[Fields], path: Path) -> None:
    """What the groups of a distributed optimizer say of a rank's parameters: they list none, and count the steps.

    FusedAdam counts none in a group of which the rank that saved it had no share (core up to 0.13 at least).
    """
    found.steps += [step_of({}, group, path) for group in groups if STEP in group] or [step_of({}, {}, path)]
    for group in groups:
        settings = group_of(group, path)
        found.groups |= dict.fromkeys((p.name for p in mine if belongs(p, group, groups, False)), settings)


def belongs(p: Parameter, group: Fields, groups: Sequence[Fields], spared: bool) -> bool:
    """Whether a parameter is of a group, by weight decay, experts, and a rate of the embeddings' own."""
    decays = p.decays or (spared and re.search(r"\.[qk]_layernorm\.weight$", p.name) is not None)
    told = len({bool(g.get("wd_mult", 1.0)) for g in groups}) > 1  # else all of them do alike
    if told and bool(group.get("wd_mult", 1.0)) != decays:
        return False
    apart = len({bool(g.get("is_expert_parallel")) for g in groups}) > 1
    if apart and bool(group.get("is_expert_parallel")) != (".experts." in p.name):
        return False
    if any(g.get("is_decoupled_lr") for g in groups):
        return bool(group.get("is_decoupled_lr")) == (re.match(r"embedding\.|output_layer\.", p.name) is not None)
    return True
