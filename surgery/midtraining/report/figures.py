"""The figures of a report: curves of training, of held-out loss and of tasks, speed, and the heat maps of experts.

for figure in figures(runs):
    figure.title, figure.note, figure.traces, figure.layout
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from surgery.midtraining.report.curves import mean, named, number, series, within
from surgery.midtraining.report.expert_figures import expert_figures
from surgery.midtraining.report.plots import Curve, Figure, curve_figure, escaped
from surgery.midtraining.run_folder import RunFolder


def figures(runs: Sequence[RunFolder]) -> list[Figure]:
    """Every figure that the runs have data for, in the order of the page."""
    return [*_training(runs), *_heldout(runs), *_tasks(runs), *_speed(runs), *expert_figures(runs)]


def _training(runs: Sequence[RunFolder]) -> Iterator[Figure]:
    wanted: tuple[tuple[str, str, tuple[str, ...], str, dict[str, Any]], ...] = (
        ("Training loss", "Nats per token", ("ce",), ".4f", {}),
        ("Learning rate", "What each step used", ("lr",), ".3e", {"rangemode": "tozero", "exponentformat": "power"}),
        ("Gradient norm", "Before clipping", ("grad_norm",), ".3f", {"rangemode": "tozero"}),
        (
            "Balance loss",
            "Mean over layers; 1 is balanced, 2 where attention has experts besides",
            ("balance",),
            ".4f",
            {},
        ),
        ("Router z-loss", "Mean over layers, without its coefficient", ("router_z",), ".3f", {}),
    )
    for title, note, path, form, axis in wanted:
        data = [series(run.metrics, *path) for run in runs]
        if path == ("ce",):
            data = [found if found[0] else series(run.metrics, "loss") for run, found in zip(runs, data, strict=True)]
        figure = curve_figure("Training", title, f"{note}.", runs, data, form, **axis)
        if figure:
            yield figure


def domains(runs: Sequence[RunFolder]) -> list[str]:
    """Every domain that some evaluation has, in their order."""
    seen: dict[str, None] = {}
    for run in runs:
        for record in run.evals:
            seen |= dict.fromkeys(named(record, "heldout"))
    return list(seen)


def _heldout(runs: Sequence[RunFolder]) -> Iterator[Figure]:
    names = domains(runs)
    every = [(name, [series(run.evals, "heldout", name, "loss") for run in runs]) for name in names]
    if len(names) > 1:
        every.insert(0, ("Mean of the domains", [_mean_series(run, names) for run in runs]))
    for name, data in every:
        figure = curve_figure("Held-out loss", name, _change(runs, data), runs, data, ".4f")
        if figure:
            yield figure


def _mean_series(run: RunFolder, names: Sequence[str]) -> Curve:
    found = [(r["step"], mean(number(within(r, ("heldout", name, "loss"))) for name in names)) for r in run.evals]
    held = [(step, value) for step, value in found if value is not None]
    return [s for s, _ in held], [v for _, v in held]


def _change(runs: Sequence[RunFolder], data: Sequence[Curve]) -> str:
    """ "4.398 to 3.517" for one run, else the least that a run came to."""
    ends = [
        (ys[0], ys[-1], run.title)
        for run, (_, ys) in zip(runs, data, strict=True)
        if ys and None not in (ys[0], ys[-1])
    ]
    if not ends:
        return ""
    if len(runs) == 1:
        return f"{ends[0][0]:.3f} to {ends[0][1]:.3f} nats per token."
    least = min(ends, key=lambda end: end[1] or 0.0)
    return f"Least at the end: {least[1]:.3f}, {least[2]}."


def _tasks(runs: Sequence[RunFolder]) -> Iterator[Figure]:
    names = dict.fromkeys(name for run in runs for r in run.evals for name in named(r, "tasks"))
    for name in names:
        for metric, what, form in (("acc_norm", "Accuracy, per character", ".1%"), ("acc", "Accuracy", ".1%"),
                                   ("bpb", "Bits per byte of the right answer", ".3f")):  # fmt: skip
            data = [series(run.evals, "tasks", name, metric) for run in runs]
            if max(len(xs) for xs, _ in data) > 1:
                more = {"tickformat": ".0%"} if metric != "bpb" else {}
                figure = curve_figure("Tasks", name, f"{what}.", runs, data, form, **more)
                if figure:
                    yield figure
                break


def _speed(runs: Sequence[RunFolder]) -> Iterator[Figure]:
    data = [series(run.times, "tokens_per_second") for run in runs]
    figure = curve_figure("Speed", "Throughput", "Tokens per second.", runs, data, ",.0f", rangemode="tozero")
    if figure:
        yield figure
    shares = [(run.title, _parts(run)) for run in runs]
    names = list(dict.fromkeys(part for _, parts in shares for part, share in parts.items() if share))
    if not names:
        return
    traces = [
        {"type": "bar", "orientation": "h", "name": name, "y": [escaped(title) for title, _ in shares],
         "x": [parts.get(name, 0.0) for _, parts in shares], "marker": {"color": f"$part{i % 6}"},
         "hovertemplate": f"%{{x:.1%}} {name}<extra></extra>"}
        for i, name in enumerate(names)
    ]  # fmt: skip
    layout = {
        "barmode": "stack",
        "showlegend": True,
        "hovermode": "closest",
        "xaxis": {"tickformat": ".0%", "range": [0, 1]},
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
    }
    height = max(180, 120 + 34 * len(shares))
    yield Figure("Speed", "Where the time went", "Shares of all steps.", traces, layout, height=height)


def _parts(run: RunFolder) -> dict[str, float]:
    """The share of each part of a step in the time of all steps."""
    sums: dict[str, float] = {}
    for record in run.times:
        for name, seconds in named(record, "parts").items():
            sums[str(name)] = sums.get(str(name), 0.0) + (number(seconds) or 0.0)
    whole = sum(sums.values())
    return {name: seconds / whole for name, seconds in sums.items()} if whole else {}
