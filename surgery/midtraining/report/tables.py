"""The tables of a report: a heading, columns, rows of cells, and what is best among them.

for table in tables(runs, soup): table.title, table.columns, table.rows
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.midtraining.report.curves import listed, mean, named, number, within
from surgery.midtraining.run_folder import RunFolder
from surgery.units import count, human

BASE, MERGED = "before the run", "soup"
NONE = "-"
EVENTS = 200  # that are shown
SMALL = 100e6  # parameters, below which a comparison of runs says what it is worth


@dataclass(frozen=True)
class Cell:
    """A text; `kind` is "number", "best", "good", "bad" or "" for plain text."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """`section`: under which heading it stands.  `columns` are (title, whether they hold numbers)."""

    section: str
    title: str
    note: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]


Losses = dict[str, float | None]


def tables(runs: Sequence[RunFolder], soup: Mapping[str, Any]) -> list[Table]:
    """All that there is something to say in."""
    found = [
        _heldout(runs, soup, "loss", "Nats per token at the end"),
        _heldout(runs, soup, "bpb", "Bits per byte at the end"),
        _tasks(runs),
        *_sweeps(runs),
        *_data(runs),
        _self_tests(runs),
        _events(runs),
        _provenance(runs),
    ]
    return [table for table in found if table and table.rows]


def final_losses(runs: Sequence[RunFolder], soup: Mapping[str, Any], metric: str = "loss") -> list[tuple[str, Losses]]:
    """What the model before the runs, each run with its running means, and the soup came to, by domain."""
    out: list[tuple[str, Losses]] = []
    start = next((r.evals[0] for r in runs if r.evals and r.evals[0]["step"] == 0), None)
    if start:
        out.append((BASE, _by_domain(start, metric)))
    for run in runs:
        if run.evals and (last := run.evals[-1])["step"] > 0:
            out.append((run.title, _by_domain(last, metric)))
            out += [(f"{run.title}, {n}", _by_domain(each, metric)) for n, each in named(last, "averages").items()]
    seen = {name for name, _ in out}
    for name, entry in zip(ingredients_of(soup), listed(soup, "ingredients"), strict=True):
        if name not in seen:
            out.append((name, _by_domain(entry, metric)))
    out.append((MERGED, _by_domain(named(soup, "soup"), metric)))
    return [(name, losses) for name, losses in out if any(value is not None for value in losses.values())]


def _sweeps(runs: Sequence[RunFolder]) -> Iterator[Table]:
    """What --sweep found, the fastest marked."""
    for run in runs:
        trials = [trial for trial in listed(run.sweep, "trials") if isinstance(trial, Mapping)]
        keys = list(dict.fromkeys(key for trial in trials for key in named(trial, "values")))
        rates = [number(trial.get("tokens_per_second")) for trial in trials]
        best = max((rate for rate in rates if rate is not None), default=None)
        rows = tuple(_trial(trial, keys, rate, best) for trial, rate in zip(trials, rates, strict=True))
        columns = (*((key, False) for key in keys), ("tokens/s", True), ("memory", True), ("loss", True), ("", False))
        note = f"each after {number(run.sweep.get('steps')) or 0:g} steps, in a process of its own"
        yield Table("Speed", f"{run.title}: values that were tried", note, columns, rows)


def _trial(trial: Mapping[str, Any], keys: Sequence[str], rate: float | None, best: float | None) -> tuple[Cell, ...]:
    values = [Cell(str(named(trial, "values").get(key, NONE))) for key in keys]
    memory, loss = number(trial.get("memory")), number(trial.get("loss"))
    said = (
        Cell(NONE if rate is None else f"{rate:,.0f}", "best" if rate is not None and rate == best else "number"),
        Cell(NONE if memory is None else human(int(memory)), "number"),
        Cell(NONE if loss is None else f"{loss:.4f}", "number"),
    )
    return (*values, *said, Cell(str(trial.get("failed") or ""), "bad" if trial.get("failed") else ""))


def ingredients_of(soup: Mapping[str, Any]) -> list[str]:
    """The names of the runs in a soup."""
    return [str(within(entry, ("name",))) for entry in listed(soup, "ingredients")]


def _by_domain(record: Mapping[str, Any], metric: str) -> Losses:
    return {name: number(within(value, (metric,))) for name, value in named(record, "heldout").items()}


def mean_loss(losses: Losses, names: Sequence[str]) -> float | None:
    """Over these domains, None where one is missing."""
    return mean(losses.get(name) for name in names)


def _heldout(runs: Sequence[RunFolder], soup: Mapping[str, Any], metric: str, title: str) -> Table | None:
    found = final_losses(runs, soup, metric)
    names = list(dict.fromkeys(name for _, losses in found for name in losses))
    if not names:
        return None
    columns = [*names, "mean"] if len(names) > 1 else names
    grid = {name: [*map(losses.get, names), mean_loss(losses, names)][: len(columns)] for name, losses in found}
    best = [min((v for row in grid.values() if (v := row[i]) is not None), default=None) for i in range(len(columns))]
    rows = [
        (Cell(name), *(_figure(v, "{:.4f}", v == b and len(grid) > 1) for v, b in zip(row, best, strict=True)))
        for name, row in grid.items()
    ]
    ingredients = [row for name, row in grid.items() if name in ingredients_of(soup)]
    if MERGED in grid and ingredients:
        against = [_less(grid[MERGED][i], [row[i] for row in ingredients]) for i in range(len(columns))]
        rows.append((Cell("soup against the best ingredient"), *(_figure(v, "{:+.4f}") for v in against)))
    notes = ["The least of each column is marked."] if len(grid) > 1 else []
    sizes = [size for run in runs if (size := number(named(run.run, "model").get("active_parameters")))]
    if len(runs) > 1 and sizes:
        notes += worth(max(sizes))
    head = (("model", False), *((name, True) for name in columns))
    return Table("Held-out loss", title, " ".join(notes), head, tuple(rows))


def worth(parameters: float) -> list[str]:
    """What a comparison of models with so many active parameters can and cannot show; [] if they are not few."""
    if parameters >= SMALL:
        return []
    text = "can be trained, and what it loses at equal tokens here; which is better at full size they cannot show."
    return [f"Models of {count(parameters)} parameters show that each of these {text}"]


def _less(value: float | None, others: Sequence[float | None]) -> float | None:
    held = [v for v in others if v is not None]
    return None if value is None or not held else value - min(held)


def _figure(value: float | None, form: str, best: bool = False) -> Cell:
    return Cell(NONE if value is None else form.format(value), "best" if best else "number")


def _tasks(runs: Sequence[RunFolder]) -> Table | None:
    """The last scores of every task, of every run."""
    last = {run.title: named(run.evals[-1], "tasks") for run in runs if run.evals}
    names = list(dict.fromkeys(name for found in last.values() for name in found))
    rows = []
    for name in names:
        for metric, form in (("acc", "{:.1%}"), ("acc_norm", "{:.1%}"), ("exact", "{:.1%}"), ("bpb", "{:.3f}")):
            values = [number(within(found, (name, metric))) for found in last.values()]
            if any(v is not None for v in values):
                count = next((n for found in last.values() if (n := within(found, (name, "documents")))), NONE)
                held = [v for v in values if v is not None]
                best = (min if metric == "bpb" else max)(held) if len(held) > 1 else None
                scores = (_figure(v, form, v is not None and v == best) for v in values)
                rows.append((Cell(name), Cell(metric), Cell(str(count), "number"), *scores))
    head = (("task", False), ("metric", False), ("documents", True), *((title, True) for title in last))
    return Table("Tasks", "Scores at the end", "", head, tuple(rows))


def _data(runs: Sequence[RunFolder]) -> Iterator[Table]:
    """A plan's sources; runs with the same plan share a table."""
    seen: dict[str, list[str]] = {}
    plans = {}
    for run in runs:
        sources = [s for s in listed(run.plan, "sources") if isinstance(s, Mapping)]
        if sources:
            key = repr([(s.get("name"), s.get("take"), s.get("have")) for s in sources])
            seen.setdefault(key, []).append(run.title)
            plans[key] = sources
    for key, titles in seen.items():
        total = sum(number(s.get("take")) or 0 for s in plans[key]) or 1
        rows = tuple(_source(s, total) for s in plans[key])
        head = (("source", False), ("share", True), ("instances", True), ("of", True), ("epochs", True),
                ("held out", True), ("tokens it has", True))  # fmt: skip
        title = "Plan" if len(seen) == 1 else f"Plan of {', '.join(titles)}"
        yield Table("Data", title, " ".join(_notes(runs, titles)), head, rows)


