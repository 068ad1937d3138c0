"""A figure of a report: plotly's traces and layout as plain data, with colours by name.

    line(0, "anneal", steps, losses, ".4f")                                 # a curve of the first run
    curve_figure("Training", "Learning rate", "", runs, data, ".3e")        # one for each run

Colours are names such as "$run0" or "$line": the page puts in what they are in light and in dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.midtraining.report.curves import CALM, Values, frame, smoothed, thinned
from surgery.midtraining.run_folder import RunFolder

Curve = tuple[list[int], Values]
COLOURS = 8  # that tell runs apart; more runs begin again, dashed
DASHES = ("solid", "dash", "dot", "dashdot")
Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """`section`: under which heading it stands.  `choices`: changes of the first trace to pick from, by label.

    `height` in pixels.
    """

    section: str
    title: str
    note: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    height: int = 260


def escaped(text: object) -> str:
    """A name as plotly is to show it: without the tags that it knows."""
    return html.escape(str(text), quote=False)


def style(index: int) -> dict[str, Any]:
    """The line of a run."""
    return {"color": f"$run{index % COLOURS}", "dash": DASHES[index // COLOURS % len(DASHES)], "width": 2}


def line(index: int, name: str, xs: Sequence[int], ys: Sequence[float | None], form: str, **more: Any) -> Trace:
    """A curve of run `index`; `form`: how a value is written, as d3 does."""
    hover = f"%{{y:{form}}}<extra>{escaped(name)}</extra>"
    return {"type": "scatter", "mode": "lines", "name": escaped(name), "meta": index, "x": list(xs), "y": list(ys),
            "line": style(index), "hovertemplate": hover, **more}  # fmt: skip


def curve_figure(
    section: str,
    title: str,
    note: str,
    runs: Sequence[RunFolder],
    data: Sequence[Curve],
    form: str,
    **axis: Any,
) -> Figure | None:
    """A curve for each run; long ones are smoothed, with the values themselves faint behind them."""
    faint, bold, shown = [], [], []
    for i, (run, (xs, ys)) in enumerate(zip(runs, data, strict=True)):
        if not xs:
            continue
        calm = ys
        if len(xs) >= CALM:
            calm = smoothed(ys, max(1, len(xs) // 100))
            raw = line(i, run.title, *thinned(xs, ys), form, hoverinfo="skip", opacity=0.25)
            faint.append({**raw, "hovertemplate": None, "line": {**style(i), "width": 1}})
        bold.append(line(i, run.title, *thinned(xs, calm), form))
        shown.append(calm)
    if not bold:
        return None
    framed = frame(shown)
    if framed:
        axis["range"] = list(framed)
        note += " What lies outside the frame: double-click."
    mode = {"mode": "lines+markers"} if max(len(c) for c in shown) < CALM else {}
    return Figure(section, title, note, faint + [{**t, **mode} for t in bold], {"yaxis": axis, "xaxis": STEP})


STEP = {"title": {"text": "step"}, "rangemode": "tozero", "unifiedhovertitle": {"text": "step %{x}"}}
