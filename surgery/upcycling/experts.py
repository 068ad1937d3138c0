"""Change the experts of a mixture: prune, keep, duplicate, merge, permute, another top-k; parts -> parts, lazily.

    changed = changed_experts(checkpoint, groups=[(0,), (2, 3)], top_k=1)      # expert 0, and the mean of 2 and 3

Everything is one idea: a new expert is the mean of some old ones, and so is its row of the router.  Permuting keeps the
function; so does duplicating all experts m times where m times as many are chosen: the copies' weights add up to the
old ones, for softmax spreads over them and a sum divides by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.errors import ConfigError, UsageError
from surgery.formats import Checkpoint
from surgery.lazy import Concat, Lazy, Map, Slice
from surgery.upcycling.claim import Claim
from surgery.upcycling.nodes import Gather

Groups = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Changed:
    """A checkpoint made of another's, for `run.carry_out`."""

    checkpoint: Checkpoint
    models: Sequence[Checkpoint]
    name: str
    losses: tuple[str, ...]
    details: dict[str, Any]

    def claim(self) -> Claim:
        return Claim(self.name, self.checkpoint.spec, not self.losses)

    def to_json(self) -> dict[str, Any]:
        spec = self.checkpoint.spec
        return {"operation": self.name, "experts": spec.e, "top_k": spec.top_k, "exact": not self.losses,
                "losses": list(self.losses), **self.details,
                "parameters": {"total": spec.parameters(), "active": spec.parameters(active=True)}}  # fmt: skip


def parse_groups(text: str, what: str) -> list[tuple[int, ...]]:
    """ "0,2-4" -> [(0,), (2,), (3,), (4,)]; "0+1,2+3" -> [(0, 1), (2, 3)].  Raises UsageError."""
    out: list[tuple[int, ...]] = []
    try:
        for word in text.split(","):
            first, dash, last = word.partition("-")
            if dash:
                out += [(i,) for i in range(int(first), int(last) + 1)]
            else:
                out.append(tuple(int(i) for i in word.split("+")))
    except ValueError:
        out = []
    if not out or len(out) > 1 << 16:
        raise UsageError(f"{what} {text!r}: write numbers of experts, as 0,2-5 (merged ones as 0+1,2+3)")
    return out


def groups_of(
    e: int,
    *,
    keep: str | None = None,
    prune: str | None = None,
    duplicate: int | None = None,
    merge: str | None = None,
    permute: str | None = None,
) -> tuple[list[tuple[int, ...]], int]:
    """The new experts as groups of old ones, and how many copies of each there are.  Raises UsageError."""
    asked = {"--keep": keep, "--prune": prune, "--duplicate": duplicate, "--merge": merge, "--permute": permute}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} in one go", hint="do one after the other")
    everyone: list[tuple[int, ...]] = [(i,) for i in range(e)]
    if prune is not None:
        gone = {i for group in parse_groups(prune, "--prune") for i in group}
        _check(e, gone, "--prune")
        return [group for group in everyone if group[0] not in gone], 1
    if duplicate is not None:
        return [group for group in everyone for _ in range(duplicate)], duplicate
    for name, text in (("--keep", keep), ("--merge", merge), ("--permute", permute)):
        if text is not None:
            found = parse_groups(text, name)
            _check(e, [i for group in found for i in group], name)
            if name == "--permute" and sorted(found) != everyone:
                raise UsageError(f"--permute has to name each of the {e} experts once")
            return found, 1
    return everyone, 1


def _check(e: int, numbers: Any, name: str) -> None:
    if odd := [i for i in numbers if not 0 <= i < e]:
        raise UsageError(f"{name}: there is no expert {odd[0]}, the model has 0 to {e - 1}")


def changed_experts(
    source: Checkpoint, groups: Groups, top_k: int | None = None, copies: int = 1, force_lossy: bool = False
) -> Changed:
    """`copies`: how often every expert stands in `groups`.  Raises UsageError, ConfigError."""
    spec = source.spec
    if not spec.e:
        raise ConfigError("the model has no experts", hint="surgery upcycle makes some")
    if not groups:
        raise UsageError("no expert would be left")
    k = top_k or min(spec.top_k * copies, len(groups))
    if k > len(groups):
        raise UsageError(f"--top-k {k}: only {len(groups)} experts are left")
    losses = tuple(_losses(source, groups, k, copies))
    if losses and not force_lossy:
        raise UsageError(f"the result would compute another function: {'; '.join(losses)}",
                         hint="--force-lossy allows it; the proof then says how far apart they are")  # fmt: skip
    scale = spec.router_scale
    if copies > 1 and spec.router_score == "sigmoid" and not spec.top_k_renormalised:
        scale = (scale or 1.0) / copies  # the copies' scores are not divided by anything
    result = spec.replace(e=len(groups), top_k=k, router_scale=scale)
    parts = {name: _part(source, name, groups) for name in result.part_names()}
    made = replace(source, spec=result, parts=parts)
    listed = ["+".join(map(str, group)) for group in groups]
    return Changed(made, (source,), "experts", losses, {"from": listed})


def _losses(source: Checkpoint, groups: Groups, k: int, copies: int) -> list[str]:
    e, out = source.spec.e, []
    flat = [i for group in groups for i in group]
    if any(len(group) > 1 for group in groups):
        out.append("experts are merged")
    if missing := sorted(set(range(e)) - set(flat)):
        out.append(f"{len(missing)} of {e} experts are gone")
    if k != source.spec.top_k * copies:
        out.append(f"{k} experts are chosen, and {source.spec.top_k * copies} would preserve the function")
    if copies == 1 and len(set(flat)) != len(flat):
        out.append("some experts stand there twice")
    return out


def _part(source: Checkpoint, name: str, groups: Groups) -> Lazy:
    if ".experts." in name:
        layer, _, rest = name.partition(".experts.")
        number, _, which = rest.partition(".")
        olds = [source.parts[f"{layer}.experts.{i}.{which}"] for i in groups[int(number)]]
        return olds[0] if len(olds) == 1 else Map(mean, olds)
    old = source.parts[name]
    if not name.endswith((".router", ".router.bias")):
        return old
    if all(len(group) == 1 for group in groups):
        return Gather(old, 0, [group[0] for group in groups])
    rows = [[Slice(old, 0, i, i + 1) for i in group] for group in groups]
    return Concat([row[0] if len(row) == 1 else Map(mean, row) for row in rows], 0)


def mean(*tensors: Any) -> Any:
    """In fp32, in the given order, rounded once."""
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return (total / len(tensors)).to(tensors[0].dtype)
