"""Write a checkpoint that was opened, with other tensors for some of its parts: an edit is an open and a save.

model = surgery.open_checkpoint("SmolLM2-135M")
embed = model.parts["embed"][:]                     # a torch tensor, (vocabulary, width)
embed[7] = embed[8]
surgery.save_checkpoint(model, "edited", parts={"embed": embed})
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.conversion.convert import Path_, execute, plan_for
from surgery.conversion.report import Report
from surgery.conversion.request import Save
from surgery.errors import UsageError, show, some, suggest
from surgery.formats.base import Checkpoint
from surgery.settings import taking
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import ITEMSIZE, Lazy
from surgery.writing.staging import check_free


@taking(Save)
def save_checkpoint(checkpoint: Checkpoint, dst: Path_, request: Save) -> Report:
    """Write a checkpoint as `dst`, by default in the format that it was read from; `parts` are its new weights.

    surgery.save_checkpoint(model, "edited", parts={"final_norm": torch.ones(576)}, to="meta", tp=3)

    `parts` maps names of `checkpoint.parts` to tensors of the same shape: torch's, or lazy ones of any checkpoint.
    `dst` appears whole, read back and equal, or not at all.  Raises SurgeryError.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise UsageError(f"a checkpoint is saved, not {show(checkpoint)}", hint="surgery.open_checkpoint(PATH)")
    check_free(Path(dst), request.force)
    edited = with_parts(checkpoint, request.parts)
    write = replace(request, to=request.to or checkpoint.format, parts={})
    return execute(plan_for(edited, write, job={"saved": uuid.uuid4().hex}), dst)  # no run goes on with another's


def with_parts(checkpoint: Checkpoint, parts: Mapping[str, Any]) -> Checkpoint:
    """The same model with other weights.  Raises UsageError naming all that do not fit."""
    if not isinstance(parts, Mapping):
        raise UsageError(f"parts must be a mapping of names to tensors, not {show(parts)}")
    if odd := [name for name in parts if name not in checkpoint.parts]:
        raise UsageError(f"the model has no {some(odd)}", hint=suggest(odd[0], checkpoint.parts, "parts"))
    tensors = {name: _lazy(name, tensor) for name, tensor in {**checkpoint.parts, **parts}.items()}
    wrong = [f"{some([name])} is {_shape(tensors[name])}, and must be {_shape(old)}"
             for name, old in checkpoint.parts.items() if tuple(tensors[name].shape) != tuple(old.shape)]  # fmt: skip
    if wrong:
        raise UsageError("; ".join(wrong[:5]), hint="parts keep their shapes; --vocab-size of convert adds rows")
    return replace(checkpoint, parts=tensors)


def _lazy(name: str, tensor: object) -> Lazy:
    if isinstance(tensor, Lazy):
        return tensor
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{some([name])} must be a tensor of torch, not {show(tensor)}")
    found = InMemory(tensor.detach())
    if found.dtype not in ITEMSIZE:
        raise UsageError(f"{some([name])} is {found.dtype}, which no checkpoint holds")
    return found


def _shape(tensor: Lazy) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
