"""The live panel of a run in a terminal: loss, learning rate, speed, time left, routers, evaluations, alarms.

    log = RunLog("runs/anneal", [Panel("anneal", steps=1600)])

It stands below whatever is printed meanwhile; evaluations and events are also left above it as lines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel as Box
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from surgery.errors import printable
from surgery.midtraining.log import Record, flat, remaining

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 240  # losses that are kept for the small curve
SHOWN = 40  # columns of it
EVENTS = 3
PER_SECOND = 4  # redraws


class Panel:
    """A view of the run for a terminal."""

    def __init__(self, name: str, steps: int | None, console: Console | None = None) -> None:
        self.name, self.steps = name, steps
        self.metrics: Record = {}
        self.times: Record = {}
        self.evaluated: Record = {}
        self.losses: deque[float] = deque(maxlen=CURVE)
        self.events: deque[Record] = deque(maxlen=EVENTS)
        self.live = Live(get_renderable=self.draw, console=console, refresh_per_second=PER_SECOND)
        self.live.start()

    def step(self, metrics: Record, times: Record) -> None:
        self.metrics, self.times = metrics, times
        if isinstance(metrics.get("loss"), float):
            self.losses.append(metrics["loss"])

    def evaluation(self, record: Record) -> None:
        self.evaluated = record
        self.live.console.print(Text(f"step {record['step']}: {evaluated(record)}"), highlight=False)

    def event(self, record: Record) -> None:
        self.events.append(record)

    def close(self) -> None:
        self.live.stop()

    def draw(self) -> RenderableType:
        """The panel as it stands."""
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(style="dim", no_wrap=True, width=7)
        grid.add_column(ratio=1)
        for title, content in self._rows():
            grid.add_row(title, content)
        return Box(grid, title=Text(printable(self.name)), title_align="left", border_style="dim")

    def _rows(self) -> Iterable[tuple[str, RenderableType]]:
        step = self.metrics.get("step", 0)
        yield "step", _progress(step, self.steps, remaining(step, self.steps, self.times))
        yield "loss", Group(Text(_join(_losses(self.metrics))), Text(sparkline(self.losses, SHOWN), style="cyan"))
        if self.times:
            yield "speed", Text(_join(_speed(self.times)))
        for title, key in (("router", "router"), ("heads", "attention_router")):
            if isinstance(router := self.metrics.get(key), Mapping):
                yield title, Text(_join(_router(router)))
        if self.evaluated:
            yield "eval", Text(f"at {self.evaluated['step']}: {evaluated(self.evaluated)}")
        for event in self.events:
            yield event["level"], Text(f"step {event['step']}: {printable(event['text'])}", style=_style(event))


def _progress(step: int, steps: int | None, left: float | None) -> RenderableType:
    if not steps:
        return Text(f"{step:,}")
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    told = "" if left is None else f"{clock(left)} left"
    row.add_row(f"{step:,} of {steps:,}", ProgressBar(steps, step), f"{step / steps:.0%}  {told}")
    return row


def _losses(metrics: Record) -> Iterable[str | None]:
    yield _number(metrics.get("loss"), "{:.4f}")
    yield _number(metrics.get("lr"), "lr {:.3e}")
    yield _number(metrics.get("grad_norm"), "gradient {:.3f}")
    yield _number(metrics.get("tokens"), "{:,} tokens")


def _speed(times: Record) -> Iterable[str | None]:
    yield _number(times.get("tokens_per_second"), "{:,.0f} tokens/s")
    yield _number(times.get("tokens_per_second_mean"), "{:,.0f} on average")
    mfu, tflops = times.get("mfu"), times.get("tflops")
    yield _number(mfu, "{:.0%} MFU") if mfu else flops(tflops)
    parts, whole = times.get("parts"), times.get("seconds")
    if isinstance(parts, Mapping) and whole:
        yield "  ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts.items() if seconds / whole >= 0.005)


def _router(router: Mapping[str, Any]) -> Iterable[str | None]:
    yield _number(router.get("max_load"), "busiest expert {:.2f} x its share")
    yield _number(router.get("load_entropy"), "entropy of the load {:.3f}")
    yield _number(router.get("dead"), "{:.0%} dead")


def evaluated(record: Record) -> str:
    """An evaluation in one line: the loss of every domain, the accuracy (or bits per byte) of every task; then those of
    running means."""
    means = [f"{name}: {evaluated(found)}" for name, found in (record.get("averages") or {}).items()]
    heldout = {name: flat(found).get("loss") for name, found in (record.get("heldout") or {}).items()}
    tasks = {name.partition("/")[0]: _main(found) for name, found in (record.get("tasks") or {}).items()}
    told = {printable(name): _number(value, "{:.3f}") for name, value in {**heldout, **tasks}.items()}
    return _join((*(f"{name} {value}" for name, value in told.items() if value), *means))


def _main(found: Record) -> Any:
    return found.get("acc_norm", found.get("bpb"))


def flops(tflops: Any) -> str | None:
    """ "12.3 GFLOP/s"; None for what is no number."""
    if not isinstance(tflops, (int, float)):
        return None
    return f"{tflops:,.1f} TFLOP/s" if tflops >= 1 else f"{tflops * 1000:,.1f} GFLOP/s"


def sparkline(values: Iterable[float], width: int) -> str:
    """The means of `width` pieces of the values, as blocks from the least to the largest."""
    values = list(values)
    each = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for i in range(0, len(values), each) if (part := values[i : i + each])]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((x - low) * scale)] for x in means)


def clock(seconds: float) -> str:
    """ "2:05", "1:02:05", "3 d 4 h"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: Any, form: str) -> str | None:
    return form.format(value) if isinstance(value, (int, float)) else None


def _join(words: Iterable[str | None]) -> str:
    return "   ".join(word for word in words if word)


def _style(event: Record) -> str:
    return "bold red" if event["level"] == "alarm" else ""
