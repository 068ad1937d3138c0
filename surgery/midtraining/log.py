"""What a run says of itself: files of lines that are always written, and whoever looks on.

    log = RunLog("runs/anneal", [Lines(print, every=10)], meter=Meter(cost, peak))
    log = RunLog("runs/anneal", [...], resumed=500)                 # what came later is cut off
    log.step({"step": 501, "tokens": 2_052_096, "loss": 3.45, "lr": 2.4e-4, "grad_norm": 0.8}, {"seconds": 0.31})
    log.evaluation({"step": 501, "heldout": {"math": {"loss": 3.52}}})
    log.event(502, "alarm", "layer 3: an expert got 5.1 times its share")
    log.sync()                                  # before a checkpoint: all lines are on the disk
    log.end("finished", 502)

`run_folder.py` says what the records hold.  Before a checkpoint of a step is published, everything of that step must
have been logged and synced; then a run that is resumed there has neither a gap nor a line twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import FileError, OutputError, printable
from surgery.midtraining import run_folder
from surgery.midtraining.run_folder import parse_line
from surgery.midtraining.throughput import Meter
from surgery.writing.atomic import atomic_file

Record = Mapping[str, Any]
SHOWN = ("step", "tokens", "loss", "balance", "lr", "grad_norm", "skipped", "router/max_load", "router/dead",
         "attention_router/max_load", "rewards/margin", "rewards/accuracy", "tokens_per_second", "mfu", "seconds",
         "eta")  # fmt: skip
EVALUATED = ("loss", "bpb", "acc", "acc_norm", "exact")


class View(Protocol):
    """Someone who looks on: a terminal, TensorBoard, Weights & Biases."""

    def step(self, metrics: Record, times: Record) -> None: ...
    def evaluation(self, record: Record) -> None: ...
    def event(self, record: Record) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """A file of JSON objects by rising `step`, one a line; each is handed to the system at once."""

    def __init__(self, path: Path, upto: int = -1) -> None:
        """Goes on behind the last line of step `upto`; later ones are cut off.  Raises FileError if a line of an
        earlier step is damaged."""
        self.path = path
        self.last, size = _kept(path, upto)  # the record behind which it goes on
        self.file = path.open("ab")
        self.file.truncate(size)

    def write(self, record: Record) -> None:
        """Raises OutputError if the disk is full."""
        line = json.dumps(plain(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", file=self.path) from None
        self.last = record

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _kept(path: Path, upto: int) -> tuple[Record, int]:
    """The last record up to step `upto` of a file, {} if there is none; and the bytes up to its end."""
    last: Record = {}
    size, number = 0, 0
    if not path.exists():
        return last, size
    with path.open("rb") as file:
        for line in file:
            number += 1
            record = parse_line(line) if line.endswith(b"\n") else None
            step = record.get("step") if record else None
            if type(step) is not int:
                rest = file.read(1)
                if not rest:
                    break
                hint = f"mend the line, or move {path.name} away"
                raise FileError(f"line {number} is damaged, though others follow", file=path, hint=hint)
            if record is None or step > upto:
                break
            last, size = record, size + len(line)
    return last, size


def plain(value: Any) -> Any:
    """As JSON holds it: scalars and arrays of NumPy and torch as numbers and lists, "nan" and "inf" as texts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value


