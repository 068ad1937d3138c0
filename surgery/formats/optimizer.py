"""Adam's state as canonical parts: fp32 masters and both moments beside each weight, gathered and spread by its table.

    states = States({"exp_avg": shards, "exp_avg_sq": shards}, 1000, {"blocks.0.attention.w_q.weight": Group()})
    found = gather_states(states, table, opened.shards, spec, topology)
    found.roles["exp_avg"]["layers.0.attn.q"], found.step, found.groups["layers.{l}.attn.q"].weight_decay

What a format stores is `States`: for each role the ranks' tensors under the names of their weights.  A master that does
not round to its stored weight, bit for bit, stops whoever reads it (`Rounded`): no wrong offset, order or group passes.
Moments follow their weight through every change of place.  Where ranks store shares of a sum (a bias), each share has
had the gradient of the sum: its moments are those of any share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import LayoutError, NoStateError, show, some
from surgery.formats.table import Row, Table
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import Parts, Shards, Stored, gather, spread
from surgery.model.spec import Spec, template_of
from surgery.tensors.lazy import Box, Lazy, cast, same_bits

if TYPE_CHECKING:
    import torch

MASTER, M, V = "master", "exp_avg", "exp_avg_sq"
MOMENTS = (M, V)
ROLES = (MASTER, *MOMENTS)
ALONE = "without --optimizer, or by `init: {optimizer: fresh}` in a run, the weights alone are taken"
LAST_EXACT = 1 << 24  # steps: fp32, in which most formats count them, holds every whole number up to here
UNTOLD = (
    "its files do not say the settings of its optimizer for {} (elastic checkpoints keep none): betas of 0.9 and "
    "0.999, eps 1e-8 and no weight decay are written in their place"
)
MIXED = "its optimizer treats some layers' {} otherwise than others': the settings of one of them are carried"
_DTYPES = {"float32", "bfloat16", "float16"}
_UNTRAINED = frozenset({"layers.{l}.router.bias"})  # parts that no optimizer moves, but the router itself


@dataclass(frozen=True)
class Group:
    """What an optimizer does with some parameters: its learning rate is the last one of the run, if that is known."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    lr: float | None = None


@dataclass(frozen=True)
class States:
    """An optimizer's state as a format stores it.

    `roles` holds the ranks' tensors by the names of their weights; without masters the weights themselves are those.
    `groups` are by name of a weight; `files` all that was opened besides the weights.  Where the state does not lie as
    the weights do, `table` and `topology` say how, and `weights` are the weights in that form.
    """

    roles: Mapping[str, Shards]
    step: int
    groups: Mapping[str, Group]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    table: Table | None = None
    weights: Shards | None = None
    topology: Topology | None = None


@dataclass(frozen=True)
class Optimizer:
    """Adam's state of a model: for every part, by role, a tensor of the part's shape; and the updates made so far.

    `groups` are by template of a part; `kept` says that the masters are not the weights themselves.
    """

    roles: Mapping[str, Parts]
    step: int
    groups: Mapping[str, Group]
    kept: bool = False
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(
            t.nbytes for role, parts in self.roles.items() if self.kept or role != MASTER for t in parts.values()
        )

    @property
    def lr(self) -> float | None:
        """The rate of the last update, if all groups agree."""
        rates = {group.lr for group in self.groups.values()}
        return rates.pop() if len(rates) == 1 else None

    def said(self) -> str:
        """What it is, in words."""
        held = ("fp32 masters, " if self.kept else "") + "both moments"
        rate = f", learning rate {self.lr:g}" if self.lr is not None else ""
        return f"{held} after {self.step:,} steps{rate}"

    def mapped(self, change: Callable[[str, Lazy], Lazy], names: Iterable[str]) -> Optimizer:
        """With every tensor of these parts changed."""
        wanted = list(names)
        roles = {role: {n: change(n, parts[n]) for n in wanted if n in parts} for role, parts in self.roles.items()}
        return replace(self, roles=roles)


