"""Running means of the weights, kept beside them: of the last points of a run, and one that forgets (EMA).

    averages = Averages(job.run.average, job.weights(), steps=1600)
    averages.add(step, job.weights())              # after every step
    averages.weights("last"), averages.weights("ema")
    with standing_in(job.model, averages.weights("ema")):
        loss = heldout_loss(job.model, domains)

They are fp32, divided among processes as the weights are, and part of the state that a checkpoint keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from surgery.midtraining.model import weights_now
from surgery.midtraining.parallel import local
from surgery.midtraining.settings import Average
from surgery.midtraining.sharding import at_rest

Weights = Mapping[str, torch.Tensor]


class Averages:
    """The means that are wanted, by name, and how many points each has seen."""

    def __init__(self, wanted: Average, weights: Weights, steps: int) -> None:
        self.wanted, self.steps = wanted, steps
        self.points = {name: 0 for name in ("last", "ema") if getattr(wanted, name)}
        self.means = {
            name: {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()} for name in self.points
        }

    @torch.no_grad()
    def add(self, step: int, weights: Weights) -> None:
        """Count the weights after this step, if it is a point: the last step is one, and every so many before it."""
        before, odd = divmod(self.steps - step, self.wanted.every)
        if odd:
            return
        for name in self.points:
            if name == "ema" or before < (self.wanted.last or 0):
                self._count(name, weights)

    def _count(self, name: str, weights: Weights) -> None:
        self.points[name] += 1
        share = 1 / self.points[name] if name == "last" or self.points[name] == 1 else 1 - (self.wanted.ema or 0.0)
        for key, mean in self.means[name].items():
            local(mean).lerp_(local(weights[key]).float(), share)

    def seen(self) -> dict[str, dict[str, torch.Tensor]]:
        """The means that have a point."""
        return {name: self.means[name] for name, points in self.points.items() if points}

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """A mean; its keys are the weights'."""
        return self.means[name]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {f"{name}.{key}": mean for name, means in self.means.items() for key, mean in means.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"points": dict(self.points)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.points.update(state["points"])


@contextmanager
def standing_in(model: Any, mean: Weights) -> Iterator[None]:
    """The model with a mean in the place of its weights, which are kept aside and then put back, bit for bit."""
    held = weights_now(model, {})
    kept = {name: local(tensor).clone() for name, tensor in held.items()}
    _put(held, mean)
    try:
        yield
    finally:
        at_rest(model)
        _put(held, kept)


@torch.no_grad()
def _put(held: Weights, weights: Weights) -> None:
    for name, tensor in held.items():
        local(tensor).copy_(local(weights[name]))
