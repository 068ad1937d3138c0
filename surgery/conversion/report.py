"""What a conversion would do, what it did, and the record of it that lies beside every output: surgery.json.

plan.bytes, plan.notes                     # Plan: before anything is written
report.content_digest, report.verified     # Report: afterwards
text_file("surgery.json", provenance(plan, report, {}))
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import surgery
from surgery.containers.text import json_text
from surgery.conversion.request import Write
from surgery.formats.base import Checkpoint, Format, Options, Output, run_of
from surgery.formats.optimizer import MASTER
from surgery.formats.topology import Topology
from surgery.tensors.files import size_of
from surgery.tensors.fingerprint import STATE, Ledger
from surgery.tensors.lazy import Lazy


@dataclass(frozen=True)
class Plan:
    """What a conversion would do.

    options      those of the target                   job      what tells it from another: an equal one is resumed
    max_memory   bytes                                 derived  whether the weights are another model's
    threads      that make what is written; None: as many as there are cores, at most 4
    prove        shown the complete output, opened, before it is published: what it answers joins surgery.json
    """

    source: Checkpoint
    output: Output
    to: Format
    write: Write
    options: Options
    ledger: Ledger
    max_memory: int
    notes: tuple[str, ...]
    job: Mapping[str, Any]
    derived: bool = False
    threads: int | None = None
    prove: Callable[[Checkpoint], Mapping[str, Any]] | None = None

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.output.files)

    @property
    def bytes_to_write(self) -> int:
        """What is told to `progress` in all: bytes written, and read back."""
        held = [*self.source.parts.values(), *states_of(self.source, self.to).values()]
        return self.bytes + (sum(tensor.nbytes for tensor in held) if self.write.verify else 0)

    @property
    def parallel(self) -> dict[str, int]:
        """The parallel sizes that the target has."""
        return {name: getattr(self.write.topology, name) for name in self.to.flags}


def states_of(source: Checkpoint, target: Format) -> dict[str, Lazy]:
    """What a target keeps of an optimizer's state, by the names that a ledger has for it."""
    found = source.optimizer
    if found is None:
        return {}
    masters = {n: t for n, t in found.roles[MASTER].items() if target.masters and source.parts[n].dtype != "float32"}
    kept = {**found.roles, MASTER: masters}
    return {f"{STATE}{role}/{name}": tensor for role, parts in kept.items() for name, tensor in parts.items()}


@dataclass(frozen=True)
class Share:
    """Share `index` of `count` is written; `missing`: the numbers of those that are not.

    Without any missing, another process that was as late puts them together.
    """

    index: int
    count: int
    missing: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What a conversion did.  Digests are of the model's parts: equal for the same weights in any format."""

    source: str
    source_format: str
    output: str
    output_format: str
    topology: Mapping[str, int]
    files: int
    bytes: int
    read_bytes: int
    resumed_bytes: int
    seconds: float
    verify_seconds: float
    peak_memory: int
    max_memory: int
    source_digest: str | None
    content_digest: str
    verified: bool
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def provenance(plan: Plan, report: Report, more: Mapping[str, Any]) -> bytes:
    """The bytes of surgery.json; `more` are entries that an operation adds."""
    record = {
        "surgery": surgery.__version__,
        "command": list(plan.write.command),
        "source": {"path": report.source, "format": report.source_format, "topology": _sizes(plan.source.topology),
                   "files": {p.name: size_of(p) for p in plan.source.files}},
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
    return json_text(record)


def _sizes(topology: Topology) -> dict[str, int]:
    return {k: v for k, v in asdict(topology).items() if isinstance(v, int)}


def _torch_version() -> str:
    torch = sys.modules.get("torch")
    return str(torch.__version__) if torch else ""
