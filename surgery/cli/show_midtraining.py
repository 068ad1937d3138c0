"""What `surgery midtrain` prints for people: its keys explained, a forecast with its learning rates, what was done."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from surgery.cli.console import console, notes
from surgery.errors import printable
from surgery.midtraining.dry_run import Forecast
from surgery.midtraining.panel import BLOCKS, clock
from surgery.midtraining.run import Done
from surgery.midtraining.run_file import Line
from surgery.midtraining.seeds import Found, mean
from surgery.midtraining.sweep import Trial
from surgery.units import count, human

HEIGHT = 8  # lines of the curve
WIDTH = 100  # of what is explained


def explanation(lines: Sequence[Line]) -> None:
    """Every key as YAML that could be the run's file: its meaning above it, who set it behind it."""
    out = console()
    above = ""
    for line in lines:
        parent, _, name = line.key.rpartition(".")
        indent = "  " * line.key.count(".")
        first = parent != above and parent.rpartition(".")[2].isdigit()  # key of a section in a list
        above = parent
        for text in textwrap.wrap(line.meaning, WIDTH - len(indent) - 2, break_on_hyphens=False):
            out.print(Text(f"{indent}# {text}", style="dim"))
        value = "" if line.section else " " + re.sub(r"(?<![\d.])(\d+)e-", r"\1.0e-", json.dumps(line.value))
        dashed = f"{indent[:-2]}- " if first else indent
        said = Text(f"{dashed}{name}:{value}", style="bold" if line.origin else "")
        out.print(said.append(f"  # {line.origin}", style="cyan") if line.origin else said)


def trial(found: Trial) -> str:
    """One of a sweep, in a line."""
    values = " ".join(f"{key}={value}" for key, value in found.values.items())
    return f"{values}: {found.failed or f'{found.tokens_per_second or 0:,.0f} tokens/s'}"


def trials(found: Sequence[Trial]) -> None:
    """`--sweep`: a line for each, the fastest in bold."""
    keys, best = list(found[0].values), max((t.tokens_per_second or 0.0 for t in found), default=0.0)
    table = Table(box=None, pad_edge=False)
    for name in (*(key.rpartition(".")[2] for key in keys), "tokens/s", "memory", f"loss, step {found[0].steps}", ""):
        table.add_column(name, overflow="fold")
    for t in found:
        row = [t.values[key] for key in keys]
        if not t.failed:
            row += [f"{t.tokens_per_second:,.0f}", human(t.memory or 0), f"{t.loss:.4f}"]
        table.add_row(*row, *([] if not t.failed else ["-", "-", "-", t.failed]),
                      style="bold" if best and t.tokens_per_second == best else "")  # fmt: skip
    console(soft_wrap=False).print(table)


def forecast(found: Forecast) -> None:
    """`--dry-run`."""
    out = console()
    held = sum(found.memory.values())
    trained = "" if found.trained == found.parameters else f", {count(found.trained)} of them are trained"
    free = "" if found.free is None else f", {human(found.free)} are free besides the weights"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("steps", f"{found.steps:,}")
    table.add_row("tokens", f"{count(found.tokens)} ({found.tokens:,})")
    table.add_row("parameters", f"{count(found.parameters)}{trained}")
    for s in found.stages:
        each = f"{s['rows']:,} rows of {s['length']:,} = {s['rows'] * s['length']:,} tokens"
        by = f"{s['accumulation']} x {s['micro_rows']} rows on a device"
        table.add_row(f"from step {s['first']:,}", f"{each} a step; {by}")
    table.add_row("memory", f"about {human(held)} on a device{free}: "
                  + ", ".join(f"{name} {human(n)}" for name, n in found.memory.items() if n))  # fmt: skip
    table.add_row("time", f"about {clock(found.seconds)}: the first step takes {found.step_seconds:.3g} s here")
    for s in found.sources:
        table.add_row(str(s["name"]), f"{s['take']:,} rows, {s['epochs']:.2f} epochs of {s['have']:,}")
    out.print(table)
    out.print()
    for line in curve([rate for _, rate in found.rates], HEIGHT):
        out.print(Text(line))
    out.print(Text(f"{'':10}learning rate, step 1 to {found.steps:,}", style="dim"))
    notes(out, found.notes)


def curve(values: Sequence[float], height: int) -> list[str]:
    """The values as columns, `height` lines high, the largest filling them; the scale stands at the left."""
    top = max(values) or 1.0
    filled = [value / top * height * len(BLOCKS) for value in values]
    lines = []
    for line in range(height, 0, -1):
        cells = (min(max(round(f - (line - 1) * len(BLOCKS)), 0), len(BLOCKS)) for f in filled)
        bar = "".join(BLOCKS[n - 1] if n else " " for n in cells)
        lines.append(f"{top * line / height:9.2e} {bar}".rstrip())
    return lines


def done(found: Done) -> None:
    """The end of a run."""
    out = console()
    skipped = f", {found.skipped} steps left out" if found.skipped else ""
    rate = found.tokens / found.seconds if found.seconds else 0.0
    out.print(Text(f"{found.steps:,} steps, {count(found.tokens)} tokens in {clock(found.seconds)} "
                   f"({count(rate)} a second), loss {found.loss:.4f}{skipped}"))  # fmt: skip
    for path in found.exports:
        out.print(Text(f"  {path}"))
    out.print(Text(f"  {found.folder}: metrics.jsonl and what else the run said", style="dim"))


def soup(found: Found) -> None:
    """Losses of the ingredients and of their soup, and which is kept."""
    out = console()
    table = Table(box=None, pad_edge=False)
    domains = list(found.soup)
    table.add_column("loss")
    for name in (*domains, "mean"):
        table.add_column(Text(printable(name)), justify="right")
    for name, losses in {**found.ingredients, "soup": found.soup}.items():
        values = [*(losses[domain]["loss"] for domain in domains), mean(losses)]
        style = "bold" if name == found.kept else ""
        table.add_row(Text(name), *(f"{value:.4f}" for value in values), style=style)
    out.print(table)
    out.print(Text(f"{found.kept} is kept: {found.path}"))