def decay_changes(found: Optimizer, rows: Iterable[Row], spared: Callable[[str], bool]) -> list[tuple[str, str]]:
    """(row, part) of all that has another weight decay than where everything decays alike but rows that are spared."""
    decay = max((group.weight_decay for group in found.groups.values()), default=0.0)
    return [(row.name, part) for row in rows if not row.copy for part in row.parts if part in found.groups
            and found.groups[part].weight_decay != (0.0 if spared(row.name) else decay)]  # fmt: skip


class Rounded(Lazy):
    """A master.  Reading it proves that it rounds to the stored weight, bit for bit."""

    __slots__ = ("dtype", "name", "shape", "src", "weight")

    def __init__(self, src: Lazy, weight: Lazy, name: str) -> None:
        self.src, self.weight, self.name = src, weight, name
        self.shape, self.dtype = src.shape, src.dtype

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src, self.weight)

    def read(self, box: Box) -> torch.Tensor:
        master, weight = self.src.read(box), self.weight.read(box)
        if not _same_but_nan(master.to(weight.dtype), weight):
            raise LayoutError(
                f"the master of {self.name} does not round to its weight: they are not of the same tensor, or not of "
                "the same save",
                hint=ALONE,
            )
        return master


def _same_but_nan(rounded: torch.Tensor, weight: torch.Tensor) -> bool:
    """Equal bits, but of NaNs, which processors round to NaNs of other bits."""
    if same_bits(rounded, weight):
        return True
    nan = rounded.isnan() & weight.isnan()
    return same_bits(rounded.masked_fill(nan, 0), weight.masked_fill(nan, 0))


# ------------------------------------------------------------------------------------------------------- reading


def gather_states(states: States, table: Table, weights: Shards, spec: Spec, topology: Topology) -> Optimizer:
    """The canonical state behind what a format stores.  Raises LayoutError naming all that is missing or left over."""
    table, weights, topology = states.table or table, states.weights or weights, states.topology or topology
    _check(states, weights)
    if MASTER in states.roles and topology.tp > 1 and any(r.summed for r, _ in table.live(spec, topology)):
        raise NoStateError("stores biases as shares of a sum, and the masters of these are not read", hint=ALONE)
    roles: dict[str, Parts] = {}
    for role in MOMENTS:
        found = gather(_of_moments(table), states.roles[role], spec, topology, _UNTRAINED).parts
        roles[role] = {name: cast(tensor, "float32") for name, tensor in found.items()}
    if MASTER in states.roles:
        exact = {rank: {name: weights[rank][name] for name in shard if weights[rank][name].dtype == "float32"}
                 for rank, shard in states.roles[M].items()}  # fmt: skip
        proven = {rank: own | {name: Rounded(t, weights[rank][name], name)
                               for name, t in states.roles[MASTER].get(rank, {}).items()}
                  for rank, own in exact.items()}  # fmt: skip
        roles[MASTER] = gather(_of_states(table), proven, spec, topology, _UNTRAINED).parts
    else:
        roles[MASTER] = {}
    groups, mixed = _by_part(states.groups, table, spec, topology)
    untold = sorted({template_of(name) for name in roles[M]} - groups.keys())
    groups |= dict.fromkeys(untold, Group())
    notes = (*states.notes, *_widened(states), *([UNTOLD.format(some(untold))] if untold else []),
             *([MIXED.format(some(mixed))] if mixed else []))  # fmt: skip
    return Optimizer(roles, states.step, groups, MASTER in states.roles, notes, states.files)


def _widened(states: States) -> list[str]:
    """A note on moments of fewer bits."""
    kinds = {t.dtype for role in MOMENTS for shard in states.roles[role].values() for t in shard.values()}
    return [f"moments in {some(sorted(narrow))} are widened to fp32"] if (narrow := kinds - {"float32"}) else []


