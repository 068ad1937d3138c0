"""Merged tensors that are still to be cast to a dtype of smaller range, and the cast, which counts what it loses.

    part = pending(merged, "float16")            # reads as fp32
    parts = settled({"embed": part}, ledger)     # reads as fp16; `numbers.remarks(ledger, parts)` names what was lost

A merge is of Hugging Face's tensors, and what is counted is of the parts that are made of them: so the cast comes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from surgery.tensors.fingerprint import SOURCE, Ledger
from surgery.tensors.lazy import Box, Lazy, cast, walk

if TYPE_CHECKING:
    import torch

RANGE = {"float64": 2, "float32": 1, "bfloat16": 1, "float16": 0}  # larger ones hold all values of smaller ones


class Pending(Lazy):
    """What it is made of, and as what it is to be stored."""

    __slots__ = ("dtype", "shape", "src", "stored")

    def __init__(self, src: Lazy, stored: str) -> None:
        self.src, self.stored, self.dtype, self.shape = src, stored, src.dtype, src.shape

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src,)

    def read(self, box: Box) -> torch.Tensor:
        return self.src.read(box)


def narrower(work: str, stored: str) -> bool:
    """Whether values of one dtype may be too large or too small for the other."""
    return RANGE[stored] < RANGE[work]


def pending(tensor: Lazy, stored: str) -> Lazy:
    """A tensor as it is to be stored; where that may lose values, it is left to `settled`."""
    return Pending(tensor, stored) if narrower(tensor.dtype, stored) else cast(tensor, stored)


def settled(parts: Mapping[str, Lazy], ledger: Ledger) -> dict[str, Lazy]:
    """The parts as they are to be stored; of those that `pending` left, both sides of the cast are counted."""
    out = dict(parts)
    for name, part in parts.items():
        for stored in {node.stored for node in walk(part) if isinstance(node, Pending)}:
            out[name] = cast(ledger.tap(SOURCE + name, part), stored)
    return out
