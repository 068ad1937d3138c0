"""The numbers behind a curve: taken from records, smoothed, thinned, and framed.

steps, losses = series(run.metrics, "loss")          # None where a record has no number
thinned(steps, losses, 2000)                         # never more points; the peaks stay
smoothed(losses, width=16)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Values = list[float | None]
POINTS = 1500  # of a curve
CALM = 60  # points from which on a curve is smoothed
LARGEST = 1e300


def series(records: Iterable[Mapping[str, Any]], *path: str) -> tuple[list[int], Values]:
    """The steps and values of the records that have this key."""
    found = [(record["step"], within(record, path)) for record in records]
    held = [(step, value) for step, value in found if value is not None]
    return [step for step, _ in held], [number(value) for _, value in held]


def within(record: Any, path: Sequence[str]) -> Any:
    """record[a][b][c]; None where something is missing."""
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def named(record: Any, key: str) -> Mapping[str, Any]:
    """record[key] if it is a mapping, else an empty one."""
    value = within(record, (key,))
    return value if isinstance(value, Mapping) else {}


def listed(record: Any, key: str) -> list[Any]:
    """record[key] if it is a list, else an empty one."""
    value = within(record, (key,))
    return value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """A number that can be drawn, or None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST
    return value if good else None


def numbers(values: Any) -> list[float]:
    """The finite numbers of a list."""
    return [x for x in map(number, values if isinstance(values, list) else []) if x is not None]


def smoothed(values: Sequence[float | None], width: int) -> Values:
    """Means over `width` values before and after each; None stays None."""
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    out: Values = []
    for i, value in enumerate(values):
        low, high = max(0, i - width), min(len(values), i + width + 1)
        out.append(None if value is None else (sums[high] - sums[low]) / (counts[high] - counts[low]))
    return out


def thinned(xs: Sequence[int], ys: Sequence[float | None], most: int = POINTS) -> tuple[list[int], Values]:
    """The least and the largest value of each of most / 2 pieces."""
    if len(xs) <= most:
        return list(xs), list(ys)
    pieces, kept = most // 2, []
    for i in range(pieces):
        part = range(i * len(xs) // pieces, (i + 1) * len(xs) // pieces)
        held = [k for k in part if ys[k] is not None] or [part[0]]
        kept += sorted({min(held, key=lambda k: ys[k] or 0.0), max(held, key=lambda k: ys[k] or 0.0)})
    return [xs[k] for k in kept], [ys[k] for k in kept]


def frame(curves: Iterable[Sequence[float | None]]) -> tuple[float, float] | None:
    """The range of an axis without the spikes and the first fall; None if all of the curves can be shown as well."""
    held = [[y for y in curve if y is not None] for curve in curves]
    early = [y for curve in held for y in curve]
    late = sorted(y for curve in held for y in curve[len(curve) // 50 :])
    if len(late) < CALM:
        return None
    low, high = late[0], late[len(late) * 99 // 100]
    if max(early) - low <= 2 * (high - low):
        return None
    return low - 0.05 * (high - low), high + 0.15 * (high - low)


def mean(values: Iterable[float | None]) -> float | None:
    """None if there is nothing, or if something is missing."""
    held = list(values)
    good = [v for v in held if v is not None]
    return sum(good) / len(good) if good and len(good) == len(held) else None
