"""Say what a checkpoint is, in a second, without loading it.

    describe(open_checkpoint("Llama-2-7b"))["parameters"]["total"]

`describe` is plain data, for `--json`; `scan` reads every weight once and counts NaN, Inf and zero rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from surgery.errors import shown
from surgery.formats.base import Checkpoint
from surgery.formats.padding import padding_notes, padding_rows
from surgery.model.fields import CHOICE, NEEDED, PART, SIZE
from surgery.model.spec import FIELDS, Spec
from surgery.tensors.files import check_unchanged, size_of
from surgery.tensors.lazy import ITEMSIZE, boxes

Json = dict[str, Any]


def describe(checkpoint: Checkpoint, *, tensors: bool = False, pickles: bool = False) -> Json:
    """Everything that names, shapes and configs say.  Sizes in bytes."""
    spec, parts = checkpoint.spec, checkpoint.parts
    kinds = Counter[str]()
    for part in parts.values():
        kinds[part.dtype] += math.prod(part.shape)
    found = checkpoint.tokenizer
    out: Json = {
        "path": shown(checkpoint.path),
        "format": checkpoint.format,
        "family": spec.family,
        "parameters": {"total": spec.parameters(), "active": spec.parameters(active=True)},
        "dtypes": dict(kinds.most_common()),
        "sizes": sizes(spec),
        "choices": choices(spec),
        "parallel": {k: v for k, v in asdict(checkpoint.topology).items() if isinstance(v, int)},
        "files": {str(p.relative_to(checkpoint.path)): size_of(p) for p in checkpoint.files},
        "bytes": sum(size_of(p) for p in checkpoint.files),
        "tokenizer": found.summary if found else None,
        "padding_rows": padding_rows(checkpoint),
        "tied": spec.tied,
        "ignored": dict(checkpoint.ignored),
        "notes": [*checkpoint.notes, *padding_notes(checkpoint)],
        "details": dict(checkpoint.details),
    }
    if tensors:
        out["parts"] = {n: {"shape": list(p.shape), "dtype": p.dtype, "bytes": p.nbytes} for n, p in parts.items()}
    if pickles:
        out["globals"] = list(checkpoint.globals)
    return out


def sizes(spec: Spec) -> Json:
    """The measures of the model, under their labels."""
    measured = {f.label: getattr(spec, n) for n, f in FIELDS.items() if f.kind in (NEEDED, SIZE)}
    named = {"attention heads": spec.heads, **measured, FIELDS["context"].label: spec.context}
    return {k: v for k, v in named.items() if v}


def choices(spec: Spec) -> Json:
    """What the function depends on besides weights and sizes, in words; what is absent is not listed."""
    out = {}
    for name, field in FIELDS.items():
        value = getattr(spec, name)
        if field.kind in (PART, CHOICE) and value and not (field.used and not field.used(spec)):
            out[field.label] = field.say(value)
    return out


def scan(checkpoint: Checkpoint, max_memory: int, progress: Callable[[int], None] | None = None) -> Json:
    """Read every weight once: how many are NaN or infinite, part by part where there are any, and the largest."""
    import torch

    bad: Json = {}
    largest = 0.0
    block = max(1 << 20, max_memory // 16)
    for name, part in checkpoint.parts.items():
        nans = infs = 0
        for box in boxes(part.shape, ITEMSIZE[part.dtype], block):
            data = part.read(box)
            values = data.float() if data.is_floating_point() else data
            nans += int(torch.isnan(values).sum())
            infs += int(torch.isinf(values).sum())
            finite = values[torch.isfinite(values)]
            largest = max(largest, float(finite.abs().max())) if finite.numel() else largest
            if progress:
                progress(data.nbytes)
        if nans or infs:
            bad[name] = {"nan": nans, "inf": infs}
    check_unchanged(checkpoint.stamps)
    return {"nan_or_inf": bad, "largest": largest}
