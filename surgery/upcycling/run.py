"""From folder to folder: open, plan, stream, read back, prove; of an upcycling and of whatever changes a mixture.

ready = prepare("SmolLM2-135M", Settings(experts=64, top_k=8))
ready.made.layout.losses, ready.plan.bytes              # nothing is written yet
done = carry_out(ready, "SmolLM2-moe")
done.proof.verdict, done.report.bytes
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.conversion import convert as conversion
from surgery.errors import UsageError, some
from surgery.formats.base import Checkpoint, Options
from surgery.formats.operations import DTYPES, to_dtype
from surgery.formats.registry import FORMATS, open_checkpoint, recognise
from surgery.formats.table import ONE_RANK, Topology
from surgery.running.device import CPU, Device, nobody
from surgery.tensors.fingerprint import Ledger
from surgery.upcycling.dense_to_moe.build import Upcycled, upcycled
from surgery.upcycling.dense_to_moe.settings import Settings
from surgery.upcycling.edit_experts.experts import Changed
from surgery.upcycling.proof import Proof, bytes_to_read, check_tokens, prove
from surgery.writing import stream

TOKENS = 256


@dataclass(frozen=True)
class Prepared:
    """What can be carried out: the opened source, what becomes of it, the plan of the files, and where models run."""

    source: Checkpoint
    made: Upcycled | Changed
    plan: conversion.Plan
    on: Device = CPU

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """All that the result is made of, as they were opened."""
        return (self.source, *self.made.models[1:])

    def bytes_to_write(self, verify: bool = True) -> int:
        """What `carry_out` tells `progress` in all: bytes written, and read back."""
        read = sum(part.nbytes for part in self.plan.source.parts.values()) if verify else 0
        return self.plan.bytes + read

    def bytes_to_prove(self, verify_tokens: int) -> int:
        """What it tells `proving`: bytes that are read for the sources' digests, and of weights in the proof."""
        run = bytes_to_read(self.made.models[0], self.made.checkpoint) if verify_tokens else 0
        survivors = _survivors(self.made.checkpoint)
        lost = (p.nbytes for model in self.models for p in model.parts.values() if id(p) not in survivors)
        return run + sum(lost)


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
    on: Device = CPU,
) -> Prepared:
    """Open the source and plan the output; nothing is written.  Raises SurgeryError if it cannot be done.

    `on` is where models run: now if the settings need their activations, and for the proof.
    """
    reading, writing = _options(src, to, options or {})
    source = open_checkpoint(src, options=reading)
    models = [source, *(open_checkpoint(path) for path in settings.sources)]
    if dtype != "keep":
        models = [to_dtype(model, DTYPES[dtype]) for model in models]
    made = upcycled(models[0], settings, models[1:], on)
    if to == "hf":
        writing["family"] = made.target.family
    job = {"derived": "upcycling", "upcycling": settings.to_json(), "read": reading, "dtype": dtype,
           "device": on.name, "models": [conversion.identity(model) for model in models[1:]]}  # fmt: skip
    plan = conversion.plan_for(
        made.checkpoint, to=to, topology=topology, options=writing, max_memory=max_memory, settings=job
    )
    return Prepared(source, made, plan, on)


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
    on: Device = CPU,
) -> Prepared:
    """As `prepare`, for `selection.chosen` and `collapse.collapsed`; `asked` tells this job from another."""
    reading, writing = _options(src, to, options or {})
    source = open_checkpoint(src, options=reading)
    made = change(source)
    job = {"derived": made.name, "asked": dict(asked or {}), "read": reading, "device": on.name}
    plan = conversion.plan_for(
        made.checkpoint, to=to, topology=topology, options=writing, max_memory=max_memory, settings=job
    )
    return Prepared(source, made, plan, on)


def carry_out(
    ready: Prepared,
    dst: str | os.PathLike[str],
    *,
    verify_tokens: int = TOKENS,
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
    proving: stream.Progress = nobody,
) -> Outcome:
    """Write, read back and prove.  verify_tokens 0: no proof; `verify` False: neither that nor reading back.

    `progress` is told every number of bytes that was written or read back, `proving` those of the proof.
    Raises SurgeryError; the output appears only if everything was as promised.
    """
    if verify and verify_tokens:
        check_tokens(ready.source.spec, verify_tokens)
    found: list[Proof] = []
    others = ready.made.models[1:]
    for other in others:
        conversion.refuse_overlap(other.path, Path(dst))

    def extra(result: Checkpoint) -> Mapping[str, Any]:
        digests = {str(model.path): _digest(model, ready, proving) for model in ready.models}
        record: dict[str, Any] = {"source_digest": digests[str(ready.source.path)], "upcycling": ready.made.to_json()}
        if others:
            record["source_digests"] = digests
        if verify and verify_tokens:
            on = replace(ready.on, advance=proving)
            found.append(prove(ready.made.models[0], result, ready.made.claim(), verify_tokens, on))
            record["proof"] = found[0].to_json()
        return record

    report = conversion.execute(ready.plan, dst, force=force, verify=verify, sync=sync, command=command,
                                progress=progress, prove=extra)  # fmt: skip
    return Outcome(report, ready.made, found[0] if found else None)


def _survivors(made: Checkpoint) -> dict[int, str]:
    """By the identity of a lazy tensor, the part of the result that it is."""
    return {id(part): name for name, part in made.parts.items()}


def _digest(model: Checkpoint, ready: Prepared, progress: stream.Progress) -> str:
    """A source's content digest: of parts that are parts of the result as well, what was counted when those were
    written; the others are read."""
    ledger, survivors, lost = Ledger(), _survivors(ready.made.checkpoint), {}
    for name, part in model.parts.items():
        twin = survivors.get(id(part))
        if twin is None:
            lost[name] = part
        else:
            ledger.parts[name] = (part.dtype, part.shape)
            ledger.counts[name] = ready.plan.ledger.counts.get(twin, (0, 0))
    stream.read_through(lost, ledger, ready.plan.max_memory, progress)
    return ledger.content_digest()
