"""Upcycle from folder to folder: open, plan, stream, read back, prove.

done = upcycle("SmolLM2-135M", "SmolLM2-moe", experts=64, top_k=8)
done.proof.verdict, done.report.bytes
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import conversion, stream
from surgery.checkpoint import FORMATS, KINDS, open_checkpoint, recognise, to_kind
from surgery.dialect import ONE_RANK, Topology
from surgery.errors import UsageError, some
from surgery.fingerprint import Ledger
from surgery.formats import Checkpoint, Options
from surgery.staging import check_free
from surgery.upcycling.build import Upcycled, upcycled
from surgery.upcycling.experts import Changed
from surgery.upcycling.proof import Proof, prove
from surgery.upcycling.settings import Settings, settled

TOKENS = 256


@dataclass(frozen=True)
class Prepared:
    """An upcycling that can be carried out: the opened source, what becomes of it, and the plan of the files."""

    source: Checkpoint
    made: Upcycled | Changed
    plan: conversion.Plan


@dataclass(frozen=True)
class Outcome:
    """What an upcycling did; `proof` is None if none was asked for."""

    report: conversion.Report
    made: Upcycled | Changed
    proof: Proof | None

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        proof = self.proof.to_json() if self.proof else None
        return {**asdict(self.report), "upcycling": self.made.to_json(), "proof": proof}


def prepare(
    src: str | os.PathLike[str],
    settings: Settings,
    *,
    to: str = "hf",
    topology: Topology = ONE_RANK,
    dtype: str = "keep",
    options: Options | None = None,
    max_memory: int | None = None,
) -> Prepared:
    """Open the source and plan the output; nothing is written.  Raises SurgeryError if it cannot be done."""
    reading, writing = _options(src, to, options or {})
    source = open_checkpoint(src, options=reading)
    models = [source, *(open_checkpoint(path) for path in settings.sources)]
    if dtype != "keep":
        models = [to_kind(model, KINDS[dtype]) for model in models]
    made = upcycled(models[0], settings, models[1:])
    if to == "hf":
        writing["family"] = made.target.family
    job = {"derived": "upcycling", "upcycling": settings.to_json(), "read": reading, "dtype": dtype,
           "models": [conversion.identity(model) for model in models[1:]]}  # fmt: skip
    plan = conversion.plan_for(
        made.checkpoint, to=to, topology=topology, options=writing, max_memory=max_memory, settings=job
    )
    return Prepared(source, made, plan)


def _options(src: str | os.PathLike[str], to: str, options: Options) -> tuple[dict[str, str], dict[str, str]]:
    """The options for reading the source and for writing the output."""
    if to not in FORMATS:
        raise UsageError(f"there is no format {to!r}", hint=f"known formats: {', '.join(FORMATS)}")
    reads, writes = recognise(src).option_names("read"), FORMATS[to].option_names("write")
    if unknown := [name for name in options if name not in reads | writes]:
        raise UsageError(f"neither reading {src} nor writing {to} has an option {some(unknown)}",
                         hint="`surgery formats` lists the options of every format")  # fmt: skip
    reading = {k: v for k, v in options.items() if k in reads}
    writing = {k: v for k, v in options.items() if k in writes}
    return reading, writing


def prepare_change(
    src: str | os.PathLike[str],
    change: Callable[[Checkpoint], Changed],
    *,
    to: str = "hf",
    topology: Topology = ONE_RANK,
    options: Options | None = None,
    max_memory: int | None = None,
    asked: Mapping[str, Any] | None = None,
) -> Prepared:
    """As `prepare`, for `experts.changed_experts` and `collapse.collapsed`; `asked` tells this job from another."""
    reading, writing = _options(src, to, options or {})
    source = open_checkpoint(src, options=reading)
    made = change(source)
    job = {"derived": made.name, "asked": dict(asked or {}), "read": reading}
    plan = conversion.plan_for(
        made.checkpoint, to=to, topology=topology, options=writing, max_memory=max_memory, settings=job
    )
    return Prepared(source, made, plan)


def carry_out(
    ready: Prepared,
    dst: str | os.PathLike[str],
    *,
    verify_tokens: int = TOKENS,
    force: bool = False,
    verify: bool = True,
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
) -> Outcome:
    """Write, read back and prove.  verify_tokens 0: no proof; `verify` False: neither that nor reading back.

    Raises SurgeryError; the output appears only if everything was as promised.
    """
    found: list[Proof] = []
    others = ready.made.models[1:]
    for other in others:
        conversion.refuse_overlap(other.path, Path(dst))

    def extra(result: Checkpoint) -> Mapping[str, Any]:
        digests = {str(model.path): _digest(model, ready.plan.max_memory) for model in (ready.source, *others)}
        record: dict[str, Any] = {"source_digest": digests[str(ready.source.path)], "upcycling": ready.made.to_json()}
        if others:
            record["source_digests"] = digests
        if verify and verify_tokens:
            found.append(prove(ready.made.models[0], result, ready.made.claim(), verify_tokens))
            record["proof"] = found[0].to_json()
        return record

    report = conversion.execute(ready.plan, dst, force=force, verify=verify, command=command, progress=progress,
                                prove=extra)  # fmt: skip
    return Outcome(report, ready.made, found[0] if found else None)


def _digest(model: Checkpoint, max_memory: int) -> str:
    ledger = Ledger()
    stream.read_through(model.parts, ledger, max_memory)
    return ledger.content_digest()


def upcycle(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str = "hf",
    topology: Topology = ONE_RANK,
    dtype: str = "keep",
    options: Options | None = None,
    max_memory: int | None = None,
    force: bool = False,
    verify: bool = True,
    verify_tokens: int = TOKENS,
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
    **settings: Any,
) -> Outcome:
    """Turn a dense checkpoint into a mixture of experts; the other keywords are the fields of `Settings`.

    surgery.upcycle("SmolLM2-135M", "moe", experts=8, top_k=2, strategy="copy")

    dtype is keep, bf16, fp16 or fp32; max_memory is in bytes.  Raises SurgeryError; `dst` appears whole, read back and
    proven as promised, or not at all.
    """
    wanted = settled(settings)
    check_free(Path(dst), force)
    ready = prepare(src, wanted, to=to, topology=topology, dtype=dtype, options=options, max_memory=max_memory)
    return carry_out(ready, dst, verify_tokens=verify_tokens, force=force, verify=verify, command=command,
                     progress=progress)  # fmt: skip
