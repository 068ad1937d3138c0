"""A lazy tensor that is in memory: Held(torch.zeros(3, 4), "bfloat16"), cast when a box of it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.tensors.lazy import Box, Lazy

if TYPE_CHECKING:
    import torch


class Held(Lazy):
    """`data`, on any device, as a tensor of `dtype` on the CPU."""

    __slots__ = ("data", "dtype")

    def __init__(self, data: torch.Tensor, dtype: str) -> None:
        self.data, self.dtype = data, dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.data.shape)

    def read(self, box: Box) -> torch.Tensor:
        return self.data[tuple(slice(a, b) for a, b in box)].to("cpu", self.torch_dtype)
