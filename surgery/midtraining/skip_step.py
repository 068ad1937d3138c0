"""Leave out steps whose loss or gradient is far from the last ones, or not finite; stop when too many follow another.

    spikes = Spikes(sigma=6, window=128, abort_after=10)
    reason = spikes.judge(loss=2.31, grad_norm=0.8)        # None: take the step; else why not
    spikes.state_dict()                                    # what a checkpoint keeps

As OLMo-core's SkipStepOptimizer (olmo_core/optim/skip_step_optimizer.py): a value is a spike above mean + sigma * std
of the last `window` values, once half a window of them is known; spikes count among the last values, so that a
lasting change of level is accepted.  What is not finite never counts.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from surgery.errors import SurgeryError


class Spikes:
    """The last losses and gradient norms, and how many steps in a row were left out."""

    def __init__(self, sigma: float | None = 6.0, window: int = 128, abort_after: int = 10) -> None:
        """`sigma` None: only what is not finite is left out."""
        self.sigma, self.window, self.abort_after = sigma, window, abort_after
        self.recent = {"loss": deque[float](maxlen=window), "gradient norm": deque[float](maxlen=window)}
        self.skipped, self.in_a_row = 0, 0

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why this step should be left out; None if it should not.

        Raises SurgeryError where too many in a row would be.
        """
        reasons = [r for name, x in zip(self.recent, (loss, grad_norm), strict=True) if (r := self._odd(name, x))]
        if not reasons:
            self.in_a_row = 0
            return None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.abort_after:
            raise SurgeryError(
                f"{self.in_a_row} steps in a row were left out; the last one as {reasons[0]}",
                hint="lower the learning rate, look at the data of these steps, or raise train.skip_step.abort_after",
            )
        return reasons[0]

    def _odd(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"the {name} is {value}"
        recent = self.recent[name]
        limit = math.inf
        if self.sigma is not None and len(recent) >= max(2, self.window // 2):
            limit = statistics.fmean(recent) + self.sigma * statistics.stdev(recent)
        recent.append(value)
        return f"the {name} {value:.4g} is above {limit:.4g}" if value > limit else None

    def state_dict(self) -> dict[str, Any]:
        recent = {name: list(values) for name, values in self.recent.items()}
        return {"recent": recent, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, values in self.recent.items():
            values.clear()
            values.extend(state["recent"][name])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
