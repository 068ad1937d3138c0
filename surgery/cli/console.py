"""The console that everything for people is printed on: what comes from a file reaches no terminal unescaped.

console().print(Text("name\\x1b[2J"))      # the escape sequence is printed as \\x1b[2J
"""

from __future__ import annotations

from typing import IO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from surgery.errors import printable


def console(file: IO[str] | None = None, soft_wrap: bool = True) -> Console:
    """On standard output, or on `file`; long lines are left to the terminal to wrap, or cut by what is printed."""
    out = Console(file=file, highlight=False, soft_wrap=soft_wrap, markup=False, emoji=False)
    out.push_render_hook(_Escaping())
    return out


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