def _source(source: Mapping[str, Any], total: float) -> tuple[Cell, ...]:
    take, have = number(source.get("take")), number(source.get("have"))
    epochs = take / have if take is not None and have else None
    counted = [number(source.get(key)) for key in ("heldout", "tokens")]
    return (Cell(str(source.get("name"))), _figure(None if take is None else take / total, "{:.1%}"),
            _figure(take, "{:,.0f}"), _figure(have, "{:,.0f}"), _figure(epochs, "{:.2f}"),
            *(_figure(value, "{:,.0f}") for value in counted))  # fmt: skip


def _notes(runs: Sequence[RunFolder], titles: Sequence[str]) -> list[str]:
    found = next(run.plan for run in runs if run.title in titles and run.plan)
    return [f"{str(note).rstrip('.')}." for note in listed(found, "notes")]


def _self_tests(runs: Sequence[RunFolder]) -> Table:
    """A row for each test, and a column for each run that has done them."""
    tested = [run for run in runs if run.selftests]
    names = list(dict.fromkeys(str(t.get("name")) for run in tested for t in run.selftests))
    rows = []
    for name in names:
        found = [next((t for t in run.selftests if str(t.get("name")) == name), {}) for run in tested]
        detail = next((str(t["detail"]) for t in found if t.get("detail")), "")
        rows.append((Cell(name), *(_passed(t.get("passed")) for t in found), Cell(detail)))
    head = (("test", False), *((run.title, False) for run in tested), ("what was found", False))
    return Table("Self-tests", "Before the first step", "", head, tuple(rows))


