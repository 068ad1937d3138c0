"""Write a checkpoint that was made from another one, and compare the two: for `surgery experts` and `--collapse`.

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
from surgery.checkpoint import FORMATS, KINDS, open_checkpoint, recognise, to_kind
from surgery.dialect import ONE_RANK, Topology
from surgery.dialects.hf_config import choose_family
from surgery.errors import MismatchError, UsageError, some
from surgery.fingerprint import Ledger
from surgery.formats import Checkpoint, Options
from surgery.lazy import Slice
from surgery.upcycling.layerwise import forward
from surgery.upcycling.proof import LIMIT, Distance, _tokens, distance

TOKENS = 256
ROUNDING = 0.05  # KL in nats beyond which a difference is no rounding of 16-bit weights


@dataclass(frozen=True)
class Target:
    """Where a result goes: the flags that all commands have in common."""

    to: str = "hf"
    topology: Topology = ONE_RANK
    dtype: str = "keep"
    options: Options = field(default_factory=dict)
    max_memory: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Source and result on the same tokens in fp32.  `promised`: whether they should agree."""

    verdict: str
    promised: bool
    tokens: int
    text: str
    fp32: Distance

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What was done; `comparison` is None if none was asked for."""

    report: conversion.Report
    record: Mapping[str, Any]
    comparison: Comparison | None

    def to_json(self) -> dict[str, Any]:
        proof = self.comparison.to_json() if self.comparison else None
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
    exact: bool,
    verify_tokens: int = TOKENS,
    force: bool = False,
    verify: bool = True,
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
) -> Outcome:
    """Write, read back and compare; `record` joins surgery.json.

    Raises SurgeryError, and MismatchError where `exact` was promised and the logits differ; nothing appears then.
    """
    found: list[Comparison] = []

    def extra(result: Checkpoint) -> Mapping[str, Any]:
        ledger = Ledger()
        stream.read_through(source.parts, ledger, plan.max_memory)
        more: dict[str, Any] = {"source_digest": ledger.content_digest(), **record}
        if verify and verify_tokens:
            found.append(compare(source, replace(result, spec=plan.source.spec), exact, verify_tokens))
            more["proof"] = found[0].to_json()
        return more

    report = conversion.execute(plan, dst, force=force, verify=verify, command=command, progress=progress, prove=extra)
    return Outcome(report, record, found[0] if found else None)


def compare(source: Checkpoint, result: Checkpoint, exact: bool, count: int = TOKENS) -> Comparison:
    """Run both in fp32, layer by layer.  Raises MismatchError if they should agree and do not."""
    tokens, text = _tokens(source, count)
    wide = forward(runnable(source), tokens, "float32").logits
    got = forward(runnable(result), tokens, "float32").logits
    fp32 = distance(got, wide, tokens)
    same = fp32.max_diff <= LIMIT
    rounds = source.kind in ("bfloat16", "float16") and fp32.kl <= ROUNDING
    if exact and not same and not rounds:
        raise MismatchError(
            f"the function should be preserved, but logits differ by {fp32.max_diff:.3g} (KL {fp32.kl:.3g}) in fp32",
            hint="this is a mistake in surgery; the output was not published",
        )
    verdict = "exact" if same else "exact up to rounding" if exact else "not preserving, as asked"
    return Comparison(verdict, exact, tokens.numel(), text, fp32)


def runnable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a model of transformers, without the rows that a format pads its vocabulary with."""
    spec = checkpoint.spec
    parts = {
        name: Slice(part, 0, 0, spec.v) if name in ("embed", "lm_head") and part.shape[0] > spec.v else part
        for name, part in checkpoint.parts.items()
    }
    return replace(checkpoint, spec=spec.replace(family=choose_family(spec)), parts=parts)
