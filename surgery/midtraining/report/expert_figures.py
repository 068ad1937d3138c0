"""Heat maps of experts: who is busy, since when, on what, and who is chosen together.

for figure in expert_figures(runs): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.midtraining.report.curves import listed, named, numbers, series
from surgery.midtraining.report.plots import Figure, curve_figure, escaped
from surgery.midtraining.run_folder import RunFolder

Grid = list[list[float]]
CELLS = 120_000  # of all the grids that one figure lets you choose from
GAPS = 24  # cells that still have gaps between them


def expert_figures(runs: Sequence[RunFolder]) -> Iterator[Figure]:
    """What the last reading says, and the busiest expert of each layer over time."""
    for run in runs:
        for kind, found in _by_kind(run).items():
            yield from _of_kind([r for r in found if _loads(r)], f"{kind}, {run.title}" if len(runs) > 1 else kind)
    drift = [series(_worst(run, "weight_drift"), "weight_drift") for run in runs]
    note = "How far the weights are from where they began, relative to them, in the layer that moved most."
    figure = curve_figure("Experts", "Drift of the routers", note, runs, drift, ".3f")
    if figure:
        yield figure


def _of_kind(readings: Sequence[Mapping[str, Any]], suffix: str) -> Iterator[Figure]:
    if readings:
        last = readings[-1]
        layers = _layers(last)
        note = f"Tokens of each expert at step {last['step']:,}, in multiples of an equal share."
        yield heat_map(f"Load of the experts{suffix}", note, _loads(last), layers, "layer", "expert", middle=1.0)
        yield from _over_time(readings, layers, suffix)
        yield from _together(last, layers, suffix)
        yield from _by_source(last, layers, suffix)


def _by_kind(run: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """The readings of experts in the mlp, and of those in the attention, by what their titles say of it."""
    heads = [{**named(r, "attention"), "step": r["step"]} for r in run.experts]
    return {"": list(run.experts), " of the attention": heads}


def _over_time(readings: Sequence[Mapping[str, Any]], layers: list[str], suffix: str) -> Iterator[Figure]:
    """The busiest expert's load, by layer and step."""
    readings = [r for r in readings if len(_loads(r)) == len(layers)]
    if len(readings) > 1:
        busiest = [[max(row) for row in _loads(r)] for r in readings]
        grid = [list(row) for row in zip(*busiest, strict=True)]
        note = "Its load in multiples of an equal share: 1 is balanced."
        figure = heat_map(f"The busiest expert{suffix}", note, grid, layers, "layer", "step", middle=1.0)
        figure.traces[0]["x"] = [str(r["step"]) for r in readings]
        yield figure


def _together(reading: Mapping[str, Any], layers: list[str], suffix: str) -> Iterator[Figure]:
    """Pairs of experts; the diagonal, which is all tokens, is left out."""
    grids = [_grid(grid) for grid in listed(reading, "together")]
    if len(grids) == len(layers) and all(len(grid) == len(grid[0]) for grid in grids if grid) and all(grids):
        grids = [[[0.0 if i == j else x for j, x in enumerate(row)] for i, row in enumerate(grid)] for grid in grids]
        note = "Share of the tokens of one (row) that also choose the other (column)."
        yield _choice(f"Chosen together{suffix}", note, grids, layers, None, "expert")


def _by_source(reading: Mapping[str, Any], layers: list[str], suffix: str) -> Iterator[Figure]:
    found = {str(name): _shares(grid) for name, grid in named(reading, "by_source").items()}
    if found and all(len(grid) == len(layers) for grid in found.values()):
        grids = [[grid[i] for grid in found.values()] for i in range(len(layers))]
        note = "Load of each expert by the source of the tokens, in multiples of an equal share."
        yield _choice(f"Experts and sources{suffix}", note, grids, layers, list(found), "source", middle=1.0)


def _choice(
    title: str,
    note: str,
    grids: list[Grid],
    layers: list[str],
    rows: list[str] | None,
    axis: str,
    middle: float | None = None,
) -> Figure:
    """A heat map of one layer at a time."""
    cells = sum(map(len, grids[0])) or 1
    stride = max(1, -(-len(grids) * cells // CELLS))
    kept = range(0, len(grids), stride)
    if stride > 1:
        note += f" Every {stride} layers."
    most = max(max(row) for i in kept for row in grids[i])
    figure = heat_map(title, note, grids[0], rows, axis, "expert", middle, most)
    figure.choices.update({f"layer {layers[i]}": {"z": [rounded(grids[i])]} for i in kept})
    return figure


def heat_map(
    title: str,
    note: str,
    grid: Grid,
    rows: list[str] | None,
    vertical: str,
    horizontal: str,
    middle: float | None = None,
    most: float | None = None,
) -> Figure:
    """From 0 to `most`; `middle`: the value that is neither much nor little."""
    most = max(map(max, grid)) if most is None else most
    scale: dict[str, Any] = {"colorscale": [[0.0, "$even"], [1.0, "$much"]], "zmin": 0.0, "zmax": most}
    if middle is not None:
        most = max(2 * middle, most)
        scale |= {"colorscale": [[0.0, "$cold"], [middle / most, "$even"], [1.0, "$hot"]], "zmax": most}
    names = [escaped(row) for row in rows] if rows else [str(i) for i in range(len(grid))]
    trace = {"type": "heatmap", "z": rounded(grid), "x": [str(i) for i in range(len(grid[0]))], "y": names, **scale,
             "xgap": 1 if len(grid[0]) <= GAPS else 0, "ygap": 1 if len(grid) <= GAPS else 0,
             "colorbar": {"thickness": 10, "outlinewidth": 0, "ticklen": 0},
             "hovertemplate": f"{vertical} %{{y}}, {horizontal} %{{x}}: %{{z:.3g}}<extra></extra>"}  # fmt: skip
    every = {"dtick": 1} if rows and len(rows) <= GAPS else {"nticks": 12}
    axes = {
        "xaxis": {"title": {"text": horizontal}, "showgrid": False, "type": "category", "nticks": 12},
        "yaxis": {"title": {"text": vertical}, "showgrid": False, "type": "category", "autorange": "reversed",
                  "automargin": True, **every},
        "hovermode": "closest",
    }  # fmt: skip
    return Figure("Experts", title, note, [trace], axes, height=min(460, max(220, 140 + 16 * len(grid))))


def rounded(grid: Grid) -> Grid:
    return [[float(f"{value:.4g}") for value in row] for row in grid]


def _grid(value: Any) -> Grid:
    """Rows of equally many numbers; [] for anything else."""
    rows = [numbers(row) for row in value] if isinstance(value, list) else []
    return rows if rows and rows[0] and all(len(row) == len(rows[0]) for row in rows) else []


def _shares(value: Any) -> Grid:
    """Shares of the choices as multiples of an equal share."""
    return [[share * len(row) for share in row] for row in _grid(value)]


def _loads(reading: Mapping[str, Any]) -> Grid:
    return _shares(reading.get("load"))


def _layers(reading: Mapping[str, Any]) -> list[str]:
    """The names of the layers with experts."""
    grid, named = _grid(reading.get("load")), reading.get("layers")
    return (
        [str(x) for x in named]
        if isinstance(named, list) and len(named) == len(grid)
        else [*map(str, range(len(grid)))]
    )


def _worst(run: RunFolder, key: str) -> list[dict[str, Any]]:
    kinds = [(r, [*numbers(r.get(key)), *numbers(named(r, "attention").get(key))]) for r in run.experts]
    return [{"step": r["step"], key: max(found)} for r, found in kinds if found]
