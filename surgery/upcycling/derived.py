"""Write a checkpoint that was made from another one, and prove what it computes (`surgery experts`, `--collapse`).

plan = plan_derived(source, made, "experts", {...}, Target(to="meta"))
outcome = write_derived(source, plan, dst, record={...}, exact=True)
outcome.comparison.verdict           # "exact" | "not preserving, as asked"
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from surgery import conversion, stream
from surgery.anatomy import Spec
from surgery.checkpoint import FORMATS, KINDS, open_checkpoint, recognise, to_kind
from surgery.dialect import ONE_RANK, Topology
from surgery.dialects.hf_config import choose_family
from surgery.errors import UsageError, some
from surgery.fingerprint import Ledger
from surgery.formats import Checkpoint, Options
from surgery.upcycling.claim import Claim
from surgery.upcycling.proof import Proof, prove

TOKENS = 256


@dataclass(frozen=True)
class Target:
    """Where a result goes: the flags that all commands have in common."""

    to: str = "hf"
    topology: Topology = ONE_RANK
    dtype: str = "keep"
    options: Options = field(default_factory=dict)
    max_memory: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What was done; `proof` is None if none was asked for."""

    report: conversion.Report
    record: Mapping[str, Any]
    proof: Proof | None

    def to_json(self) -> dict[str, Any]:
        proof = self.proof.to_json() if self.proof else None
        return {**asdict(self.report), **self.record, "proof": proof}


def opened(src: str | os.PathLike[str], target: Target) -> Checkpoint:
    """The source, with those of the options that are its format's.  Raises SurgeryError."""
    if target.to not in FORMATS:
        raise UsageError(f"there is no format {target.to!r}", hint=f"known formats: {', '.join(FORMATS)}")
    reads = recognise(src).option_names("read")
    writes = FORMATS[target.to].option_names("write")
    if unknown := [name for name in target.options if name not in reads | writes]:
        raise UsageError(f"neither reading {src} nor writing {target.to} has an option {some(unknown)}",
                         hint="`surgery formats` lists the options of every format")  # fmt: skip
    source = open_checkpoint(src, options={k: v for k, v in target.options.items() if k in reads})
    return source if target.dtype == "keep" else to_kind(source, KINDS[target.dtype])


def plan_derived(made: Checkpoint, what: str, settings: Mapping[str, Any], target: Target) -> conversion.Plan:
    """The files of a checkpoint that `what` (the command) made from another one."""
    writes = FORMATS[target.to].option_names("write")
    return conversion.plan_for(
        made,
        to=target.to,
        topology=target.topology,
        options={k: v for k, v in target.options.items() if k in writes},
        max_memory=target.max_memory,
        settings={"derived": what, what: settings, "dtype": target.dtype, "read": dict(target.options)},
    )


def write_derived(
    source: Checkpoint,
    plan: conversion.Plan,
    dst: str | os.PathLike[str],
    *,
    record: Mapping[str, Any],
    claim: Claim,
    verify_tokens: int = TOKENS,
    force: bool = False,
    verify: bool = True,
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
) -> Outcome:
    """Write, read back and prove; `record` joins surgery.json.

    Raises SurgeryError, and MismatchError where `claim` says exact and the logits differ; nothing appears then.
    """
    found: list[Proof] = []

    def extra(result: Checkpoint) -> Mapping[str, Any]:
        ledger = Ledger()
        stream.read_through(source.parts, ledger, plan.max_memory)
        more: dict[str, Any] = {"source_digest": ledger.content_digest(), **record}
        if verify and verify_tokens:
            found.append(prove(runnable(source), result, claim, verify_tokens))
            more["proof"] = found[0].to_json()
        return more

    report = conversion.execute(plan, dst, force=force, verify=verify, command=command, progress=progress, prove=extra)
    return Outcome(report, record, found[0] if found else None)


def runnable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a model that transformers has."""
    return replace(checkpoint, spec=named(checkpoint.spec))


def named(spec: Spec) -> Spec:
    """The Spec under the name of a family of transformers that holds it.  Raises ConfigError if none does."""
    return spec.replace(family=choose_family(spec))
