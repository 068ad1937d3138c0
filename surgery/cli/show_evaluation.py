"""What `surgery eval` prints for people, from the data that `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from surgery.cli.console import console
from surgery.units import human

Json = Mapping[str, Any]
WIDEST = 1000  # columns


def evaluation(found: Json) -> None:
    """Losses, then scores."""
    out, model = console(), found["model"]
    how = f"{model['format']} {model['family']}, {model['dtype']} on {model['device']}, context {model['context']:,}"
    out.print(Text.assemble((model["path"], "bold"), f"  {how}"))
    for key, title in (("heldout", "held out"), ("texts", "text")):
        if key in found:
            _print(out, _losses(found[key], title))
    if "tasks" in found:
        _print(out, _scores(found["tasks"]))


def variants(found: Mapping[str, list[str]]) -> None:
    """Every task with its variants."""
    table = _table("task", "variants; the first is the default")
    for name, several in found.items():
        table.add_row(Text(name), Text(" ".join(several)))
    console().print(table)


def _print(out: Console, table: Table) -> None:
    """As wide as it is: names are not cut off."""
    wide = out.options.update(max_width=WIDEST)
    out.width = max(out.width, Measurement.get(out, wide, table).maximum)
    out.print(table)


def _losses(found: Json, title: str) -> Table:
    table = _table(title, "loss", "bpb", "tokens", "bytes")
    for name, told in found.items():
        size = "" if told["bytes"] is None else human(told["bytes"])
        table.add_row(
            Text(name), _number(told["loss"], ".4f"), _number(told["bpb"], ".4f"), f"{told['tokens']:,}", size
        )
    return table


def _scores(found: Json) -> Table:
    """A row for each task; accuracies with their standard errors."""
    metrics = list(dict.fromkeys(k for told in found.values() for k in told if not k.endswith("_stderr")))
    table = _table("task", *metrics)
    for name, told in found.items():
        table.add_row(Text(name), *(_score(told, metric) for metric in metrics))
    return table


def _score(told: Json, metric: str) -> str:
    value, error = told.get(metric), told.get(f"{metric}_stderr")
    if isinstance(value, int) or value is None:
        return "" if value is None else f"{value:,}"
    return f"{value:.3f}" + (f" ±{error:.3f}" if isinstance(error, float) else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right" if len(others) > 1 else "left", overflow="fold")
    return table
