"""Do two checkpoints compute the same logits?  If not: where do they part, and which one change of B mends it?

    report = compare_logits("Llama-2-7b", "Llama-2-7b-hf")
    report.same, report.max_diff, report.first, report.causes

Both run through transformers in fp32, eagerly, on fixed tokens, one after the other; what is no Hugging Face folder
with safetensors is converted into a temporary one first.  A cause is never guessed: B is changed (one config field
from A, one layout undone, one part from A) and run again, and the change counts only if the difference shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.conversion.convert import convert
from surgery.errors import SurgeryError
from surgery.formats.base import Checkpoint, Options
from surgery.formats.registry import lenient, open_checkpoint
from surgery.running import whole as running
from surgery.running.loading import check_memory, load
from surgery.tensors import elsewhere
from surgery.tensors.files import check_unchanged
from surgery.units import human
from surgery.verification.causes import Search
from surgery.verification.report import TOLERANCE, Gap, LogitReport, Tell
from surgery.writing.scratch import scratch

if TYPE_CHECKING:
    import torch


def compare_logits(
    path_a: str | Path,
    path_b: str | Path,
    *,
    options: Options | None = None,
    max_memory: int | None = None,
    tolerance: float = TOLERANCE,
    tell: Tell | None = None,
) -> LogitReport:
    """Run two checkpoints of any formats, one after the other.  Needs 4 bytes of memory per parameter of the larger.

    options are for reading either; max_memory bounds the conversion into temporary folders; tell is called with a
    line of text before each step.  Raises SurgeryError if a side is broken, too large, or unknown to transformers.
    """
    say = tell or (lambda line: None)
    with scratch("logits") as temporary:
        sides = []
        for name, path in (("a", path_a), ("b", path_b)):
            say(f"reading {path}")
            checkpoint = open_checkpoint(path, options=lenient(path, options))
            check_memory(checkpoint.spec.parameters(), checkpoint.path)
            folder = _runnable(checkpoint, options, temporary / name, max_memory)
            sides.append((checkpoint, folder))
        (a, folder_a), (b, folder_b) = sides
        need = 4 * max(a.spec.parameters(), b.spec.parameters())
        say(f"running one after the other, which takes {human(need)} of memory, whatever --max-memory says")
        known = min(c.spec.true_vocab or c.spec.vocab for c in (a, b))
        tokens = running.fixed_tokens(known)
        say("running A")
        trace = running.run(load(folder_a), tokens)
        say("running B")
        model = load(folder_b)
        report = _report(trace, running.run(model, tokens), tokens, tolerance)
        report = replace(report, notes=tuple(_stand_in(side) for side in (a, b) if not _is_own(side)))
        check_unchanged({**a.stamps, **b.stamps})
        if report.same:
            return report
        return Search(a, b, folder_b, model, tokens, trace, tolerance, say).explain(report)


def _is_own(checkpoint: Checkpoint) -> bool:
    """Whether transformers reads the files themselves."""
    here = all(p.suffix == ".safetensors" and elsewhere.at(str(p)) is None for p in checkpoint.files)
    return checkpoint.format == "hf" and here


def _stand_in(checkpoint: Checkpoint) -> str:
    path, name = checkpoint.path, checkpoint.format
    return f"{path} ({name}) was run as the Hugging Face model that it converts to, not by a program of its format"


def _runnable(checkpoint: Checkpoint, options: Options | None, into: Path, max_memory: int | None) -> Path:
    """The checkpoint as a Hugging Face folder with safetensors: itself, or a temporary conversion."""
    if _is_own(checkpoint):
        return running.link(checkpoint.path, checkpoint.files, into)
    mine = lenient(checkpoint.path, options)
    convert(checkpoint.path, into, to="hf", from_=checkpoint.format, options=mine, max_memory=max_memory, verify=False)
    return into


def _report(a: running.Trace, b: running.Trace, tokens: torch.Tensor, tolerance: float) -> LogitReport:
    import torch

    width = min(a.logits.shape[-1], b.logits.shape[-1])
    x, y = a.logits[..., :width], b.logits[..., :width]
    if not bool(x.isfinite().all()):
        raise SurgeryError("the logits of A are not all finite", hint="surgery inspect --scan finds NaN in weights")
    relative = running.gap(x, y)
    log_x, log_y = x.double().log_softmax(-1), y.double().log_softmax(-1)
    kl = (log_x.exp() * (log_x - log_y)).sum(-1).mean().clamp_min(0)
    return LogitReport(
        same=relative <= tolerance,
        bit_equal=torch.equal(x, y),
        tokens=(tokens.shape[0], tokens.shape[1]),
        vocabulary=width,
        tolerance=tolerance,
        max_diff=running.farthest(x, y),
        relative=relative,
        kl=float(kl.nan_to_num(nan=math.inf)),
        agreement=float((x.argmax(-1) == y.argmax(-1)).double().mean()),
        first=_first(a.outputs, b.outputs, tolerance),
    )


def _first(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], tolerance: float) -> Gap | None:
    for name, far in running.gaps(a, b).items():
        if far > tolerance:
            return Gap(name, running.place(name), far)
    return None
