"""What `surgery upcycle` prints for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from surgery.cli.console import Rows, console, notes
from surgery.errors import shown
from surgery.units import count, human
from surgery.upcycling.distance import Distance
from surgery.upcycling.proof import Proof
from surgery.upcycling.run import Outcome, Prepared

Json = Mapping[str, Any]


def plan_data(ready: Prepared) -> dict[str, Any]:
    """`--dry-run`, as data."""
    plan = ready.plan
    return {
        "source": {"path": shown(ready.source.path), "format": ready.source.format,
                   "family": ready.source.spec.family, "parameters": ready.source.spec.parameters()},
        "to": plan.to.name,
        "upcycling": ready.made.to_json(),
        "files": {f.name: f.size for f in plan.output.files},
        "bytes": plan.bytes,
        "max_memory": plan.max_memory,
        "notes": list(plan.notes),
    }  # fmt: skip


def plan(data: Json) -> None:
    """`--dry-run`."""
    out, source = console(), data["source"]
    out.print(Text(f"would change {source['path']} ({source['format']} {source['family']},"
                   f" {count(source['parameters'])} parameters)", style="bold"))  # fmt: skip
    promise = "exact" if data["upcycling"]["exact"] else f"not preserving: {'; '.join(data['upcycling']['losses'])}"
    out.print(Rows([*_what(data["upcycling"]), ("function", promise),
                     ("disk", f"{human(data['bytes'])} in {len(data['files'])} files ({data['to']})"),
                     ("memory", f"at most {human(data['max_memory'])}")]))  # fmt: skip
    notes(out, data["notes"])


def outcome(done: Outcome) -> None:
    """What was written, and the proof."""
    out, report = console(), done.report
    out.print(
        Text(f"{report.source} ({report.source_format}) -> {report.output} ({report.output_format})", style="bold")
    )
    rate = f", {human(report.bytes / report.seconds)}/s" if report.seconds > 0 else ""
    checked = "read back and equal" if report.verified else "not read back (--no-verify)"
    out.print(Rows([*_what(done.made.to_json()),
                     ("wrote", f"{human(report.bytes)} in {report.seconds:.1f} s{rate}; {checked}"),
                     ("memory", f"{human(report.peak_memory)} at the peak of writing,"
                                f" {human(report.max_memory)} allowed")]))  # fmt: skip
    notes(out, report.notes)
    if done.proof:
        _proof(out, done.proof)


def _proof(out: Console, proof: Proof) -> None:
    style = "bold green" if proof.verdict.startswith("exact") else "bold yellow"
    out.print(Text.assemble(("proof  ", "dim"), (proof.verdict, style)))
    ties = proof.ties
    rows = [("fp32", _distance(proof.fp32))]
    if proof.stored and proof.floor:
        rows += [(proof.dtype, _distance(proof.stored)),
                 ("noise floor", f"{_distance(proof.floor)} (the source against itself in fp32)")]  # fmt: skip
    part = f", in {ties.incomplete} a virtual group in part" if ties.incomplete else ""
    rows += [
        ("router", f"{ties.tied} of {ties.choices:,} choices tie{part}" if ties.choices else ""),
        (
            "neurons",
            "" if proof.intact is None else f"{proof.intact:.1%} of the experts' are the source's, bit for bit",
        ),
        ("on", f"{proof.tokens} tokens of {proof.text}, {proof.seconds:.1f} s"),
    ]
    out.print(Rows(rows))


def _distance(d: Distance) -> str:
    perplexity = f"perplexity {d.perplexity:.4g} ({d.reference_perplexity:.4g})"
    return f"max |difference| {d.max_diff:.2g}, KL {d.kl:.2g}, {perplexity}"


def _what(data: Json) -> list[tuple[str, object]]:
    total, active = data["parameters"]["total"], data["parameters"]["active"]
    size = ("parameters", f"{count(total)}, {count(active)} of them active")
    if "operation" in data:
        sources = ", ".join(data.get("from", []))
        heads = data.get("attention_experts")
        return [
            ("operation", data["operation"]),
            ("attention", f"{heads} groups of heads, {data['attention_top_k']} active" if heads else ""),
            ("experts", f"{data['experts']}, {data['top_k']} active" if data["experts"] else "none: a dense model"),
            ("made of", sources if len(sources) < 80 else f"{sources[:76]} ..."),
            size,
        ]
    factors = ", ".join(f"{k} x {v:g}" for k, v in data["factors"].items() if v not in (None, 1.0))
    cut = f", {data['copies']} copies in {data['granularity']} shards each" if data["granularity"] > 1 else ""
    shared = f", {data['shared_width']} wide always on" if data["shared_width"] else ""
    return [
        ("strategy", f"{data['strategy']}{cut}"),
        ("target", data["target"]),
        ("experts", f"{data['experts']}, {data['top_k']} active, {data['expert_width']} wide{shared}"),
        ("dense layers", ", ".join(map(str, data["dense_layers"]))),
        ("factors", factors),
        size,
    ]