def with_masters(found: Optimizer, parts: Parts) -> Optimizer:
    """Where no masters are kept, the weights are the masters: exactly if they are fp32."""
    if found.kept:
        return found
    rounded = sorted({parts[name].dtype for name in found.roles[M] if parts[name].dtype != "float32"})
    notes = found.notes
    if rounded:
        notes = (*notes, f"the source keeps no fp32 masters: its weights in {some(rounded)} take their place")
    masters = {name: cast(parts[name], "float32") for name in found.roles[M]}
    return replace(found, roles={**found.roles, MASTER: masters}, notes=notes)


def one_step(steps: Iterable[float], file: object) -> int:
    """The updates that all parameters have had.  Raises LayoutError if they differ, or are no count."""
    found = set(steps)
    if len(found) != 1:
        what = (
            "says of no parameter how often it was updated"
            if not found
            else (f"holds parameters with different numbers of steps: {some(sorted(found))}")
        )
        raise LayoutError(what, file=str(file), hint=f"one number of steps can be carried; {ALONE}")
    step = found.pop()
    if not (0 <= step < 1 << 53 and step == int(step)):
        raise LayoutError(f"has taken {step} steps, which is no count", file=str(file))
    return int(step)


def group_of(fields: Mapping[object, object], file: object) -> Group:
    """A group's settings from the fields of a torch optimizer.  Raises LayoutError if one makes no sense."""
    betas, eps = fields.get("betas"), fields.get("eps")
    decay, lr = fields.get("weight_decay"), fields.get("lr")
    good = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(_real(b) and 0 <= b < 1 for b in betas)
    if not good or not _real(eps) or not _real(decay) or not (lr is None or _real(lr)):
        said = {name: fields.get(name) for name in ("betas", "eps", "weight_decay", "lr")}
        raise NoStateError(f"has a group of parameters that is none of Adam: {show(said)}", file=str(file),
                           hint="the state of Adam and AdamW is read; that of other optimizers is not")  # fmt: skip
    if fields.get("amsgrad") or (decay and fields.get("decoupled_weight_decay") is False):
        what = "keeps maxima (amsgrad)" if fields.get("amsgrad") else "adds weight decay to gradients (Adam, not AdamW)"
        raise NoStateError(f"is of an optimizer that {what}, which no other format can say", file=str(file), hint=ALONE)
    return Group((float(betas[0]), float(betas[1])), float(eps), float(decay), None if lr is None else float(lr))  # type: ignore[index,arg-type]


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6


def _check(states: States, weights: Shards) -> None:
    """Raise LayoutError for tensors that are no state of any weight, or not of its shape, NoStateError for dtypes that
    are not read."""
    odd, other = [], []
    for role, shards in states.roles.items():
        for rank, shard in shards.items():
            for name, tensor in shard.items():
                weight = weights.get(rank, {}).get(name)
                if weight is None:
                    odd.append(f"{role} of {show(name)}, which is no weight")
                elif tensor.shape != weight.shape:
                    odd.append(f"{role} of {show(name)} has the shape {list(tensor.shape)[:8]}, its weight "
                               f"{list(weight.shape)[:8]}")  # fmt: skip
                elif tensor.dtype not in _DTYPES or (role == MASTER and tensor.dtype != "float32"):
                    other.append(f"{role} of {show(name)} is {tensor.dtype}, which is not read")
    if odd:
        raise LayoutError(f"the optimizer's state does not fit the weights: {some(odd)}", hint=ALONE)
    if other:
        raise NoStateError(f"the {some(other)}", hint=ALONE)


def _of_states(table: Table) -> Table:
    """Second copies of a tied tensor may have no state of their own."""
    return replace(table, rows=tuple(replace(r, optional=r.copy or r.optional) for r in table.rows))


def _of_moments(table: Table) -> Table:
    """As the weights lie; but of a sum's shares each has the moments of the sum, and none is averaged."""
    return replace(_of_states(table), rows=tuple(replace(r, summed=False, averaged=False)
                                                 for r in _of_states(table).rows))  # fmt: skip