class RunLog:
    """The files of lines of a run, and its views; a `meter` adds speed to the times."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        views: Sequence[View] = (),
        resumed: int | None = None,
        meter: Meter | None = None,
    ) -> None:
        """`resumed`: the step of the checkpoint that the run goes on from.  Raises FileError for a damaged file."""
        self.folder, self.views, self.meter = Path(folder), tuple(views), meter
        self.folder.mkdir(parents=True, exist_ok=True)
        upto = -1 if resumed is None else resumed
        self.files = {name: JsonLines(self.folder / name, upto) for name in run_folder.LINES}
        (self.folder / run_folder.END).unlink(missing_ok=True)
        self.last = last = self.files[run_folder.METRICS].last  # step that is told already
        self.tokens: int = last.get("tokens", 0)
        self.told: float | None = None  # when the last step was
        if resumed is not None and last.get("step", -1) < resumed:
            lost = f"metrics.jsonl ends with step {last['step']}" if last else "metrics.jsonl is gone"
            self.event(resumed, "alarm", f"resumed from step {resumed}, but {lost}")

    def step(self, metrics: Record, times: Record) -> None:
        """`metrics`, with `step`, are what the run would say again; `times` are what the clock says."""
        times = self._timed(metrics, times)
        self.files[run_folder.METRICS].write(metrics)
        self.files[run_folder.TIMES].write({"step": metrics["step"], **times})
        for view in self.views:
            view.step(metrics, times)

    def _timed(self, metrics: Record, times: Record) -> Record:
        """With the time since the last step that this one does not count, and with the meter's rates."""
        now, seconds = time.monotonic(), times.get("seconds", 0.0)
        elsewhere = 0.0 if self.told is None else max(0.0, now - self.told - seconds)
        self.told = now
        if self.meter is None:
            return times
        tokens = metrics.get("tokens", self.tokens)
        self.meter.add(tokens - self.tokens, seconds, elsewhere)
        self.tokens = tokens
        return {**times, **self.meter.rates(), "parts": {**times.get("parts", {}), "elsewhere": elsewhere}}

    def evaluation(self, record: Record) -> None:
        self.files[run_folder.EVALS].write(record)
        for view in self.views:
            view.evaluation(record)

    def experts(self, record: Record) -> None:
        """Loads and co-activations of experts, which only the report shows."""
        self.files[run_folder.EXPERTS].write(record)

    def event(self, step: int, level: str, text: str) -> None:
        """Something to be noticed: a "note" or an "alarm"."""
        record = {"step": step, "level": level, "text": text}
        self.files[run_folder.EVENTS].write(record)
        for view in self.views:
            view.event(record)

    def sync(self) -> None:
        """Return when all lines are on the disk."""
        for file in self.files.values():
            file.sync()

    def end(self, status: str, step: int, reason: str = "") -> None:
        """`status`: finished, stopped or failed.  Closes everything."""
        self.sync()
        record = json.dumps({"status": status, "step": step, "reason": reason}).encode() + b"\n"
        with atomic_file(self.folder / run_folder.END) as file:
            file.write(record)
        self.close()

    def close(self) -> None:
        """Without an end, as after a crash."""
        for file in self.files.values():
            file.close()
        for view in self.views:
            view.close()


class Lines:
    """A line of `key=value` for every `every`-th step, each evaluation and each event: for pipes and log files.

    A step's line has the keys of `SHOWN` that it has values for; an evaluation's, losses, accuracies and bits per byte.
    """

    def __init__(self, say: Callable[[str], object], every: int = 1, steps: int | None = None) -> None:
        self.say, self.every, self.steps = say, every, steps

    def step(self, metrics: Record, times: Record) -> None:
        if metrics["step"] % self.every == 0 or metrics["step"] == self.steps:
            left = remaining(metrics["step"], self.steps, times)
            found = {**flat(metrics), **flat(times), "eta": left}
            self._say("step", {key: found.get(key) for key in SHOWN})

    def evaluation(self, record: Record) -> None:
        found = {key: value for key, value in flat(record).items() if key.rpartition("/")[2] in EVALUATED}
        self._say("eval", {"step": record["step"], **found})

    def event(self, record: Record) -> None:
        self._say(record["level"], {"step": record["step"], "text": json.dumps(record["text"], ensure_ascii=False)})

    def close(self) -> None:
        """Every line was said at once."""

    def _say(self, kind: str, values: Record) -> None:
        words = (f"{'_'.join(key.split())}={_short(value)}" for key, value in values.items() if value is not None)
        self.say(printable(" ".join((kind, *words))))


def flat(record: Record, prefix: str = "") -> dict[str, Any]:
    """{"heldout": {"math": {"loss": 3}}} -> {"heldout/math/loss": 3}; lists are left out."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}/")
        elif not isinstance(value, (list, tuple)):
            out[prefix + key] = value
    return out


def remaining(step: int, steps: int | None, times: Record) -> float | None:
    """Seconds until the last step, at the speed of this one, or of those before it where `times` say it."""
    each = times.get("seconds_mean", times.get("seconds"))
    return None if steps is None or each is None else (steps - step) * each


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
