"""Do two checkpoints compute the same logits?  If not: where do they part, and which one change of B mends it?

    report = compare_logits("Llama-2-7b", "Llama-2-7b-hf")
    report.same, report.max_diff, report.first, report.causes

Both run through transformers in fp32, eagerly, on fixed tokens, one after the other, as large as the memory allows.
Whole: what is no Hugging Face folder with safetensors is converted into a temporary one first, and a cause is never
guessed: B is changed (one config field from A, one layout undone, one part from A) and run again, and the change counts
only if the difference shrinks.  Streamed (`streamed.py`) where that is too much: the same answer, without causes.
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
from surgery.running.loading import bytes_of_a_model, load
from surgery.tensors import elsewhere
from surgery.tensors.files import check_unchanged
from surgery.tensors.memory import free_memory
from surgery.units import human
from surgery.verification import streamed as stream
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
    """Run two checkpoints of any formats, one after the other: whole if that fits, else a block of rows at a time.

    options are for reading either; max_memory are bytes, by default those that are free; tell is called with a line of
    text before each step.  Raises SurgeryError if a side is broken, unknown to transformers, or the least that a
    comparison takes is more than max_memory.
    """
    say = tell or (lambda line: None)
    sides = []
    for path in (path_a, path_b):
        say(f"reading {path}")
        sides.append(open_checkpoint(path, options=lenient(path, options)))
    a, b = sides
    tokens = running.fixed_tokens(min(c.spec.true_vocab or c.spec.vocab for c in (a, b)))
    whole = bytes_of_a_model(max(a.spec.parameters(), b.spec.parameters()))
    memory = min([m for m in (max_memory, free_memory()) if m is not None], default=None)
    if memory is not None and whole > memory:
        say(f"running one after the other, streamed: whole models take {human(whole)}, {human(memory)} are allowed")
        report = _streamed(a, b, tokens, tolerance, memory, say)
        if not report.same:
            note = f"no cause was looked for: that takes {human(whole)} of memory (--max-memory)"
            report = replace(report, notes=(note, *report.notes))
    else:
        say(f"running one after the other, which takes {human(whole)} of memory")
        report = _whole(a, b, options, tokens, tolerance, memory, say)
    check_unchanged({**a.stamps, **b.stamps})
    return report


def _whole(
    a: Checkpoint, b: Checkpoint, options: Options | None, tokens: torch.Tensor, tolerance: float, memory: int | None,
    say: Tell,
) -> LogitReport:  # fmt: skip
    with scratch("logits") as temporary:
        folder_a, folder_b = (_runnable(c, options, temporary / name, memory) for c, name in ((a, "a"), (b, "b")))
        say("running A")
        trace = running.run(load(folder_a), tokens)
        say("running B")
        model = load(folder_b)
        report = _report(trace, running.run(model, tokens), tokens, tolerance)
        report = replace(report, notes=_stand_ins(a, b))
        if report.same:
            return report
        return Search(a, b, folder_b, model, tokens, trace, tolerance, say).explain(report)


def _streamed(
    a: Checkpoint, b: Checkpoint, tokens: torch.Tensor, tolerance: float, memory: int, say: Tell
) -> LogitReport:
    models = [stream.prepared(c, is_own(c)) for c in (a, b)]
    room = stream.room(models, tokens, memory)
    say("running A")
    first = models[0].run(tokens, room)
    say("running B")
    report = _report(first, models[1].run(tokens, room), tokens, tolerance)
    return replace(report, notes=_stand_ins(a, b))


def _stand_ins(*sides: Checkpoint) -> tuple[str, ...]:
    return tuple(_stand_in(side) for side in sides if not is_own(side))


def is_own(checkpoint: Checkpoint) -> bool:
    """Whether transformers reads the files themselves."""
    here = all(p.suffix == ".safetensors" and elsewhere.at(str(p)) is None for p in checkpoint.files)
    return checkpoint.format == "hf" and here


def _stand_in(checkpoint: Checkpoint) -> str:
    path, name = checkpoint.path, checkpoint.format
    return f"{path} ({name}) was run as the Hugging Face model that it converts to, not by a program of its format"


def _runnable(checkpoint: Checkpoint, options: Options | None, into: Path, max_memory: int | None) -> Path:
    """The checkpoint as a Hugging Face folder with safetensors: itself, or a temporary conversion."""
    if is_own(checkpoint):
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
    kl = torch.cat([_kl(p, q) for p, q in zip(x.flatten(0, 1).split(8), y.flatten(0, 1).split(8), strict=True)]).mean()
    return LogitReport(
        same=relative <= tolerance,
        bit_equal=torch.equal(x, y),
        tokens=(tokens.shape[0], tokens.shape[1]),
        vocabulary=width,
        tolerance=tolerance,
        max_diff=running.farthest(x, y),
        relative=relative,
        kl=float(kl.clamp_min(0).nan_to_num(nan=math.inf)),
        agreement=float((x.argmax(-1) == y.argmax(-1)).double().mean()),
        first=_first(a.outputs, b.outputs, tolerance),
    )


def _kl(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of each token, in double precision; of a few, for it takes several times the logits."""
    log_x, log_y = x.double().log_softmax(-1), y.double().log_softmax(-1)
    return (log_x.exp() * (log_x - log_y)).sum(-1)


def _first(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], tolerance: float) -> Gap | None:
    for name, far in running.gaps(a, b).items():
        if far > tolerance:
            return Gap(name, running.place(name), far)
    return None
