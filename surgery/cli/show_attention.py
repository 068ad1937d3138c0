"""What `surgery attention show` prints for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from surgery.cli.console import console
from surgery.formats.hf.hub.sparse_patterns import KINDS
from surgery.midtraining.masks.figures import Figures


def table(found: Sequence[Figures]) -> None:
    """A line for each kind, and what the kinds are below."""
    out, first = console(), found[0]
    rows = Table(box=None, pad_edge=False, title=f"{first.length:,} tokens, {first.heads} heads", title_justify="left")
    for name in ("attention", "density", "distances", "see nothing", "blocks of 128", "numbers"):
        rows.add_column(name, justify="left" if name in ("attention", "numbers") else "right")
    for f in found:
        numbers = ", ".join(f"{name} {value}" for name, value in f.numbers.items())
        rows.add_row(f.kind + "*" * f.inferred, f"{f.density:.1%}", f"{f.distances / f.length:.1%}",
                     f"{f.blind / (f.heads * f.length):.1%}", f"{f.blocks:.1%}", numbers)  # fmt: skip
    out.print(rows)
    out.print()
    for f in found:
        out.print(Text.assemble((f"{f.kind}: ", "bold"), KINDS[f.kind].meaning))
    if any(f.inferred for f in found):
        out.print(Text("* no source of it was found: its definition is inferred from its name", style="dim"))
