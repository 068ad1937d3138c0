"""surgery.json: where an output comes from, and what was dropped, added or guessed on the way.

text_file("surgery.json", provenance(plan, report, ["surgery", "convert", ...], {}))
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from surgery.formats.base import run_of
from surgery.formats.topology import Topology

if TYPE_CHECKING:
    from surgery.conversion.convert import Plan, Report


def provenance(plan: Plan, report: Report, command: Sequence[str], more: Mapping[str, Any]) -> bytes:
    """The bytes of surgery.json; `more` are entries that an operation adds."""
    record = {
        "surgery": version(),
        "command": list(command),
        "source": {"path": report.source, "format": report.source_format, "topology": _sizes(plan.source.topology),
                   "files": {p.name: p.stat().st_size for p in plan.source.files}},
        "output": {"format": report.output_format, "topology": dict(report.topology),
                   "files": {f.name: f.size for f in plan.output.files}},
        "source_digest": report.source_digest,
        "content_digest": report.content_digest,
        "verified": report.verified,
        "parts": len(plan.source.parts),
        "parameters": plan.source.spec.parameters(),
        "dropped": dict(report.dropped),
        "notes": list(report.notes),
        "run": run_of(plan.source.details),
        "versions": {"python": platform.python_version(), "torch": _torch_version()},
    } | dict(more)  # fmt: skip
    return (json.dumps(record, indent=2) + "\n").encode()


def _sizes(topology: Topology) -> dict[str, int]:
    return {k: v for k, v in asdict(topology).items() if isinstance(v, int)}


def _torch_version() -> str:
    torch = sys.modules.get("torch")
    return str(torch.__version__) if torch else ""


def version() -> str:
    try:
        return metadata.version("checkpoint-surgery")
    except metadata.PackageNotFoundError:
        return "unknown"
