"""One HTML file of one or several runs: readable without a network, in light and dark, on any width.

    write_report(["runs/anneal"], "report.html")                # or several runs, or a folder of runs with a soup.json

plotly draws the figures; its script is part of the file.  What the runs' files say is shown as text, never as HTML.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.midtraining.report.figures import figures
from surgery.midtraining.report.plots import COLOURS, DASHES, Figure
from surgery.midtraining.report.tables import Table, tables
from surgery.midtraining.report.verdict import tiles, verdict
from surgery.midtraining.run_folder import RunFolder, find_runs, read_folder, read_soup
from surgery.writing.atomic import atomic_file

SECTIONS = ("Held-out loss", "Tasks", "Training", "Speed", "Experts", "Data", "Self-tests", "Events", "Provenance")


def write_report(paths: Sequence[str], output: str | os.PathLike[str], force: bool = True) -> list[str]:
    """Write the page and return the titles of the runs in it.

    Raises FileError or UsageError if a path holds no run, OutputError if the page cannot be written, SurgeryError if
    plotly is not installed.
    """
    runs = named_apart([read_folder(path) for path in find_runs(paths)])
    soup = next((found for path in paths if (found := read_soup(Path(path)))), {})
    page = render(runs, soup).encode()
    with atomic_file(output, force) as file:
        file.write(page)
    return [run.title for run in runs]


def named_apart(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Runs of the same title get their folder's path as one."""
    from dataclasses import replace

    titles = [run.title for run in runs]
    return [
        replace(run, run={**run.run, "name": str(run.path)}) if titles.count(run.title) > 1 else run for run in runs
    ]


def render(runs: Sequence[RunFolder], soup: Mapping[str, Any]) -> str:
    """The page's HTML."""
    try:
        from jinja2 import Environment, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        hint = "pip install 'checkpoint-surgery[report]'"
        raise SurgeryError(f"a report needs {error.name}, which is not installed", hint=hint) from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn, tabled = figures(runs), tables(runs, soup)
    return environment.from_string(_file("page.html")).render(
        title=_title(runs),
        runs=[_head(i, run) for i, run in enumerate(runs)],
        verdict=verdict(runs, soup),
        tiles=tiles(runs, soup),
        sections=[section for name in SECTIONS if (section := _section(name, drawn, tabled))],
        configs=[(run.title, run.config) for run in runs if run.config],
        figures=script_json([asdict(figure) for figure in drawn]),
        css=_file("page.css"),
        script=_file("page.js"),
        plotly=get_plotlyjs(),
    )


def _section(name: str, drawn: Sequence[Figure], tabled: Sequence[Table]) -> dict[str, Any] | None:
    inside = [(i, figure) for i, figure in enumerate(drawn) if figure.section == name]
    held = [table for table in tabled if table.section == name]
    maps = any(trace["type"] == "heatmap" for _, figure in inside for trace in figure.traces)
    return {"name": name, "figures": inside, "tables": held, "maps": maps} if inside or held else None


def _head(index: int, run: RunFolder) -> dict[str, Any]:
    return {"title": run.title, "index": index, "colour": index % COLOURS,
            "dash": DASHES[index // COLOURS % len(DASHES)],
            "status": run.status, "step": run.step, "steps": run.steps}  # fmt: skip


def _title(runs: Sequence[RunFolder]) -> str:
    """Of several runs: the folder that they are in."""
    if len(runs) == 1:
        return runs[0].title
    parents = {run.path.resolve().parent for run in runs}
    return f"{parents.pop().name}: {len(runs)} runs" if len(parents) == 1 else f"{len(runs)} runs"


def script_json(value: Any) -> str:
    """JSON that may stand inside a <script>, whatever texts are in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    return (files("surgery.midtraining.report") / name).read_text(encoding="utf-8")
