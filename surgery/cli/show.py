"""What the commands print for people.  Every function takes the plain data that `--json` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text

from surgery.cli.console import Rows, console, notes
from surgery.conversion.report import Plan, Report, Share
from surgery.errors import shown, some
from surgery.formats.base import Format
from surgery.units import count, human

Json = Mapping[str, Any]


def inspection(found: Json) -> None:
    """`surgery inspect`."""
    out = console()
    parameters = found["parameters"]
    active = "" if parameters["active"] == parameters["total"] else f", {count(parameters['active'])} of them active"
    parallel = ", ".join(f"{k} {v}" for k, v in found["parallel"].items() if v > 1)
    out.print(Text(found["path"], style="bold"))
    out.print(
        Rows(
            [
                ("format", found["format"] + (f", {parallel}" if parallel else "")),
                ("family", found["family"]),
                ("parameters", f"{count(parameters['total'])}{active} ({parameters['total']:,})"),
                (
                    "dtype",
                    ", ".join(
                        f"{k}: {count(v)}" if len(found["dtypes"]) > 1 else k for k, v in found["dtypes"].items()
                    ),
                ),
                *found["sizes"].items(),
                *found["choices"].items(),
                ("tokenizer", found["tokenizer"] or "none found"),
                ("padding rows", found["padding_rows"]),
                ("files", f"{len(found['files'])}, {human(found['bytes'])}: {_few(found['files'])}"),
                *found["details"].items(),
                ("left out", _ignored(found["ignored"])),
                ("pickles name", some(found["globals"], 1000) or "nothing" if "globals" in found else None),
                ("scan", _scan(found.get("scan"))),
            ]
        )
    )
    notes(out, found["notes"])
    for name, part in found.get("parts", {}).items():
        out.print(Text(f"  {name:44s} {part['dtype']:9s} {part['shape']}"))


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return some(names) if len(names) <= 4 else f"{some(names[:1])} ... {some(names[-1:])}"


def _ignored(ignored: Mapping[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, why in ignored.items():
        reasons.setdefault(why, []).append(name)
    return "; ".join(f"{len(names)} x {some(names[:1])} ({why})" for why, names in reasons.items())


def _scan(scan: Json | None) -> str | None:
    if scan is None:
        return None
    bad = scan["nan_or_inf"]
    if not bad:
        return f"no NaN, no Inf; the largest weight is {scan['largest']:g}"
    return "; ".join(f"{name}: {n['nan']} NaN, {n['inf']} Inf" for name, n in bad.items())


def plan_data(plan: Plan) -> dict[str, Any]:
    """`surgery convert --dry-run`, as data."""
    return {
        "source": {"path": shown(plan.source.path), "format": plan.source.format, "family": plan.source.spec.family},
        "to": plan.to.name,
        "parallel": plan.parallel,
        "files": {f.name: f.size for f in plan.output.files},
        "tensors": sum(len(f.regions) for f in plan.output.files),
        "bytes": plan.bytes,
        "max_memory": plan.max_memory,
        "dropped": dict(plan.source.ignored),
        "notes": list(plan.notes),
    }


def plan(data: Json) -> None:
    """`surgery convert --dry-run`."""
    out = console()
    source = data["source"]
    parallel = ", ".join(f"{k} {v}" for k, v in data["parallel"].items())
    what = data.get("merge") or f"convert {source['path']} ({source['format']} {source['family']})"
    out.print(Text(f"would {what}", style="bold"))
    out.print(
        Rows(
            [
                ("to", data["to"] + (f", {parallel}" if parallel else "")),
                ("tensors", f"{data['tensors']:,} in {len(data['files'])} files"),
                ("disk", human(data["bytes"])),
                ("memory", f"at most {human(data['max_memory'])}"),
                ("left out", _ignored(data["dropped"])),
            ]
        )
    )
    for name, size in data["files"].items():
        out.print(Text(f"  {name:44s} {human(size):>9s}"))
    notes(out, data["notes"])


def report(done: Report | Share) -> None:
    """`surgery convert`."""
    out = console()
    if isinstance(done, Share):
        rest = ", ".join(map(str, done.missing)) or "none, and another process puts them together"
        return out.print(f"share {done.index} of {done.count} is written; still missing: {rest}")
    parallel = "".join(f", {k} {v}" for k, v in done.topology.items())
    rate = f"{human(done.bytes / done.seconds)}/s" if done.seconds > 0 else ""
    checked = f"read back and equal ({done.verify_seconds:.1f} s)" if done.verified else "not read back (--no-verify)"
    resumed = f", {human(done.resumed_bytes)} of it by an earlier run" if done.resumed_bytes else ""
    out.print(
        Text(
            f"{done.source} ({done.source_format}) -> {done.output} ({done.output_format}{parallel})",
            style="bold",
        )
    )
    out.print(
        Rows(
            [
                ("wrote", f"{human(done.bytes)} in {done.files} files{resumed}"),
                ("time", f"{done.seconds:.1f} s, {rate}"),
                ("memory", f"{human(done.peak_memory)} at the peak, {human(done.max_memory)} allowed"),
                ("verified", checked),
                ("digest", done.content_digest),
                ("left out", _ignored(done.dropped)),
            ]
        )
    )
    notes(out, done.notes)


def formats_data(chosen: Iterable[Format]) -> dict[str, Any]:
    """`surgery formats`, as data."""
    return {
        f.name: {
            "title": f.title,
            "parallel": list(f.flags),
            "options": {
                o.name: {"meaning": o.meaning, "default": o.default, "choices": list(o.choices), "side": o.side}
                for o in f.choices
            },
        }
        for f in chosen
    }


def formats(data: Json) -> None:
    """`surgery formats`."""
    out = console()
    for name, form in data.items():
        parallel = "".join(f" --{flag}" for flag in form["parallel"])
        out.print(Text.assemble((name, "bold"), f"  {form['title']}", (parallel, "cyan")))
        for option, o in form["options"].items():
            choices = f" [{'|'.join(o['choices'])}]" if o["choices"] else ""
            when = {"read": ", when reading", "write": ", when writing", "both": ""}[o["side"]]
            out.print(Text(f"    -O {option}=...  {o['meaning']}{choices} (default: {o['default']}{when})"))
