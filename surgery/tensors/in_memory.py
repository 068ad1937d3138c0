"""A lazy tensor that is in memory: InMemory(torch.zeros(3, 4), "bfloat16"), cast when a box of it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.tensors.lazy import Box, Lazy, Shape

if TYPE_CHECKING:
    import torch


class InMemory(Lazy):
    """`tensor`, on any device, as one of `dtype` (by default its own) on the CPU; a box is a view where that can be."""

    __slots__ = ("dtype", "tensor")

    def __init__(self, tensor: torch.Tensor, dtype: str = "") -> None:
        self.tensor, self.dtype = tensor, dtype or str(tensor.dtype).removeprefix("torch.")

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return tuple(self.tensor.shape)

    def read(self, box: Box) -> torch.Tensor:
        return self.tensor[tuple(slice(a, b) for a, b in box)].to("cpu", self.torch_dtype)
