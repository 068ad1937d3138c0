"""From a mixture and what its sources have to what each gives, in instances; with a line for every wish not granted.

given, notes = amounts(mixture, {"web": 12_000, "math": 500})        # instances that each source has in all
given[1]                            # Amount(name="math", heldout=1, have=499, take=499, asked=1500.0)
notes                               # ["math gives 499 instances of the 1,500 asked for: max_epochs 1"]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from surgery.data.plans.apportion import Want, apportion, exact
from surgery.data.plans.mixture import Mixture, Source
from surgery.errors import ConfigError

MANY = 4  # passes; more are worth ever less (arXiv 2305.16264)


@dataclass(frozen=True)
class Amount:
    """Of one source: instances held out, instances to train on, and how many are taken (with repetition)."""

    name: str
    heldout: int
    have: int
    take: int
    asked: float


def amounts(mixture: Mixture, instances: Mapping[str, int]) -> tuple[list[Amount], list[str]]:
    """In the order of the mixture.  Raises ConfigError if it cannot be, or if a cap binds and the mixture is strict."""
    heldout = {s.name: _heldout(s, mixture, instances[s.name]) for s in mixture.sources}
    have = {name: n - heldout[name] for name, n in instances.items()}
    total, fixed = _demand(mixture, have)
    size = total if total is not None else floor(sum(fixed.values(), Fraction()))
    wants = [_want(s, fixed, have[s.name], size) for s in mixture.sources]
    shares = apportion(total, wants)
    taken = sum(share.rows for share in shares)
    if not taken:
        what = f"no instance of {mixture.sequence_length} tokens is left by the budget, the sources and their caps"
        raise ConfigError(what, hint="raise the budget or the caps, or lower sequence_length")
    bound = [
        f"{s.name} gives {share.rows:,} instances of {float(share.asked):,.0f} asked for: {_cap(s, have[s.name], size)}"
        for s, want, share in zip(mixture.sources, wants, shares, strict=True)
        if want.cap is not None and share.asked > want.cap
    ]
    if total is not None and taken < floor(total):
        bound.append(f"all sources together give {taken:,} instances of the {floor(total):,} in the budget")
    if bound and mixture.strict:
        raise ConfigError("\n  ".join(bound), hint="raise the caps, lower the budget, or leave out strict")
    found = [Amount(x.name, heldout[x.name], have[x.name], x.rows, float(x.asked)) for x in shares]
    often = [
        f"{a.name} is passed {a.take / a.have:.1f} times; beyond about {MANY} passes repetition is worth ever less"
        for a in found
        if a.take > MANY * a.have
    ]
    return found, bound + often


def _heldout(source: Source, mixture: Mixture, n: int) -> int:
    wish = mixture.holdout if source.holdout is None else source.holdout
    count = max(round(wish * n), 1) if 0 < wish < 1 else int(wish)
    if count >= n and count:
        what = f"{source.name} has {n} instances of {mixture.sequence_length} tokens, and {count} are to be held out"
        raise ConfigError(what, hint="hold out less (holdout: 0), or lower sequence_length")
    return count


def _demand(mixture: Mixture, have: Mapping[str, int]) -> tuple[int | None, dict[str, Fraction]]:
    """The budget in instances, if there is one, and what sources with fixed amounts ask for."""
    length, budget = mixture.sequence_length, mixture.budget
    fixed = {s.name: exact(s.multiplier) * have[s.name] for s in mixture.sources if s.multiplier is not None}
    if budget is not None and budget.epochs is not None:
        if len(fixed) == len(mixture.sources):
            return None, {name: exact(budget.epochs) * amount for name, amount in fixed.items()}
        if any(s.weight is None for s in mixture.sources):
            what = "a budget in epochs goes with weights alone, or with multipliers alone"
            raise ConfigError(what, hint="give the budget in tokens")
        return floor(exact(budget.epochs) * sum(have.values())), {}
    fixed |= {s.name: Fraction(s.tokens, length) for s in mixture.sources if s.tokens is not None}
    return None if budget is None or budget.tokens is None else budget.tokens // length, fixed


def _want(source: Source, fixed: Mapping[str, Fraction], have: int, size: int) -> Want:
    caps = [have * 0] if not have else []
    caps += [] if source.max_epochs is None else [floor(exact(source.max_epochs) * have)]
    caps += [] if source.max_share is None else [floor(exact(source.max_share) * size)]
    return Want(source.name, source.weight, fixed.get(source.name), min(caps, default=None))


def _cap(source: Source, have: int, size: int) -> str:
    """The name of the cap that binds."""
    if not have:
        return "it has none"
    if source.max_epochs is not None and (
        source.max_share is None or exact(source.max_epochs) * have <= exact(source.max_share) * size
    ):
        return f"max_epochs {source.max_epochs:g}"
    return f"max_share {source.max_share:g}"
