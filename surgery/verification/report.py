"""What a comparison of logits found: how far they are apart, where they part, and what makes them.

report = compare_logits("Llama-2-7b", "Llama-2-7b-hf")
report.verdict, report.first.place, [cause.text for cause in report.causes]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from surgery.containers.text import finite

TOLERANCE = 1e-5  # of the standard deviation of A's logits: what another order of fp32 sums may cost
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Gap:
    """A module whose output differs: max |a - b| over the standard deviation of A's output."""

    module: str
    place: str
    gap: float


@dataclass(frozen=True)
class Cause:
    """A change of B that brings it nearer to A: largest difference of the logits without and with it.

    `kind` is config, layout or values; `places` are the modules that it mends.
    """

    cause: str
    kind: str
    places: tuple[str, ...]
    before: float
    after: float
    explains: bool

    @property
    def text(self) -> str:
        rest = "all of it" if self.explains else "part of it"
        return f"{self.cause}: undone, the logits differ by {self.after:.2g} instead of {self.before:.2g} ({rest})"


@dataclass(frozen=True)
class LogitReport:
    """How far the logits are apart.

    max_diff   largest |a - b|;  relative  the same over the standard deviation of A's logits
    kl         mean KL divergence of B's distribution from A's, in nats;  agreement  share of equal argmax
    first      the first module, in the order of the run, whose output differs
    alone      modules of B that differ even when they are given A's inputs: the places of the mistakes
    causes     found by experiment, in the order they were found; `tried` counts the experiments
    """

    same: bool
    bit_equal: bool
    tokens: tuple[int, int]
    vocabulary: int
    tolerance: float
    max_diff: float
    relative: float
    kl: float
    agreement: float
    first: Gap | None = None
    alone: tuple[Gap, ...] = ()
    causes: tuple[Cause, ...] = ()
    tried: int = 0
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        if self.bit_equal:
            return "the logits are equal, bit for bit"
        if self.same:
            return f"the logits are equal up to the noise of fp32 ({self.max_diff:.2g})"
        where = f", first in {self.first.place}" if self.first else ""
        if not math.isfinite(self.max_diff):
            return f"the logits of B are not all finite{where}"
        return f"the logits differ by up to {self.max_diff:.3g} ({self.relative:.2g} of their spread){where}"

    def to_json(self) -> dict[str, Any]:
        causes = [{**asdict(c), "text": c.text} for c in self.causes]
        out: dict[str, Any] = finite({"verdict": self.verdict, **asdict(self), "causes": causes})
        return out
