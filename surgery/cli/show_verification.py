"""What `surgery verify` prints for people.

show(Verified(compare(a, b, max_memory=1 << 28), compare_logits("A", "B")))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery.cli.console import console as terminal
from surgery.errors import some
from surgery.model.spec import template_of
from surgery.units import count, human
from surgery.verification.findings import Part, Side, Verified

if TYPE_CHECKING:
    from surgery.verification.ambiguity import Readings
    from surgery.verification.report import LogitReport

FEW = 12  # lines of parts that are printed; --json has all of them
PLACES = 8


def show(answer: Verified, console: Console | None = None) -> None:
    """Every difference, then the verdict; long lists of the same kind are shortened."""
    out, result = console or terminal(), answer.found
    for label, side in (("A", result.a), ("B", result.b)):
        out.print(Text.assemble((f"{label}  ", "dim"), side.path, (f"  {_about(side)}", "dim")))
        out.print(Text(f"   content {side.digest}", style="dim"))
    _parts(out, result.parts)
    for field in result.fields:
        out.print(
            _line(field.text if field.function else f"{field.text} (the logits do not depend on it)", field.function)
        )
    for remark in result.remarks:
        out.print(_line(f"note on {remark.text}", remark.unknown))
    if answer.logits is not None:
        _logits(out, answer.logits)
    out.print(Text(answer.verdict, style="bold green" if answer.same else "bold red"))


def _about(side: Side) -> str:
    return f"{side.format} {side.family}, {count(side.parameters)} in {side.parts} parts, {human(side.bytes)}"


def _line(text: str, bad: bool) -> Text:
    return Text(f"   {text}", style="red" if bad else "yellow")


def _parts(out: Console, parts: tuple[Part, ...]) -> None:
    """One line per part, or, where there are many, per kind of part."""
    if len(parts) <= FEW:
        for part in parts:
            out.print(_line(part.text, part.changes))
        return
    kinds: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        key = template_of(part.name), part.missing, part.shapes, part.kinds, part.values is None
        kinds.setdefault(key, []).append(part)
    groups = sorted(kinds.values(), key=lambda group: not group[0].changes)
    for group in groups[:FEW]:
        more = f" (and {len(group) - 1} more {_plural(group)})" if len(group) > 1 else ""
        out.print(_line(group[0].text + more, group[0].changes))
    if len(groups) > FEW:
        rest = sum(len(group) for group in groups[FEW:])
        out.print(_line(f"and {rest} more parts (--json lists all of them)", groups[FEW][0].changes))


def _plural(group: list[Part]) -> str:
    return template_of(group[0].name).replace("layers.{l}.", "layers.*.").replace("{e}", "*")


def _logits(out: Console, logits: LogitReport) -> None:
    batch, length = logits.tokens
    told = f"{batch} x {length} tokens in fp32: {logits.verdict}"
    out.print(Text(f"   {told}", style="green" if logits.same else "red"))
    if not logits.same:
        out.print(_line(f"KL divergence {logits.kl:.3g} nats; the same best token in {logits.agreement:.0%}", True))
        if logits.alone:
            out.print(_line(f"at fault by themselves, given A's inputs: {_alone(logits)}", True))
        for cause in logits.causes:
            out.print(Text(f"   cause: {cause.text}", style="bold"))
    for note in logits.notes:
        out.print(Text(f"   note: {note}", style="yellow"))


def _alone(logits: LogitReport) -> str:
    from surgery.running.whole import places

    return some(places(gap.module for gap in logits.alone), PLACES)


def readings(found: Readings, console: Console | None = None) -> None:
    """`surgery inspect --try-text`: a line per reading, then which one it is."""
    out = console or terminal()
    out.print(Text(f"{found.path} on {found.tokens} tokens of {found.text}", style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_row(*(Text(t, style="dim") for t in ("reading", "loss", "best token right", "")))
    for one in found.readings:
        loss = "-" if one.loss is None else f"{one.loss:.3f}"
        right = "-" if one.right is None else f"{one.right:.1%}"
        table.add_row(one.flags or "as it is", loss, right, Text(one.error or "", style="red"))
    table.add_row("guessing blindly", f"{found.guess:.3f}", "", "")
    out.print(table)
    out.print(Text(found.verdict, style="bold green" if found.best else "bold yellow"))
