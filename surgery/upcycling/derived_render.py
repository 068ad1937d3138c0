"""What `surgery experts` and `surgery upcycle --collapse` print for people.

plan(data_of(plan, "experts", made.to_json()))
outcome(done, "experts")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from surgery.conversion import Plan
from surgery.sizes import count, human
from surgery.upcycling import render
from surgery.upcycling.derived import Outcome

Json = Mapping[str, Any]


def data_of(plan: Plan, what: str, made: Json) -> dict[str, Any]:
    """`--dry-run`, as data."""
    source = plan.source
    return {
        "source": {"path": str(source.path), "format": source.format},
        "to": plan.to.name,
        what: dict(made),
        "files": {f.name: f.size for f in plan.output.files},
        "bytes": plan.bytes,
        "max_memory": plan.max_memory,
        "notes": list(plan.notes),
    }


def plan(data: Json, what: str) -> None:
    """`--dry-run`."""
    out, source = Console(highlight=False, soft_wrap=True), data["source"]
    out.print(Text(f"would change {source['path']} ({source['format']})", style="bold"))
    out.print(render._rows([*_what(data[what]),
                            ("disk", f"{human(data['bytes'])} in {len(data['files'])} files ({data['to']})"),
                            ("memory", f"at most {human(data['max_memory'])}")]))  # fmt: skip
    render._notes(out, data["notes"])


def outcome(done: Outcome, what: str) -> None:
    """What was written, and the proof."""
    out, report = Console(highlight=False, soft_wrap=True), done.report
    names = f"{report.source} ({report.source_format}) -> {report.output} ({report.output_format})"
    out.print(Text(names, style="bold"))
    checked = "read back and equal" if report.verified else "not read back (--no-verify)"
    out.print(render._rows([*_what(done.record[what]),
                            ("wrote", f"{human(report.bytes)} in {report.seconds:.1f} s; {checked}"),
                            ("memory", f"{human(report.peak_memory)} at the peak of writing,"
                                       f" {human(report.max_memory)} allowed")]))  # fmt: skip
    render._notes(out, report.notes)
    if done.proof:
        render.proof(out, done.proof)


def _what(made: Json) -> list[tuple[str, object]]:
    numbers = made["parameters"]
    active = f", {count(numbers['active'])} of them active" if "active" in numbers else ""
    rows: list[tuple[str, object]] = [("parameters", f"{count(numbers['total'])}{active}")]
    if "experts" in made:
        rows.append(("experts", f"{made['experts']}, {made['top_k']} active"))
    if "width" in made:
        layers = "; ".join(f"{n} layers from {text}" for text, n in made["layers"].items())
        rows.append(("mlp", f"{made['width']} wide; {layers}"))
    rows.append(("function", "exact" if made["exact"] else f"not preserving: {'; '.join(made['losses'])}"))
    return rows
