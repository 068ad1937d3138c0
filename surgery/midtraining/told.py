"""Who is told of a run: its log, which also knows how fast it goes and what was said last.

    told = Told(log, Meter(cost, peak), tokens=0)
    told.step(metrics, times)                  # of every step; see loop.py
    told.loss, told.tokens, told.exports

Where several processes train one model, the first one tells; the others have no log.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.midtraining.log import RunLog
from surgery.midtraining.router_telemetry import alarms
from surgery.midtraining.routers import MLP
from surgery.midtraining.throughput import Meter


@dataclass
class Told:
    """`log`: None in processes that are not the first."""

    log: RunLog | None
    meter: Meter
    tokens: int = 0
    loss: float = 0.0
    at: float = field(default_factory=time.perf_counter)  # when the last step was told
    readings: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # of the routers, by the kind of mixture
    exports: list[Path] = field(default_factory=list)

    def step(self, metrics: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        elsewhere = max(0.0, now - self.at - times["seconds"])
        self.meter.add(metrics["tokens"] - self.tokens, times["seconds"], elsewhere)
        self.at, self.tokens, self.loss = now, metrics["tokens"], metrics["loss"]
        parts = {**times["parts"], "elsewhere": elsewhere}
        if self.log:
            self.log.step(metrics, {**times, **self.meter.rates(), "parts": parts})

    def event(self, step: int, level: str, text: str) -> None:
        if self.log:
            self.log.event(step, level, text)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        if self.log:
            self.log.evaluation(record)

    def experts(self, record: Mapping[str, Any]) -> None:
        if self.log:
            self.log.experts(record)

    def routing(self, step: int, kind: str, reading: Mapping[str, Any]) -> None:
        self.readings[kind] = reading
        for text in alarms(dict(reading)):
            self.event(step, "alarm", text if kind == MLP else f"{kind}, {text}")

    def sync(self) -> None:
        """Return when all that was told is on the disk."""
        if self.log:
            self.log.sync()

    def end(self, status: str, step: int, reason: str = "") -> None:
        """`status`: finished, stopped or failed."""
        if self.log:
            self.log.end(status, step, reason)
