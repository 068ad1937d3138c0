"""What a loop asks of the processes that it runs in: who am I, what is the sum over all, what do all agree on.

    world = start("auto")                        # World(rank=0, size=1, device="cpu"); more of them under torchrun
    labels, tokens = total(world, [412.0, 512.0])
    norm = gradient_norm(world, parameters)
    name = first(world, "padded")                # what process 0 says
    worst = highest(world, 0)                    # the largest number that any of them says

With one process every answer is plain.  How a model is divided among them says `sharding.py`; gradients are sums over
the processes, for each divides its losses by what all have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from surgery.errors import SurgeryError, UsageError, reported
from surgery.running.device import device as checked
from surgery.tensors.lazy import bytes_of

PATIENCE = timedelta(hours=2)  # for the others: one may be exporting, or read weights from a slow disk


class Elsewhere(SurgeryError):
    """Another process met an error, and says more about it."""


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
    """The world of this run, which torchrun tells by the environment.  Raises UsageError for a device that is not
    there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size == 1:
        return World(device=checked(device).name)
    if ":" in device:
        raise UsageError(f"device {device}: each of {size} processes has its own", hint="device: cuda")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(checked(device).name)
    world = World(rank, size, checked(device).name)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    return world


def leave(world: World) -> None:
    """At the end of a run, when all have come to it: who leaves closes connections that another may still read."""
    if world.size > 1 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def group(world: World) -> Any:
    """All processes, by a way of their own, which a thread can use while others are busy; None for one process."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None


# ------------------------------------------------------------------------------------------------------ what all know


def total(world: World, values: Sequence[float]) -> list[float]:
    """Sums over all processes."""
    return _reduced(world, values, dist.ReduceOp.SUM) if world.size > 1 else list(values)


def highest(world: World, value: int, through: Any = None) -> int:
    """The largest that any process says."""
    return int(_reduced(world, [value], dist.ReduceOp.MAX, through)[0]) if world.size > 1 else value


def _reduced(world: World, values: Sequence[float], by: Any, through: Any = None) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, by, group=through)
    found: list[float] = tensor.tolist()
    return found


def summing(world: World) -> Callable[[torch.Tensor], torch.Tensor]:
    """What sums a tensor over all processes."""

    def summed(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
        return tensor

    return summed if world.size > 1 else lambda tensor: tensor


def everyone(world: World, value: Any, through: Any = None) -> list[Any]:
    """What each process says, in their order: anything that JSON holds."""
    if world.size == 1:
        return [value]
    text = json.dumps(value).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(text)]), group=through)
    longest = max(int(size) for size in sizes)
    said = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world.size)]
    dist.all_gather(said, torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8), group=through)
    return [json.loads(bytes(bytes_of(each))) for each in said]


def first(world: World, value: Any) -> Any:
    """What process 0 says."""
    return everyone(world, value if world.main else None)[0]


def together(world: World, work: Callable[[], Any], *, main: bool = False, through: Any = None) -> list[Any]:
    """What `work` comes to in each process (of process 0 alone, if `main`); JSON.

    What one of them raises all of them raise, so that none waits for another for ever.
    """
    found, failed = None, None
    try:
        with reported():
            found = work() if world.main or not main else None
    except SurgeryError as error:
        failed = error
    said = everyone(world, [found, failed and failed.what], through)
    if failed:
        raise failed
    if wrong := [(rank, what) for rank, (_, what) in enumerate(said) if what]:
        raise Elsewhere(f"{wrong[0][1]} (process {wrong[0][0]})")
    return [each for each, _ in said]


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Process 0 goes ahead, the others find what it has made; what it raises all of them raise."""
    if not world.main and (wrong := first(world, None)):
        raise Elsewhere(f"{wrong} (process 0)")
    try:
        with reported():
            yield
    except SurgeryError as error:
        if world.main:
            first(world, error.what)
        raise
    if world.main:
        first(world, None)


# ----------------------------------------------------------------------------------------------------------- gradients


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that is divided, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(world: World, tensor: torch.Tensor) -> int:
    """How many processes hold what this one holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return world.size
    count = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        count *= size if placement.is_replicate() else 1
    return count


def gradient_norm(world: World, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, a scalar; that of parameters that are divided, each in its own way."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world.size == 1:
        return torch.nn.utils.get_total_norm(gradients)
    by: dict[int, list[torch.Tensor]] = {}
    for gradient in gradients:
        by.setdefault(copies(world, gradient), []).append(local(gradient))
    squares = sum(float(torch.nn.utils.get_total_norm(some)) ** 2 / count for count, some in by.items())
    return torch.tensor(total(world, [squares])[0], dtype=torch.float32).sqrt()


def clip(parameters: Sequence[torch.Tensor], limit: float, norm: torch.Tensor) -> None:
    """Scale the gradients by limit / (norm + 1e-6), if that is below 1."""
    for p in parameters:  # only what lies here: the meshes of parameters may differ
        if p.grad is not None:
            local(p.grad).mul_(torch.clamp(limit / (norm.to(p.device) + 1e-6), max=1.0))


@contextmanager
def micro_batch(model: Any, last: bool) -> Iterator[None]:
    """Around the backward pass of a micro-batch: gradients need to meet only after the last one of a step."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield
