"""Where models are run, and who is told how many bytes of weights have gone through.

on = device("cuda:1")            # cpu, cuda or cuda:N
forward(checkpoint, tokens, "float32", on).logits       # on the CPU again
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import UsageError, show

if TYPE_CHECKING:
    import torch


def nobody(_: int) -> None:
    """Takes a number of bytes, and does nothing."""


@dataclass(frozen=True)
class Device:
    """`name` as torch has it; `advance` is told the bytes of weights that were read and used."""

    name: str = "cpu"
    advance: Callable[[int], None] = nobody

    def holds(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, there and in that dtype."""
        return tensor.to(self.name, dtype)


CPU = Device()


def device(name: str, advance: Callable[[int], None] = nobody) -> Device:
    """Raises UsageError for a device that is not there."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"the device {show(name)} is unknown", hint="cpu, cuda or cuda:N")
    if name != "cpu":
        import torch

        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= there:
            hint = f"cuda:0 to cuda:{there - 1}, or cpu" if there else "cpu"
            raise UsageError(f"the device {name} is not there: torch finds {there or 'no'} CUDA devices", hint=hint)
    return Device(name, advance)
