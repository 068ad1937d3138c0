"""Learning rates by step: a warm-up, a constant part, a decay; each phase counts from its own start.

    schedule = Schedule(peak=3e-4, steps=1000, warmup=50, decay=950, shape="linear", final=0.0)
    schedule(1), schedule(1000)         # 6e-06, 3.2e-07: the rates of the first and of the last step

Trainers count differently, which two numbers say.  `count_warmup_from` and `count_decay_from` are the number t that the
first step has in the warm-up (the rate is peak * t / warmup) and in the decay (it has come (t - warmup) / decay far):

    1, 0    ours: no step has a rate of 0
    1, 1    OLMo and OLMo-core (olmo_core/optim/scheduler.py): the last step of a decay to 0 has rate 0
    0, 0    transformers (optimization.py) and Megatron (core/optimizer_param_scheduler.py): so has the first one

`offset` is a step counter that was loaded with a checkpoint, as Megatron's is.  A phase of ours has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# How much of the way from the peak to the final rate is left, x of the decay being done.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1 - math.sqrt(x),
    "exponential": lambda x: 2 * 0.5**x - 1,
}
INVERSE_SQRT = "inverse_sqrt"  # of the steps done, instead of a decay to the end


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step, counted from 1.

    steps    until the end of the decay; a run may stop before it
    warmup   steps in which the rate rises from `start` to `peak`
    decay    steps at the end in which it goes from `peak` to `final`; 0: it stays
    shape    a name of `SHAPES`, or `INVERSE_SQRT`: peak * sqrt(warmup / t), not below `final`
    """

    peak: float
    steps: int
    warmup: int = 0
    start: float = 0.0
    decay: int = 0
    shape: str = "linear"
    final: float = 0.0
    count_warmup_from: int = 1
    count_decay_from: int = 0
    offset: int = 0

    def __call__(self, step: int) -> float:
        """The rate of a step, counted from 1."""
        t = self.offset + step - 1 + self.count_warmup_from
        if self.warmup and t <= self.warmup:
            return self.start + (self.peak - self.start) * t / self.warmup
        t = self.offset + step - 1 + self.count_decay_from
        if self.shape == INVERSE_SQRT:
            slow = self.peak * math.sqrt(max(self.warmup, 1) / max(t, 1))
            return max(self.final, slow) if t <= self.steps else self.final
        if not self.decay or t <= self.steps - self.decay:
            return self.peak
        x = (t - (self.steps - self.decay)) / self.decay
        return self.final + (self.peak - self.final) * SHAPES[self.shape](x) if x < 1 else self.final

    @property
    def ended(self) -> bool:
        """Does a loaded counter stand at the end of a phase that decays, so that the rate will not change any more?"""
        return bool(self.offset) and self.offset >= self.steps and (self.decay > 0 or self.shape == INVERSE_SQRT)

    def idle(self, steps: int) -> list[int]:
        """Which of a run's first `steps` would change nothing, as their rate is 0."""
        return [step for step in range(1, steps + 1) if self(step) == 0]
