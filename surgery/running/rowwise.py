"""Matrices that are never whole in memory: embeddings and linear layers, a block of rows at a time.

blocks = Blocks(8 << 20, torch.float32)                     # one for all matrices of a run
module.forward = looked_up(blocks.rows(weight))             # of an nn.Embedding
y = product(x, blocks.rows(weight))                         # x @ weight.T
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import UsageError
from surgery.running.device import CPU, Device
from surgery.tensors.lazy import ITEMSIZE, Box, Lazy, torch_dtype
from surgery.units import human

if TYPE_CHECKING:
    import torch

LEAST = 1 << 20  # bytes of a block: below that a run is all calls and no work
SPARE = 2  # of a block: itself, and what reading and multiplying it takes
NUMBER = 8  # bytes of a number in a block: as it is stored, at most 4 (of doubles 8), and as it is computed with


def room_within(memory: int, kept: int, what: str, else_: str = "") -> int:
    """What a block may take, in bytes, of a run that keeps so many.

    Raises UsageError, with the least that is needed and what can be done `else_`, if none is left.
    """
    left = (memory - kept) // SPARE
    if left < LEAST:
        least = human((kept + SPARE * LEAST) * 1.01)  # not less, however it is rounded
        raise UsageError(f"{what} takes at least {least} of memory, {human(memory)} are allowed",
                         hint="; ".join(filter(None, (f"--max-memory {least.replace(' ', '')}", else_))))  # fmt: skip
    return left


class Blocks:
    """Memory for a block of `room` bytes (at least a row), in which every block of a run lies in its turn.

    What malloc gives and gets back in so many sizes would make a process several times as large as its blocks.
    """

    def __init__(self, room: int, dtype: torch.dtype, on: Device = CPU) -> None:
        self.room, self.dtype, self.on = room, dtype, on
        self._stored: torch.Tensor | None = None
        self._wide: torch.Tensor | None = None

    def rows(self, weight: Lazy, stack: int | None = None) -> Rows:
        """The rows of a matrix, or of one in a stack of them."""
        shape = weight.shape[-2:]
        step = max(1, self.room // (NUMBER * max(1, math.prod(shape[1:]))))
        spans = tuple((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
        return Rows(self, weight, stack, spans)

    def read(self, weight: Lazy, box: Box, shape: tuple[int, ...]) -> torch.Tensor:
        """A box of a tensor, on the device and in the dtype; it holds until the next one is read."""
        size = math.prod(shape)
        same = torch_dtype(weight.dtype) == self.dtype
        stored = self._space("_wide" if same else "_stored", size, weight.dtype).view([b - a for a, b in box])
        weight.read_into(box, stored)
        self.on.advance(size * ITEMSIZE[weight.dtype])
        if same or self.on.name != CPU.name:
            held: torch.Tensor = self.on.holds(stored, self.dtype).view(shape)
            return held
        wide = self._space("_wide", size, str(self.dtype).removeprefix("torch.")).view(shape)
        return wide.copy_(stored.view(shape))

    def free(self) -> None:
        """Give the memory back: the modules that read into it refer to themselves, and are collected much later."""
        self._stored = self._wide = None

    def _space(self, name: str, count: int, dtype: str) -> torch.Tensor:
        import torch

        size = count * ITEMSIZE[dtype]
        space = getattr(self, name)
        if space is None or len(space) < size:
            setattr(self, name, None)  # the old one goes before there is a new one
            space = torch.empty(max(size, self.room // 2), dtype=torch.uint8)
            setattr(self, name, space)
        free: torch.Tensor = space[:size].view(torch_dtype(dtype))
        return free


@dataclass(frozen=True)
class Rows:
    """A matrix that is read in blocks; `spans` are their first rows and those behind their last."""

    blocks: Blocks
    weight: Lazy
    stack: int | None
    spans: tuple[tuple[int, int], ...]

    def __getitem__(self, span: tuple[int, int]) -> torch.Tensor:
        shape = (span[1] - span[0], self.weight.shape[-1])
        first = () if self.stack is None else ((self.stack, self.stack + 1),)
        return self.blocks.read(self.weight, (*first, span, (0, shape[1])), shape)


def product(x: torch.Tensor, rows: Rows, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times the transpose of a matrix [out, in], and the bias: [..., out]."""
    from torch.nn.functional import linear

    if len(rows.spans) == 1:
        return linear(x, rows[rows.spans[0]], bias)
    out = x.new_empty(*x.shape[:-1], rows.spans[-1][1])
    for a, b in rows.spans:
        out[..., a:b] = linear(x, rows[a, b], None if bias is None else bias[a:b])
    return out


def looked_up(rows: Rows) -> Callable[[torch.Tensor], torch.Tensor]:
    """The `forward` of an nn.Embedding: ids [...] -> [..., width]."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        import torch

        flat, found, places = ids.reshape(-1), [], []
        for a, b in rows.spans:
            block = rows[a, b]
            here = ((flat >= a) & (flat < b)).nonzero().reshape(-1)
            found.append(block[flat[here] - a])
            places.append(here)
        order = torch.cat(places).argsort()
        out: torch.Tensor = torch.cat(found)[order].unflatten(0, ids.shape)
        return out

    return forward
