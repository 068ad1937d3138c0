"""How many instances each source gives: fixed amounts first, the rest by weight, poured over where a cap binds.

    wants = [Want("web", weight=5), Want("math", weight=3, cap=100), Want("code", weight=2)]
    apportion(1000, wants)              # web 643, math 100, code 257: what math cannot give goes to the others

The numbers add up to the budget exactly, unless all are at their caps.  Arithmetic is in fractions; rows are made
whole by the method of the largest remainder (Hamilton's), ties going to the source named first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from surgery.errors import ConfigError

Number = int | float | Fraction


@dataclass(frozen=True)
class Want:
    """What a source asks for: a `weight` in what is left of the budget, or a `fixed` number; at most `cap`."""

    name: str
    weight: Number | None = None
    fixed: Number | None = None
    cap: int | None = None


@dataclass(frozen=True)
class Share:
    """What it gets: `rows`; `asked` is what it would have got without caps."""

    name: str
    rows: int
    asked: Fraction


def apportion(total: int | None, wants: Sequence[Want]) -> list[Share]:
    """The rows of each source, in the order of `wants`.  `total`: the budget; None: the sum of the fixed amounts.

    Raises ConfigError if the fixed amounts exceed the budget, or fall short of it with no weight to fill the rest.
    """
    fixed = {w.name: exact(w.fixed) for w in wants if w.fixed is not None}
    weights = {w.name: exact(w.weight) for w in wants if w.weight is not None}
    assert len(fixed) + len(weights) == len(wants) == len({w.name for w in wants}), wants
    caps = {w.name: w.cap for w in wants if w.cap is not None}
    budget = _budget(total, sum(fixed.values(), Fraction()), bool(weights))
    asked = fixed | _pour(budget - sum(fixed.values()), weights, {})
    given = {name: min(amount, Fraction(caps.get(name, amount))) for name, amount in fixed.items()}
    given |= _pour(budget - sum(given.values()), weights, caps)
    rows = _whole({w.name: given[w.name] for w in wants})
    return [Share(w.name, rows[w.name], asked[w.name]) for w in wants]


def exact(number: Number) -> Fraction:
    """0.3 is three tenths, as it was written."""
    return Fraction(str(number)) if isinstance(number, float) else Fraction(number)


def _budget(total: int | None, fixed: Fraction, weighted: bool) -> Fraction:
    if total is None:
        if weighted:
            raise ConfigError("weights need a budget to be shares of", hint="add budget: {tokens: ...}")
        return fixed
    if fixed >= total + 1:
        what = f"the sources ask for {float(fixed):,.0f} instances, but the budget has {total:,}"
        raise ConfigError(what, hint="raise the budget or leave it out, or give weights")
    if not weighted and fixed <= total - 1:
        what = (
            f"the sources ask for {float(fixed):,.0f} instances, and none has a weight to fill the budget of {total:,}"
        )
        raise ConfigError(what, hint="leave the budget out, or give a source a weight")
    return Fraction(total) if weighted else fixed


def _pour(rest: Fraction, weights: dict[str, Fraction], caps: dict[str, int]) -> dict[str, Fraction]:
    """Share `rest` by weight; what is over a cap is shared among the others, until all fit or all are full."""
    full: dict[str, Fraction] = {}
    rest = max(rest, Fraction())
    while True:
        open_ = {name: w for name, w in weights.items() if name not in full}
        left, sum_ = rest - sum(full.values()), sum(open_.values())
        level = {name: left * w / sum_ for name, w in open_.items()} if sum_ else dict.fromkeys(open_, Fraction())
        over = {name: Fraction(caps[name]) for name, amount in level.items() if name in caps and amount > caps[name]}
        if not over:
            return {name: full[name] if name in full else level[name] for name in weights}
        full |= over


def _whole(amounts: dict[str, Fraction]) -> dict[str, int]:
    """Whole numbers of the same sum, rounded down; no amount that is whole already is changed."""
    rows = {name: floor(amount) for name, amount in amounts.items()}
    missing = floor(sum(amounts.values(), Fraction())) - sum(rows.values())
    by_remainder = sorted(amounts, key=lambda name: rows[name] - amounts[name])  # stable: the first named wins a tie
    return rows | {name: rows[name] + 1 for name in by_remainder[:missing]}
