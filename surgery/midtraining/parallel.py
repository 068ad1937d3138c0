"""What a loop asks of the processes that it runs in: who am I, what is the sum over all, how large is the gradient.

    world = start("auto")                        # World(rank=0, size=1, device="cpu")
    labels, tokens = total(world, [412.0, 512.0])
    norm = gradient_norm(parameters)

With one process every answer is plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from surgery.running.device import device as checked


@dataclass(frozen=True)
class World:
    """The processes of a run: which one this is, how many there are, and where it computes."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Does this process speak and write for all?"""
        return self.rank == 0


def start(device: str) -> World:
    """The world of this run.  Raises UsageError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return World(device=checked(device).name)


def total(world: World, values: Sequence[float]) -> list[float]:
    """Sums over all processes."""
    assert world.size == 1
    return list(values)


def summing(world: World) -> Callable[[torch.Tensor], torch.Tensor]:
    """What sums a tensor over all processes."""
    assert world.size == 1
    return lambda tensor: tensor


def gradient_norm(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together; a scalar on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip(parameters: Sequence[torch.Tensor], limit: float, norm: torch.Tensor) -> None:
    """Scale the gradients by limit / (norm + 1e-6), if that is below 1."""
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


@contextmanager
def micro_batch(model: Any, last: bool) -> Iterator[None]:
    """Around the backward pass of a micro-batch: gradients need to meet only after the last one of a step."""
    yield