def _template(name: str) -> str:
    """A stored name, or that of a row, without the numbers of layers and experts."""
    return re.sub(r"\d+", "N", re.sub(r"\{\w+\}", "0", name))


def _by_part(
    groups: Mapping[str, Group], table: Table, spec: Spec, topology: Topology
) -> tuple[dict[str, Group], list[str]]:
    """The groups by template of a part, and the parts of which layers or experts differ: these are not told apart."""
    known: dict[str, list[Group]] = {}
    for name, group in groups.items():
        known.setdefault(_template(name), []).append(group)
    held = {template_of(name) for name in spec.part_names()}
    live = {r for r, _ in table.live(spec, topology) if not r.copy}  # a copy's name may be that of another weight
    found = {part: known[_template(r.name)] for r in table.rows if r in live and _template(r.name) in known
             for part in r.parts if part in held}  # fmt: skip
    mixed = sorted(part for part, each in found.items() if len(set(each)) > 1)
    return {part: each[-1] for part, each in found.items()}, mixed


# ------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Written:
    """The state of an optimizer as it is to be stored: `roles` by rank and name of the weight, masters among them."""

    roles: Mapping[str, Mapping[Rank, Mapping[str, Stored]]]
    step: int
    groups: Mapping[str, Group] = field(default_factory=dict)  # by template of a stored name

    def group(self, name: str) -> Group:
        """The settings of a weight."""
        return self.groups.get(_template(name)) or next(iter(self.groups.values()), Group())

    def shared(self, names: Iterable[str], who: str) -> Group:
        """The settings of all these weights, with the largest decay.  Raises LayoutError if they differ in more."""
        found = {self.group(name) for name in names} or {Group()}
        if len({(g.betas, g.eps, g.lr) for g in found}) > 1:
            raise LayoutError(f"{who} has one rate, betas and eps: the source's differ among its weights")
        return max(found, key=lambda group: group.weight_decay)


def spread_states(
    found: Optimizer, table: Table, spec: Spec, topology: Topology, weights: Mapping[Rank, Mapping[str, Stored]]
) -> Written:
    """What the ranks' files hold of an optimizer's state: masters of the weights that are no fp32 themselves.

    Raises LayoutError for parts that cannot be joined.
    """
    tables = {MASTER: table, M: _written(table), V: _written(table)}
    roles = {role: spread(tables[role], _filled(found.roles[role], spec), spec, topology) for role in ROLES}
    rounded = {rank: {n for n, s in shard.items() if s.tensor.dtype != "float32"} for rank, shard in weights.items()}
    roles[MASTER] = {rank: {n: s for n, s in shard.items() if n in rounded[rank]}
                     for rank, shard in roles[MASTER].items()}  # fmt: skip
    rows = sorted({r for r, _ in table.live(spec, topology)}, key=lambda r: not r.copy)  # what is no copy has the say
    groups = {_template(r.name): _joined(r, found.groups) for r in rows if not found.groups.keys().isdisjoint(r.parts)}
    return Written(roles, found.step, groups)


def _written(table: Table) -> Table:
    return replace(table, rows=tuple(replace(r, summed=False) for r in table.rows))


def _filled(parts: Parts, spec: Spec) -> Parts:
    """Raises LayoutError for parts without a state: a format has a place for each."""
    missing = [name for name in spec.part_names() if name not in parts]
    if missing:
        raise LayoutError(f"the optimizer's state has nothing for {some(missing)}, which no optimizer trains: models "
                          "with such parts are converted without it")  # fmt: skip
    return parts


def _joined(r: Row, groups: Mapping[str, Group]) -> Group:
    """The group of all parts of a tensor."""
    found = {groups[part] for part in r.parts if part in groups}
    if len(found) > 1:
        raise LayoutError(f"{r.name} joins {some(r.parts)}, which the optimizer treats differently")
    return found.pop()
