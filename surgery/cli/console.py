"""The console that everything for people is printed on: what comes from a file reaches no terminal unescaped.

console().print(Text("name\\x1b[2J"))      # the escape sequence is printed as \\x1b[2J
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from surgery.cli.command import quiet
from surgery.errors import LONGEST, printable


def console(file: IO[str] | None = None, soft_wrap: bool = True) -> Console:
    """On standard output, or on `file`; long lines are left to the terminal to wrap, or cut by what is printed."""
    out = Console(file=file, quiet=quiet(), highlight=False, soft_wrap=soft_wrap, markup=False, emoji=False)
    out.push_render_hook(_Escaping())
    return out


@dataclass(frozen=True)
class Rows:
    """Two columns; what is absent or empty is left out.  A line each where it is not a terminal that reads them."""

    pairs: Iterable[tuple[str, object]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        said = [(key, printable(str(value), LONGEST)) for key, value in self.pairs if value not in (None, "", [], {})]
        if console.is_terminal:
            table = Table.grid(padding=(0, 2))
            table.add_column(style="dim", no_wrap=True)
            table.add_column(overflow="fold")
            for key, text in said:
                table.add_row(key, Text(text))
            yield table
            return
        width = max((len(key) for key, _ in said), default=0)
        yield Text("\n".join(f"{key:{width}}  {text}" for key, text in said))


def notes(out: Console, said: Iterable[str], label: str = "note") -> None:
    """Each on lines of its own, which a terminal breaks between words."""
    for note in said:
        text = f"  {label}: {printable(note, LONGEST)}"
        lines = textwrap.wrap(text, out.width, subsequent_indent="    ") if out.is_terminal else [text]
        out.print(Text("\n".join(lines), style="yellow"))


class _Escaping(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    """A renderable with `printable` text."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
