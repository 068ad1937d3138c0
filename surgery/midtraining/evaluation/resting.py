"""Run a model that may be in training, leaving no trace: its modes and the random state are as before.

    with resting(model):
        logits = model(input_ids=ids, use_cache=False).logits

    ranks = Ranks(rank, world, total)           # of a model that is sharded over processes
    for batch, mine in ranks.share(batches):    # every rank runs the model as often as the others

Whatever counts tokens for training (expert loads, say) must count only where `module.training` is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Batch = TypeVar("Batch")
Advance = Callable[[int], None]


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """In eval mode and without gradients; then every module's mode and the random generators are put back."""
    import torch

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng(devices=generators()), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def generators() -> list[int]:
    """The GPUs whose random generators are in use."""
    import torch

    return [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def device_of(model: Any) -> torch.device:
    """Where the model takes its tokens."""
    found: torch.device = model.get_input_embeddings().weight.device
    return found


@dataclass(frozen=True)
class Ranks:
    """Which of `world` processes this is, and how they add up: `total` is the sum of a tensor over all of them."""

    rank: int = 0
    world: int = 1
    total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor

    def share(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        """Every `world`-th batch.  If they do not divide, some ranks get one more that is not theirs: False."""
        rounds = -(-len(batches) // self.world)
        for i in range(rounds):
            at = i * self.world + self.rank
            yield batches[min(at, len(batches) - 1)], at < len(batches)


ALONE = Ranks()
