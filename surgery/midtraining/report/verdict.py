"""What a report says first: how it ended, in a sentence or two, and a few figures.

verdict(runs, soup)             # Verdict("The soup beats its best ingredient: 3.442 against 3.477 ...", "good")
tiles(runs, soup)               # [Tile("held-out loss", "3.442", "3.938 before"), ...]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import some
from surgery.midtraining.panel import clock, flops
from surgery.midtraining.report.curves import named, number, series
from surgery.midtraining.report.figures import domains
from surgery.midtraining.report.tables import BASE, MERGED, final_losses, ingredients_of, mean_loss
from surgery.midtraining.run_folder import RunFolder
from surgery.units import count


@dataclass(frozen=True)
class Verdict:
    """Sentences; `kind` is "good", "bad" or "" (going on)."""

    sentences: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Tile:
    """A figure with its name, and what to compare it with."""

    name: str
    value: str
    more: str = ""


def verdict(runs: Sequence[RunFolder], soup: Mapping[str, Any]) -> Verdict:
    """How it ended, what it brought, and what went wrong."""
    failed = [run for run in runs if run.status == "failed" or any(t.get("passed") is False for t in run.selftests)]
    going = [run for run in runs if run.status == "running"]
    kind = "bad" if failed else "" if going else "good"
    return Verdict((*_wrong(runs), *_brought(runs, soup), *_ended(runs), *_noted(runs)), kind)


def _ended(runs: Sequence[RunFolder]) -> Iterator[str]:
    for status, verb in (("finished", "finished"), ("stopped", "stopped early"), ("failed", "failed")):
        found = [run for run in runs if run.status == status]
        if len(found) == len(runs) > 1:
            yield f"All {len(runs)} runs {verb}."
        elif found:
            yield f"{some(_at(run, runs) for run in found)} {verb}{_reason(found)}."
    going = [run for run in runs if run.status == "running"]
    if going:
        yield f"{some(_at(run, runs) for run in going)}: going on, or killed, for no end is written."


def _at(run: RunFolder, runs: Sequence[RunFolder]) -> str:
    """ "seed-42 (step 90 of 100)", or "The run ..." where there is only one."""
    of = f" of {run.steps:,}" if run.steps and run.steps != run.step else ""
    return f"{run.title if len(runs) > 1 else 'The run'} (step {run.step:,}{of})"


def _reason(runs: Sequence[RunFolder]) -> str:
    reasons = [str(run.end["reason"]) for run in runs if run.end.get("reason")]
    return f": {reasons[0].rstrip('.')}" if len(reasons) == 1 else ""


def _brought(runs: Sequence[RunFolder], soup: Mapping[str, Any]) -> Iterator[str]:
    names = domains(runs)
    means = {name: mean_loss(losses, names) for name, losses in final_losses(runs, soup)}
    held = {name: value for name, value in means.items() if value is not None}
    before, merged = held.pop(BASE, None), held.pop(MERGED, None)
    over = f", the mean of {len(names)} domains" if len(names) > 1 else ""
    mixed = {name: held[name] for name in ingredients_of(soup) if name in held}
    if merged is not None and mixed:
        best = min(mixed, key=lambda name: mixed[name])
        verb = "beats" if merged < mixed[best] else "does not beat"
        against = f"held-out loss {merged:.3f} against {mixed[best]:.3f}{over}"
        yield f"The soup {verb} its best ingredient, {best}: {against}."
        over = ""
    ends = held if merged is None else held | {MERGED: merged}
    if not ends:
        return
    best = min(ends, key=lambda name: ends[name])
    of = f" ({best})" if len(ends) > 1 else ""
    if before is None:
        yield f"The least held-out loss is {ends[best]:.3f}{of}{over}."
    else:
        verb = "fell" if ends[best] < before else "rose"
        yield f"Held-out loss {verb} from {before:.3f} to {ends[best]:.3f}{of}{over}."


def _wrong(runs: Sequence[RunFolder]) -> Iterator[str]:
    failed = [(str(t.get("name")), run.title) for run in runs for t in run.selftests if t.get("passed") is False]
    broken = [f"{name} ({title})" if len(runs) > 1 else name for name, title in failed]
    if broken:
        yield f"Self-tests that failed: {some(broken)}."


def _noted(runs: Sequence[RunFolder]) -> Iterator[str]:
    alarms = sum(e.get("level") == "alarm" for run in runs for e in run.events)
    if alarms:
        yield f"{alarms} alarm{'s' if alarms > 1 else ''}: see Events."
    named = [(run.title, what) for run in runs for what in run.lacking]
    if lacking := [f"{title}: {what}" if len(runs) > 1 else what for title, what in named]:
        yield f"Not readable: {some(lacking, 3)}."


def tiles(runs: Sequence[RunFolder], soup: Mapping[str, Any]) -> list[Tile]:
    """The figures at the top of the page."""
    return [
        tile
        for tile in (
            _loss(runs, soup),
            _training(runs),
            _seen(runs),
            _fast(runs),
            _size(runs),
            _tested(runs),
            _took(runs),
        )
        if tile
    ]


def _loss(runs: Sequence[RunFolder], soup: Mapping[str, Any]) -> Tile | None:
    names = domains(runs)
    found = [
        (name, value) for name, losses in final_losses(runs, soup) if (value := mean_loss(losses, names)) is not None
    ]
    ends = [pair for pair in found if pair[0] != BASE]
    if not ends:
        return None
    name, least = min(ends, key=lambda pair: pair[1])
    before = dict(found).get(BASE)
    more = f"{before:.3f} before" if before is not None else ""
    return Tile("held-out loss", f"{least:.3f}", f"{name}; {more}".strip("; ") if len(ends) > 1 else more)


def _training(runs: Sequence[RunFolder]) -> Tile | None:
    ends = [ys[-1] for run in runs if (ys := [y for y in series(run.metrics, "loss")[1] if y is not None])]
    return Tile("training loss", f"{min(ends):.3f}", "of the last step") if ends else None


def _seen(runs: Sequence[RunFolder]) -> Tile | None:
    tokens = [n for run in runs if run.metrics and (n := number(run.metrics[-1].get("tokens")))]
    if not tokens:
        return None
    steps = sorted({run.step for run in runs if run.step})
    each = f"{steps[0]:,} steps" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} steps"
    return Tile("tokens", count(sum(tokens)), each if len(runs) == 1 else f"{len(runs)} runs of {each}")


def _fast(runs: Sequence[RunFolder]) -> Tile | None:
    last = [run.times[-1] for run in runs if run.times]
    rates = [r for t in last if (r := number(t.get("tokens_per_second_mean", t.get("tokens_per_second"))))]
    if not rates:
        return None
    mfu = [m for t in last if (m := number(t.get("mfu")))]
    work = f"{max(mfu):.0%} MFU" if mfu else flops(number(last[0].get("tflops"))) or ""
    return Tile("tokens per second", f"{max(rates):,.0f}", work)


def _size(runs: Sequence[RunFolder]) -> Tile | None:
    models = [named(run.run, "model") for run in runs]
    sizes = [(n, number(m.get("active_parameters"))) for m in models if (n := number(m.get("parameters")))]
    if not sizes:
        return None
    whole, active = max(sizes)
    return Tile("parameters", count(whole), f"{count(active)} active" if active and active != whole else "")


def _tested(runs: Sequence[RunFolder]) -> Tile | None:
    tests = [bool(t.get("passed")) for run in runs for t in run.selftests]
    return Tile("self-tests passed", f"{sum(tests)} of {len(tests)}") if tests else None


def _took(runs: Sequence[RunFolder]) -> Tile | None:
    seconds = [sum(number(t.get("seconds")) or 0.0 for t in run.times) for run in runs if run.times]
    return Tile("time", clock(sum(seconds)), "of all steps") if seconds else None