def _passed(value: object) -> Cell:
    if not isinstance(value, bool):
        return Cell(NONE)
    return Cell("passed", "good") if value else Cell("failed", "bad")


def _events(runs: Sequence[RunFolder]) -> Table:
    rows = tuple(_event(run.title, event) for run in runs for event in run.events)
    note = f"The first {EVENTS:,} of {len(rows):,}; events.jsonl has all." if len(rows) > EVENTS else ""
    head = (("run", False), ("step", True), ("kind", False), ("what happened", False))
    return Table("Events", "Alarms and notes", note, head, rows[:EVENTS])


def _event(title: str, event: Mapping[str, Any]) -> tuple[Cell, ...]:
    level, text = str(event.get("level")), str(event.get("text"))
    return Cell(title), Cell(f"{event['step']:,}", "number"), Cell(level, "bad" if level == "alarm" else ""), Cell(text)


def _provenance(runs: Sequence[RunFolder]) -> Table:
    """What run.json says, a column for each run."""
    told = [dict(_facts(run.run)) for run in runs]
    keys = list(dict.fromkeys(key for facts in told for key in facts))
    rows = []
    for key in keys:
        values = [facts.get(key, NONE) for facts in told]
        rows.append((Cell(key), *(Cell(value, "differs" if len(set(values)) > 1 else "") for value in values)))
    head = (("", False), *((run.title, False) for run in runs))
    note = "What differs is marked." if len(runs) > 1 else ""
    return Table("Provenance", "What it began from, and with what", note, head, tuple(rows))


def _facts(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """("model.path", "./base") and so on."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _facts(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        yield prefix, shlex.join(map(str, value)) if prefix == "command" else "; ".join(map(str, value))
    else:
        yield prefix, "" if value is None else f"{value:,}" if type(value) is int and value >= 10_000 else str(value)
