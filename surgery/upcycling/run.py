"""From folder to folder: open, plan, stream, read back, prove; of an upcycling and of whatever changes a mixture.

ready = prepare("SmolLM2-135M", Upcycle(experts=64, top_k=8))
ready.made.to_json(), ready.plan.bytes                  # nothing is written yet
done = carry_out(ready, "SmolLM2-moe")
done.proof.verdict, done.report.bytes
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from surgery.conversion.convert import execute, identity, plan_for, refuse_overlap
from surgery.conversion.report import Plan, Report
from surgery.errors import shown
from surgery.formats.base import Checkpoint
from surgery.formats.operations import DTYPES, to_dtype
from surgery.formats.registry import by_side, named, open_checkpoint, recognise
from surgery.running.device import Device, device
from surgery.tensors.files import check_unchanged
from surgery.tensors.fingerprint import NOTHING, Ledger
from surgery.upcycling.attention_experts import attended
from surgery.upcycling.collapse import collapsed
from surgery.upcycling.dense_to_moe.build import upcycled
from surgery.upcycling.edit_experts.choose import chosen
from surgery.upcycling.proof import Made, Proof, bytes_to_read, prove, room_of_proof
from surgery.upcycling.request import Collapse, Edit, Proven, Upcycle
from surgery.writing import stream

Path_ = str | os.PathLike[str]
Change = Callable[[Checkpoint, Device], Made]


@dataclass(frozen=True)
class Prepared:
    """What can be carried out: the opened source, what becomes of it, the plan of the files, and where models run."""

    source: Checkpoint
    made: Made
    plan: Plan
    request: Proven
    on: Device

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """All that the result is made of, as they were opened."""
        return (self.source, *self.made.models[1:])

    @property
    def bytes_to_prove(self) -> int:
        """What is told to `proving` in all: bytes read for the sources' digests, and of weights in the proof."""
        run = bytes_to_read(self.made.models[0], self.made.checkpoint) if self.request.proof_tokens else 0
        survivors = _survivors(self.made.checkpoint)
        lost = (p.nbytes for model in self.models for p in model.parts.values() if id(p) not in survivors)
        return run + sum(lost)


@dataclass(frozen=True)
class Outcome:
    """What an upcycling did; `proof` is None if none was asked for."""

    report: Report
    made: Made
    proof: Proof | None

    def to_json(self) -> dict[str, Any]:
        proof = self.proof.to_json() if self.proof else None
        return {**asdict(self.report), "upcycling": self.made.to_json(), "proof": proof}


def prepare(src: Path_, request: Upcycle, on: Device | None = None) -> Prepared:
    """Open the source and plan the output; nothing is written.  Raises SurgeryError if it cannot be done.

    `on` is where models run, now if the settings need their activations, and for the proof: by default the request's
    device.
    """
    others = [open_checkpoint(path) for path in request.sources]

    def change(source: Checkpoint, on: Device) -> Made:
        models = [source, *others]
        if request.dtype != "keep":
            models = [to_dtype(model, DTYPES[request.dtype]) for model in models]
        if request.attention_experts:
            return attended(models[0], request, on)
        return upcycled(models[0], request, models[1:], on)

    job = {"upcycling": request.to_json(), "dtype": request.dtype, "models": [identity(model) for model in others]}
    return prepare_change(src, change, request, job, on)


def prepare_edit(src: Path_, request: Edit, on: Device | None = None) -> Prepared:
    """As `prepare`, for a change of the experts."""
    wanted = request.selection
    return prepare_change(src, lambda source, on: chosen(source, wanted), request, wanted.to_json(), on)


def prepare_collapse(src: Path_, request: Collapse, on: Device | None = None) -> Prepared:
    """As `prepare`, for a mixture that becomes dense."""
    by, lossy = request.by, request.force_lossy
    return prepare_change(
        src,
        lambda source, on: collapsed(source, by, lossy, on=on, memory=request.memory),
        request,
        {"collapse": by},
        on,
    )


def prepare_change(
    src: Path_, change: Change, request: Proven, asked: Mapping[str, Any], on: Device | None = None
) -> Prepared:
    """As `prepare`, for any change; `asked` tells this job from another one."""
    target = named(request.to)
    reading, writing = by_side(request.options or {}, [recognise(src)], target)
    on = on or device(request.device)
    source = open_checkpoint(src, options=reading)
    made = change(source, on)
    if request.to == "hf" and made.family:
        writing["family"] = made.family
    job = {"change": type(request).__name__, "asked": dict(asked), "read": reading, "device": on.name}
    return Prepared(source, made, plan_for(made.checkpoint, request, options=writing, job=job), request, on)


def carry_out(
    ready: Prepared,
    dst: Path_,
    *,
    progress: stream.Progress | None = None,
    proving: stream.Progress | None = None,
) -> Outcome:
    """Write, read back and prove.

    `progress` and `proving` take the places of the request's.  Raises SurgeryError; the output appears only if
    everything was as promised.
    """
    request, found, others = ready.request, list[Proof](), ready.made.models[1:]
    told, tokens = proving or request.proving, request.proof_tokens
    if tokens:
        room_of_proof(ready.made.models[0], ready.made.checkpoint, tokens, ready.plan.max_memory)
    for other in others:
        refuse_overlap(other.path, Path(dst))

    def extra(result: Checkpoint) -> Mapping[str, Any]:
        digests = {shown(model.path): _digest(model, ready, told) for model in ready.models}
        record: dict[str, Any] = {"source_digest": digests[shown(ready.source.path)], "upcycling": ready.made.to_json()}
        if others:
            record["source_digests"] = digests
        if tokens:
            on = replace(ready.on, advance=told)
            found.append(
                prove(ready.made.models[0], result, ready.made.claim(), tokens, on, memory=ready.plan.max_memory)
            )
            record["proof"] = found[0].to_json()
        for model in ready.models:
            check_unchanged(model.stamps)
        return record

    report = execute(ready.plan, dst, progress=progress, prove=extra)
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
            ledger.counts[name] = ready.plan.ledger.counts.get(twin, NOTHING)
    stream.read_through(lost, ledger, ready.plan.max_memory, progress)
    return ledger.content_digest()
