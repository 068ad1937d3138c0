"""A model's tensors by name, as notebooks show them: `Parts` and the lines of text and HTML about a checkpoint.

    checkpoint.parts                # 272 parts: embed bfloat16[49152, 576], layers.0.attn.q ...
    checkpoint.parts["embed"][:4]   # read now

A mapping that is not changed: `surgery.save_checkpoint(checkpoint, "edited", parts={"embed": tensor})` writes others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape

from surgery.errors import suggest
from surgery.tensors.lazy import Lazy

SHOWN = 3  # parts in a repr
ROWS = 400  # of a table in a notebook


class Parts(Mapping[str, Lazy]):
    """Read-only; a KeyError names the nearest part."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Mapping[str, Lazy]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Lazy:
        if name not in self._parts:
            near = suggest(name, self._parts)
            raise KeyError(f"there is no part {name!r}" + (f"; {near}" if near.startswith("did") else ""))
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return listed(self, "parts")

    def _repr_html_(self) -> str:
        return table(self)


def listed(tensors: Mapping[str, Lazy], what: str) -> str:
    """How many there are, and the first few."""
    first = ", ".join(f"{name} {t.dtype}{list(t.shape)}" for name, t in list(tensors.items())[:SHOWN])
    return f"{len(tensors)} {what}: {first}{', ...' if len(tensors) > SHOWN else ''}"


def table(tensors: Mapping[str, Lazy]) -> str:
    """HTML: a row for each tensor."""
    rows = [(name, t.dtype, " x ".join(map(str, t.shape))) for name, t in list(tensors.items())[:ROWS]]
    if len(tensors) > ROWS:
        rows.append((f"and {len(tensors) - ROWS} more", "", ""))
    return rows_html(("name", "dtype", "shape"), rows)


def rows_html(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table of texts, which may come from a file."""

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
