"""Try several values of a run's keys for a few steps each, and set side by side what they cost and come to.

    grid = parse_grid(["micro_batch=2,4", "compile=true,false"])          # keys of `train` need no section
    trials = sweep("run.yaml", grid, steps=20, sets=[])
    trials[0].tokens_per_second, trials[0].memory, trials[0].loss

Each trial is a process of its own, so that none finds memory, compiled code or a device as another left it; one that
fails is told of, and the others go on.  The table stays in the run's folder, as sweep.json, and in its report.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError, UsageError, show
from surgery.midtraining.run_file import read_run
from surgery.midtraining.run_folder import SWEEP
from surgery.midtraining.sections import Section
from surgery.midtraining.settings import Model, Run
from surgery.midtraining.settings_train import Train
from surgery.tensors.memory import high_water
from surgery.writing.atomic import write_json

MOST = 64  # trials
WARM = 0.2  # of the steps are not timed, and two at least


@dataclass(frozen=True)
class Trial:
    """`values` by key.  tokens_per_second: the median of steps that are warm; memory: bytes, the most that the process
    or its GPU held; loss: of the last step.  `failed` says why there are none."""

    values: Mapping[str, str]
    steps: int = 0
    tokens: int = 0
    tokens_per_second: float | None = None
    memory: int | None = None
    loss: float | None = None
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "values": dict(self.values)}


Grid = Mapping[str, Sequence[str]]


def parse_grid(given: Sequence[str]) -> dict[str, list[str]]:
    """ "micro_batch=2,4" -> {"train.micro_batch": ["2", "4"]}.  Raises UsageError."""
    grid: dict[str, list[str]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        found = [value for value in values.split(",") if value]
        if not equals or not found:
            raise UsageError(f"--sweep {show(text)}: write --sweep micro_batch=2,4,8")
        grid[_full(key)] = found
    if (count := len(list(product(*grid.values())))) > MOST:
        raise UsageError(f"--sweep asks for {count} trials", hint=f"at most {MOST}: leave out some values")
    return grid


def _full(key: str) -> str:
    """A key with its section: of the run, of `train` or of `model`; what is none is left to the settings to refuse."""
    sections: dict[str, type[Section]] = {"": Run, "train.": Train, "model.": Model}
    return next((f"{section}{key}" for section, keys in sections.items() if key in keys.model_fields), key)


def sweep(
    path: str, grid: Grid, steps: int, sets: Sequence[str] = (), tell: Callable[[Trial], None] = lambda trial: None
) -> list[Trial]:
    """Run all combinations, the last key changing fastest.  `tell` is told of each when it is done.

    Raises ConfigError if a combination is no run, before any is tried.
    """
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    runs = [read_run(path, [*sets, *(f"{k}={v}" for k, v in values.items())])[0] for values in combinations]
    trials = []
    for values, run in zip(combinations, runs, strict=True):
        trials.append(_apart(values, run, steps))
        tell(trials[-1])
        folder = Path(run.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SWEEP, {"steps": steps, "trials": [trial.to_json() for trial in trials]})
    return trials


def _apart(values: Mapping[str, str], run: Run, steps: int) -> Trial:
    """A trial in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, values, run, steps).result()
        except BrokenProcessPool:
            return Trial(values, failed="the process was killed: out of memory?")


def measure(values: Mapping[str, str], run: Run, steps: int) -> Trial:
    """Take the first steps of a run, and nothing else: no self-tests but the timed one, no files."""
    import torch

    from surgery.midtraining.loop import fresh_state, prepare, train
    from surgery.midtraining.reference import with_reference
    from surgery.midtraining.run import compile_for

    log = _Timed(steps)
    try:
        job = with_reference(prepare(run))
        compile_for(job, ())
        train(job, fresh_state(job), log)
    except _Enough:
        pass
    except (SurgeryError, torch.OutOfMemoryError, RuntimeError) as error:
        return Trial(values, failed=str(error).partition("\n")[0][:200])
    return Trial(values, len(log.seconds), log.tokens[-1], log.rate(), _memory(), log.loss)


class _Enough(Exception):
    """As many steps as were wanted."""


class _Timed:
    """A log that keeps times, and ends the run."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self.tokens, self.loss = steps, list[float](), list[int](), 0.0

    def step(self, metrics: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        self.seconds.append(times["seconds"])
        self.tokens.append(metrics["tokens"])
        self.loss = metrics["loss"]
        if len(self.seconds) >= self.steps:
            raise _Enough

    def rate(self) -> float:
        """Tokens per second."""
        each = [b - a for a, b in zip([0, *self.tokens], self.tokens, strict=False)]
        cold = min(len(each) - 1, max(2, round(WARM * len(each))))
        return statistics.median(n / s for n, s in list(zip(each, self.seconds, strict=True))[cold:])

    def event(self, step: int, level: str, text: str) -> None:
        """Not in the table."""

    def routing(self, step: int, kind: str, reading: Mapping[str, Any]) -> None:
        """Not in the table."""


def _memory() -> int:
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return high_water()
