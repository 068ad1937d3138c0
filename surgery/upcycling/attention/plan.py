"""`surgery upcycle --attention-experts`: plan a folder whose attention is a mixture; writing and proof are `run`'s.

ready = prepare("SmolLM2-135M", Attention(3, 3), Proven())
run.carry_out(ready, "out").proof.verdict        # "exact"
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from surgery.conversion.report import Plan
from surgery.errors import UsageError, some
from surgery.formats.base import Checkpoint
from surgery.formats.operations import DTYPES, to_dtype
from surgery.formats.registry import open_checkpoint
from surgery.formats.table import ONE_RANK
from surgery.running.device import CPU, Device
from surgery.tensors.fingerprint import Ledger
from surgery.upcycling.attention.experts import FORMAT, Attention, check, with_attention
from surgery.upcycling.dense_to_moe.build import upcycled
from surgery.upcycling.dense_to_moe.settings import Settings
from surgery.upcycling.edit_experts.experts import Changed
from surgery.upcycling.request import Proven
from surgery.upcycling.run import Prepared

TARGET = "mixtral"  # what the modeling file can hold beside its attention


def prepare(
    src: str | os.PathLike[str],
    attention: Attention,
    request: Proven,
    settings: Settings | None = None,
    *,
    dtype: str = "keep",
    force_lossy: bool = False,
    on: Device = CPU,
) -> Prepared:
    """Open the source and plan the output; `settings` make the mlp a mixture as well.  Raises SurgeryError."""
    options = request.options or {}
    if unknown := [name for name in options if name not in FORMAT.option_names("write")]:
        raise UsageError(f"with --attention-experts there is no option {some(unknown)}")
    source = open_checkpoint(src)
    if dtype != "keep":
        source = to_dtype(source, DTYPES[dtype])
    check(source.spec, attention)
    changed = _changed(source, attention, settings, force_lossy, on)
    job = {"change": changed.name, "asked": changed.to_json()}
    return Prepared(source, changed, _plan(changed.checkpoint, request, job), request, on)


def _changed(
    source: Checkpoint, attention: Attention, settings: Settings | None, force_lossy: bool, on: Device
) -> Changed:
    base, losses = source, list(attention.losses)
    if losses and not force_lossy:
        raise UsageError(
            f"the result would compute another function: {'; '.join(losses)}",
            hint="--force-lossy allows it; the proof then says how far apart they are",
        )
    details: dict[str, Any] = {
        "attention_experts": attention.experts,
        "attention_top_k": attention.top_k,
        "attention_scale": attention.scale,
    }
    rounds = False
    if settings is not None:
        if settings.target not in ("auto", TARGET):
            raise UsageError(f"--attention-experts and --target {settings.target} do not go together",
                             hint=f"--target {TARGET}")  # fmt: skip
        if settings.sources:
            raise UsageError("--attention-experts and --source do not go together", hint="mix first, then convert that")
        made = upcycled(source, replace(settings, target=TARGET), on=on)
        base, rounds = made.checkpoint, made.layout.rounds
        losses += made.layout.losses
        details["mlp"] = made.to_json()
    return Changed(with_attention(base, attention), (source,), "attention experts", tuple(losses), details, rounds)


def _plan(made: Checkpoint, request: Proven, job: dict[str, Any]) -> Plan:
    """As `conversion.plan_for`, for a format that is none of those that can be converted."""
    ledger, options = Ledger(), dict(request.options or {})
    tapped = replace(made, parts={name: ledger.tap(name, part) for name, part in made.parts.items()})
    output = FORMAT.plan(tapped, ONE_RANK, FORMAT.with_defaults(options, "write"))
    notes = (*made.notes, *output.notes, "the folder runs code of its own: load it with trust_remote_code=True")
    return Plan(
        made, output, FORMAT, request, options, ledger, request.memory, tuple(dict.fromkeys(notes)), job, derived=True
    )
