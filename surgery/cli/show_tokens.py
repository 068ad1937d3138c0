"""What `surgery data tokenize` and `surgery data inspect` print for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from surgery.cli.terminal import say
from surgery.data.inspection import Inspection
from surgery.data.tokenizing.bad_lines import summary
from surgery.data.tokenizing.settings import Settings
from surgery.data.tokenizing.tokenize import Report
from surgery.data.tokenizing.vocabulary import Vocabulary
from surgery.units import human


def tokenized(report: Report, settings: Settings, vocabulary: Vocabulary, notes: Iterable[str]) -> None:
    """`surgery data tokenize`."""
    total, seconds = report.total, max(report.seconds, 1e-9)
    say(f"{report.dst}: {total.tokens:,} tokens in {total.documents:,} documents", bold=True)
    eos = "none" if settings.eos is None else f"{settings.eos}"
    rows = [
        ("dtype", f"{report.dtype}, for a vocabulary of {vocabulary.size:,}"),
        ("files", f"{len(report.files)} ({settings.format}): {_few(list(report.files))}"),
        ("eos", eos if settings.bos is None else f"{eos}, and bos {settings.bos}"),
        ("to be learnt", f"{total.learnt:,} tokens" if settings.masked else ""),
        ("blank", f"{total.blank:,} documents without a token, left out" if total.blank else ""),
        ("bad lines", summary(total.bad, total.lines, report.kinds) if total.bad else ""),
        ("time", f"{seconds:.1f} s, {(total.tokens - report.resumed) / seconds:,.0f} tokens/s"),
        ("resumed", f"after {report.resumed:,} tokens of an earlier run" if report.resumed else ""),
    ]
    _print(rows, [*notes, *report.notes, *(f"{bad}" for bad in report.first)])


def inspected(found: Sequence[Inspection]) -> None:
    """`surgery data inspect`."""
    for one in found:
        say(one.path, bold=True)
        lengths = f", {one.shortest:,} to {one.longest:,} tokens" if one.longest is not None else ""
        empty = f", {one.empty:,} of them empty" if one.empty else ""
        rows = [
            ("format", f"{one.format}, {one.dtype}, {human(one.bytes)}"),
            ("tokens", f"{one.tokens:,}"),
            ("documents", "" if one.documents is None else f"{one.documents:,}{lengths}{empty}"),
            ("ids", "" if one.largest_id is None else f"{one.smallest_id:,} to {one.largest_id:,}"),
            ("label mask", "" if one.mask is None else f"{one.mask}: {one.learnt:,} tokens to be learnt"),
            ("begins", repr(one.begins) if one.begins is not None else " ".join(map(str, one.first_ids[:16]))),
        ]
        _print(rows, one.notes)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"


def _print(rows: Iterable[tuple[str, str]], notes: Iterable[str]) -> None:
    for name, value in rows:
        if value:
            say(f"  {name:13} {value}")
    for note in notes:
        say(f"  note: {note}", fg="yellow")
