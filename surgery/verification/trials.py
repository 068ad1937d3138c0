"""What could be wrong with B: changes that might mend it, as a list of trials, the simplest and likeliest first.

    for trial in config_trials(spec_a, spec_b):
        trial.cause, trial.kind           # "rope base: 10000 and 500000", "config"

Nothing is tried here; `causes.Search` does that.  Which modules are at fault (`score.alone`) decides what is offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from surgery.formats.base import Checkpoint
from surgery.model.spec import PARTS, Spec, template_of
from surgery.running import whole as running
from surgery.running.loading import check_memory
from surgery.tensors.lazy import Lazy
from surgery.verification.configs import ALL, one_from_other, spec_fields
from surgery.verification.weights import ATTENTION, MLP, NORMS, Hypothesis, Weights, head_order, moved_padding

if TYPE_CHECKING:
    import torch

CAP = 10.0  # one module's error counts at most this much


@dataclass(frozen=True)
class Trial:
    """A change of B to be tried: another spec, or other tensors for some parts."""

    cause: str
    kind: str
    spec: Spec | None = None
    parts: Callable[[], Mapping[str, torch.Tensor]] | None = None
    head: bool = False  # give B, which is tied, A's head
    last: bool = False  # several things at once: tried only if nothing before it helps


@dataclass(frozen=True)
class Score:
    """What a state of B is worth: the logits' largest difference, and the modules that differ by themselves."""

    max_diff: float
    relative: float
    alone: Mapping[str, float]

    @property
    def total(self) -> float:
        return min(self.relative, CAP) + sum(min(gap, CAP) for gap in self.alone.values())


def config_trials(a: Spec, b: Spec) -> Iterator[Trial]:
    """One field of the config from A at a time, then all of them."""
    for name, changed in one_from_other(a, b):
        yield Trial(_said(a, changed, b), "config", changed, last=name == ALL)


def weight_trials(a: Checkpoint, spec: Spec, weights: Weights | None, score: Score) -> Iterator[Trial]:
    """Every change of the weights of B (now of `spec`) that could bring it nearer to `a`."""
    if "lm_head" in score.alone and spec.tied and "lm_head" in a.parts:
        yield Trial("tied head: B's head is its embedding, A has one of its own", "values", head=True)
    if weights is not None:
        yield from _layouts(weights, _layers(score, "attention"), ATTENTION)
        yield from _orders(a, weights, _layers(score, "attention"))
        yield from _layouts(weights, _layers(score, "mlp"), MLP)
        yield from _layouts(weights, _layers(score, "norm"), NORMS)
        yield from _vocabulary(a, weights, score)
        yield from _values(a, weights, score)


def _layouts(weights: Weights, layers: list[int], hypotheses: Sequence[Hypothesis]) -> Iterator[Trial]:
    def undone(hypothesis: Hypothesis) -> dict[str, torch.Tensor]:
        return {n: t for layer in layers for n, t in hypothesis.change(weights, layer).items()}

    for hypothesis in hypotheses if layers else ():
        yield Trial(f"{hypothesis.cause} ({running.numbers(layers)})", "layout", None, partial(undone, hypothesis))


def _orders(a: Checkpoint, weights: Weights, layers: list[int]) -> Iterator[Trial]:
    found = {i: order for i in layers if (order := head_order(weights, i, a.parts))}
    if found:
        parts = {name: t for _, changed in found.values() for name, t in changed.items()}
        example = next(iter(found.values()))[0]
        yield Trial(f"GQA order: {example} ({running.numbers(list(found))})", "layout", None, lambda: parts)


def _vocabulary(a: Checkpoint, weights: Weights, score: Score) -> Iterator[Trial]:
    for name in ("embed", "lm_head"):
        if name in score.alone and name in weights.parts:
            cause = f"padding: rows of zeros lie inside {name}, not behind it"
            yield Trial(cause, "layout", None, partial(moved_padding, weights, name))
    if "lm_head" in score.alone and a.spec.tied and "lm_head" in weights.parts:
        embed = weights.parts["embed"].full()
        cause = "tied head: A's head is its embedding, B has one of its own"
        yield Trial(cause, "values", None, lambda: {"lm_head": embed})


def _values(a: Checkpoint, weights: Weights, score: Score) -> Iterator[Trial]:
    """B with A's own weights: for each kind of part by itself, then for all of them."""
    layers = {int(n.split(".")[1]) for n in score.alone if n.startswith("layers.")}
    groups: dict[str, list[str]] = {}
    for name, held in weights.parts.items():
        at = name.split(".")
        suspect = int(at[1]) in layers if at[0] == "layers" else at[0] in score.alone
        part = a.parts.get(name)
        if suspect and part is not None and part.shape == held.shape and _differ(part, held):
            groups.setdefault(template_of(name), []).append(name)
    kinds = {template: _called(template, groups[template]) for template in PARTS if template in groups}
    for template, called in kinds.items():
        yield Trial(f"values of {called}", "values", None, partial(_from_a, a, groups[template]))
    if len(kinds) > 1:
        names = [n for group in groups.values() for n in group]
        yield Trial(f"values of {', '.join(kinds.values())}", "values", None, partial(_from_a, a, names), last=True)


def _from_a(a: Checkpoint, names: Sequence[str]) -> dict[str, torch.Tensor]:
    check_memory(2 * sum(math.prod(a.parts[n].shape) for n in names), a.path)
    return {name: a.parts[name].full().float() for name in names}


def _layers(score: Score, kind: str) -> list[int]:
    """The layers with a module at fault whose name has `kind` in it."""
    found = [n.split(".") for n in score.alone if n.startswith("layers.")]
    return sorted({int(n[1]) for n in found if kind in n[2]})


def _called(template: str, names: list[str]) -> str:
    if "{l}" not in template:
        return template
    layers = sorted({int(n.split(".")[1]) for n in names})
    short = template.removeprefix("layers.{l}.").replace(".{e}.", ".*.")
    return f"{short} in {running.numbers(layers)}" if len(names) > 1 else names[0]


def _differ(a: Lazy, b: Lazy) -> bool:
    import torch

    return not torch.equal(a.full().float(), b.full().float())


def _said(a: Spec, mended: Spec, b: Spec) -> str:
    """The values behind a config trial."""
    changed = {f.name for f in spec_fields(mended, b)}
    return "; ".join(f.text for f in spec_fields(a, b) if f.name in changed)
