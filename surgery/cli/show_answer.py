"""What `surgery inspect` prints of a path that is no checkpoint which surgery converts.

answer(describe("adapter_model.safetensors"), tensors=True)
"""

from __future__ import annotations

from rich.text import Text

from surgery.cli.console import Rows, console
from surgery.errors import some
from surgery.formats.names import collapsed
from surgery.recognising import Answer
from surgery.recognising.contents import Contents
from surgery.units import count

TEMPLATES = 12  # of names of tensors; --tensors lists all


def answer(found: Answer, *, tensors: bool = False, pickles: bool = False) -> None:
    """What it is, what can be read of it, what to do next."""
    out = console()
    out.print(Text(found.path, style="bold"))
    held = found.contents
    lines: list[tuple[str, object]] = [("this is", found.what), *found.facts.items()]
    if held:
        lines += _held(held)
        if pickles:
            lines.append(("pickles name", some(held.globals, 1000) or "nothing"))
    out.print(Rows(lines))
    if held and tensors:
        for name, (dtype, shape) in held.tensors.items():
            out.print(Text(f"  {some([name]):60s} {dtype:9s} {list(shape)}"))
    for step in found.next:
        out.print(Text(f"  next: {step}", style="green"))


def _held(held: Contents) -> list[tuple[str, str]]:
    dtypes = ", ".join(dict.fromkeys(dtype for dtype, _ in held.tensors.values()))
    names = collapsed(held.tensors)
    more = "" if len(names) <= TEMPLATES else f" and {len(names) - TEMPLATES} more (--tensors)"
    left = f" (in {held.files} files; {held.left} more were not opened)" if held.left else ""
    return [
        ("tensors", f"{len(held.tensors):,}, {count(held.elements)} elements {dtypes}{left}" if names else "none"),
        ("names", some(names[:TEMPLATES], TEMPLATES) + more if names else ""),
        ("besides", some(held.entries, 12)),
    ]
