"""How much arithmetic a token costs, how fast a run is, and which share of the device's peak that makes.

    cost = flops_per_token(spec, sequence=4096)         # forward and backward
    meter = Meter(cost, peak_flops("NVIDIA H100 80GB HBM3"), devices=8)
    meter.add(tokens=1 << 22, seconds=3.1)
    meter.rates()           # {"tokens_per_second": 1353001.3, ..., "tflops": 405.9, "mfu": 0.41}

Matrix products count 6 per weight that a token meets (the head, but not the embedding, which is a look-up); attention
12 * layers * heads * head_dim * S, S being the positions that a token sees on average: about half of a causal sequence.
So MFU is lower here than where all of the sequence is counted (PaLM's formula, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from surgery.model.spec import Spec

WINDOW = 32  # steps
T = 1e12
# Dense bf16 with fp32 sums, by words in the name that torch gives a device.  From the vendors' data sheets.
PEAKS: Mapping[str, float] = MappingProxyType(
    {
        "B200": 2250 * T,
        "GB200": 2500 * T,
        "H200": 989 * T,
        "GH200": 989 * T,
        "H100 NVL": 835 * T,
        "H100 PCIe": 756 * T,
        "H100": 989 * T,
        "H800": 989 * T,
        "A100": 312 * T,
        "A800": 312 * T,
        "L40S": 362 * T,
        "L4": 121 * T,
        "A10": 125 * T,
        "A40": 149.7 * T,
        "RTX 6000 Ada": 364 * T,
        "RTX 5090": 209.5 * T,
        "RTX 4090": 165.2 * T,
        "RTX 3090": 71 * T,
        "MI355X": 2500 * T,
        "MI325X": 1307.4 * T,
        "MI300X": 1307.4 * T,
        "MI250X": 191.5 * T,  # of one of its two dies, which torch takes for a device
    }
)


def peak_flops(device: str) -> float | None:
    """The peak of a device by its name, in FLOP/s at bf16; None for a CPU and for devices that are not known."""
    words = device.replace("-", " ").upper().split()
    known = sorted(PEAKS, key=lambda name: -len(name))
    return next((PEAKS[name] for name in known if _holds(words, name.upper().split())), None)


def _holds(words: list[str], wanted: list[str]) -> bool:
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def weights_met(spec: Spec) -> int:
    """Weights that a token is multiplied with: those of its experts and of the head, not the tables looked up."""
    table = spec.vocab * spec.width
    head = table if spec.tied else 0
    return spec.parameters(active=True) - table - spec.learned_positions * spec.width + head


def positions_seen(sequence: int, window: int = 0) -> float:
    """On average over a causal sequence; `window`: how many at most, 0 for all."""
    reach = min(window or sequence, sequence)
    return (reach * (reach + 1) / 2 + (sequence - reach) * reach) / sequence


def flops_per_token(spec: Spec, sequence: int) -> float:
    """FLOPs of a token in training, forward and backward."""
    windows = spec.windows or (0,) * spec.layers
    seen = sum(positions_seen(sequence, window) for window in windows)
    return 6.0 * weights_met(spec) + 12.0 * spec.heads * spec.head_dim * seen


@dataclass
class Meter:
    """Tokens and seconds of a run's steps: of the last `WINDOW`, and of all since it started or was resumed.

    `flops` of a token, `peak` FLOP/s of a device (None: not known), `devices` that share the work.
    """

    flops: float
    peak: float | None
    devices: int = 1
    last: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float, elsewhere: float = 0.0) -> None:
        """A step of all devices together, and the seconds since the last one that went elsewhere: evaluated, saved."""
        self.last.append((tokens, seconds))
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds + elsewhere

    def rates(self) -> dict[str, float | None]:
        """Tokens a second now, and on average with what went elsewhere; seconds of a step on average, also with it;
        TFLOP/s of a device now, and the share of its peak that this is."""
        now = _rate(sum(n for n, _ in self.last), sum(s for _, s in self.last))
        done = now * self.flops / self.devices
        return {
            "tokens_per_second": now,
            "tokens_per_second_mean": _rate(self.tokens, self.seconds),
            "seconds_mean": self.seconds / max(1, self.steps),
            "tflops": done / T,
            "mfu": done / self.peak if self.peak else None,
        }


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
