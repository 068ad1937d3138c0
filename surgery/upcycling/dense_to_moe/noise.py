"""Lazy tensors that are partly drawn anew, or have noise added, by the statistics of what they replace.

    redrawn(gate, 0, places, "layers.3.experts.1.gate", seed=0)     # rows `places` from N(mean, std) of these rows
    noisy(gate, 0.01, "layers.3.experts.1.gate", seed=0)            # plus 1 % of the standard deviation of all

A statistic is taken in blocks of a fixed size, so that the bits do not depend on how the result is read.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.tensors.gather import Gather
from surgery.tensors.lazy import ITEMSIZE, Box, Lazy, Shape, boxes
from surgery.tensors.random import Random

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 20


class _Changed(Lazy):
    """A tensor, the random numbers beside it, and the statistics of `told`, taken when they are first needed."""

    __slots__ = ("_lock", "_moments", "dice", "src", "told")

    def __init__(self, src: Lazy, told: Lazy, name: str, seed: int) -> None:
        self.src, self.told = src, told
        self.dice = Random(src.shape, "float64", name, seed)
        self._moments: tuple[float, float] | None = None
        self._lock = threading.Lock()  # blocks are read in several threads

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.src.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.src.shape

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src, self.told)

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of `told`."""
        with self._lock:
            if self._moments is None:
                self._moments = self._taken()
            return self._moments

    def _taken(self) -> tuple[float, float]:
        total = squares = 0.0
        for box in boxes(self.told.shape, ITEMSIZE[self.told.dtype], BLOCK):
            data = self.told.read(box).double()
            total, squares = total + float(data.sum()), squares + float(data.square().sum())
        n = max(1, math.prod(self.told.shape))
        return total / n, math.sqrt(max(0.0, squares / n - (total / n) ** 2))


class Redrawn(_Changed):
    """`src` whose slices `places` along `dim` are drawn from the normal distribution of what was there."""

    __slots__ = ("dim", "places")

    def __init__(self, src: Lazy, dim: int, places: Sequence[int], name: str, seed: int) -> None:
        super().__init__(src, Gather(src, dim, sorted(places)), name, seed)
        self.dim, self.places = dim, frozenset(places)

    def read(self, box: Box) -> torch.Tensor:
        import torch

        data = self.src.read(box)
        a, b = box[self.dim]
        mine = [i - a for i in range(a, b) if i in self.places]
        if not mine:
            return data
        mean, std = self.moments()
        drawn = (self.dice.read(box) * std + mean).to(data.dtype)
        mask = torch.zeros(b - a, dtype=torch.bool)
        mask[mine] = True
        shape = [b - a if d == self.dim else 1 for d in range(data.dim())]
        return torch.where(mask.reshape(shape), drawn, data)


class Noisy(_Changed):
    """`src` plus normal noise of `share` times its own standard deviation; added in fp64, rounded once."""

    __slots__ = ("share",)

    def __init__(self, src: Lazy, share: float, name: str, seed: int) -> None:
        super().__init__(src, src, name, seed)
        self.share = share

    def read(self, box: Box) -> torch.Tensor:
        data = self.src.read(box)
        return (data.double() + self.dice.read(box) * (self.share * self.moments()[1])).to(data.dtype)
