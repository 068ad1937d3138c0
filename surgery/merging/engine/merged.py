"""Merged tensors: lazy, computed block by block from the same blocks of their sources, in as many threads as wanted.

    inputs = Inputs("model.norm.weight", [a, b, base], 2, "float32", 0, Engine(threads=2))
    merged = Merged(METHODS["ties"].run, inputs, {"lambda": 1.0, ...}, "bfloat16")
    merged.read(((0, 64), (0, 2048)))        # 64 rows of the merge; only these rows of the sources are read ...

... but for what the method must know of the whole tensor first, such as norms or thresholds: it asks for them by
`Inputs.scan`, which streams the sources in chunks, and keeps these for the merge if there is room.  The result is the
same bits whatever the block size, the memory and the number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.errors import SurgeryError
from surgery.merging.engine.inputs import Again, Inputs, spanned
from surgery.merging.engine.ready import Options, Ready, Run
from surgery.tensors.lazy import Box, Lazy, Shape, empty, lengths, torch_dtype, whole

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 18  # elements of a block of a result
LARGE_BLOCK = 1 << 20  # the same for compiled loops, which take it in strips
FUSED = ("bfloat16", "float32")  # what compiled loops write


class Merged(Lazy):
    """One tensor of a merge."""

    __slots__ = ("dtype", "engine", "inputs", "options", "run", "shape")

    def __init__(self, run: Run, inputs: Inputs, options: Options, dtype: str) -> None:
        self.run, self.inputs, self.options, self.engine = run, inputs, options, inputs.engine
        self.dtype, self.shape = dtype, inputs.shape

    def sources(self) -> tuple[Lazy, ...]:
        return tuple(self.inputs.sources)

    def _ready(self) -> Ready:
        try:
            return self.run(self.inputs, self.options)
        except SurgeryError as error:
            error.what = f"{self.inputs.name}: {error.what}"
            raise

    def read(self, box: Box) -> torch.Tensor:
        out = empty(lengths(box), self.dtype)
        if not out.numel():
            return out
        ready = self.engine.known(self, self._ready)
        fused = ready.fused and self.inputs.loops and self.dtype in FUSED
        per_element = (4 if fused else 16) * (len(self.inputs.sources) + 2) * self.engine.threads
        limit = max(1 << 12, min(LARGE_BLOCK if fused else BLOCK, self.engine.memory // 4 // per_element))
        if fused:
            self._fuse(ready, box, limit, out)
        else:
            self._apply(ready, box, limit, out)
        return out

    def _apply(self, ready: Ready, box: Box, limit: int, out: torch.Tensor) -> None:
        """Compute a box by torch, in blocks that hold the dimensions whole which the method needs."""
        for part in spanned(box, ready.span, limit):
            wide = widen(part, self.shape, ready.span)
            made = ready.apply(self.inputs.block(wide, Again.NO))
            inner = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, wide, strict=True))
            target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, box, strict=True))
            out[target] = made[inner]

    def _fuse(self, ready: Ready, box: Box, limit: int, out: torch.Tensor) -> None:
        """Compute a box in compiled loops; parts of it that hold no dimension whole follow each other in memory."""
        assert ready.fused
        bits, at = out.reshape(-1).view(torch_dtype(f"uint{8 * out.itemsize}")).numpy(), 0
        for part in spanned(box, 0, limit):
            block = self.inputs.block(part, Again.NO)
            ready.fused(block, bits[at : at + block.numel])
            at += block.numel


def widen(box: Box, shape: Shape, span: int) -> Box:
    """The box with its last `span` dimensions whole."""
    keep = max(0, len(shape) - span)
    return (*box[:keep], *whole(shape)[keep:])
