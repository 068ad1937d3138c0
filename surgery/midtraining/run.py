"""A run from its settings to its folder: prepared, tested, trained, logged, exported.

    done = midtrain(run, command=["surgery", "midtrain", "run.yaml"], views=[Lines(sys.stdout)])
    done.exports                                # folders: output/export/step000001600-hf, ...

The folder is what run_folder.py describes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from surgery.containers.yaml_writer import to_yaml
from surgery.errors import OutputError
from surgery.midtraining import run_folder
from surgery.midtraining.after_step import Exports, First, Readings
from surgery.midtraining.compiling import compiled
from surgery.midtraining.evaluating import Evaluations
from surgery.midtraining.log import RunLog, View
from surgery.midtraining.loop import Act, Job, fresh_state, prepare, train
from surgery.midtraining.router_telemetry import alarms
from surgery.midtraining.selftests import Result, self_test
from surgery.midtraining.settings import Run
from surgery.midtraining.throughput import Meter, flops_per_token, peak_flops
from surgery.writing.atomic import atomic_file, write_json

FORMAT = "surgery-run-1"
PACKAGES = ("checkpoint-surgery", "torch", "transformers", "numpy", "safetensors")


@dataclass(frozen=True)
class Done:
    """What a run did."""

    folder: Path
    steps: int
    tokens: int
    skipped: int
    loss: float
    seconds: float
    exports: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "exports": [str(path) for path in self.exports]}


@dataclass
class Told:
    """The log of a run, which also knows how fast it goes and what was said last."""

    log: RunLog
    meter: Meter
    at: float = field(default_factory=time.perf_counter)  # when the last step was told
    tokens: int = 0
    loss: float = 0.0
    reading: Mapping[str, Any] = field(default_factory=dict)
    exports: list[Path] = field(default_factory=list)

    def step(self, metrics: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        elsewhere = max(0.0, now - self.at - times["seconds"])
        self.meter.add(metrics["tokens"] - self.tokens, times["seconds"], elsewhere)
        self.at, self.tokens, self.loss = now, metrics["tokens"], metrics["loss"]
        parts = {**times["parts"], "elsewhere": elsewhere}
        self.log.step(metrics, {**times, **self.meter.rates(), "parts": parts})

    def event(self, step: int, level: str, text: str) -> None:
        self.log.event(step, level, text)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self.log.evaluation(record)

    def routing(self, step: int, reading: Mapping[str, Any]) -> None:
        self.reading = reading
        for text in alarms(dict(reading)):
            self.log.event(step, "alarm", text)


def midtrain(
    run: Run,
    *,
    command: Sequence[str] = (),
    views: Callable[[Job], Sequence[View]] = lambda job: (),
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] | None = None,
) -> Done:
    """Do all of a run.  `say` is told what is decided and tested on the way; `progress` bytes of weights.

    Raises OutputError if the folder holds a run, MismatchError if a self-test fails, SurgeryError for whatever else
    does not fit.
    """
    folder = Path(run.output)
    if run_folder.is_run(folder):
        raise OutputError("holds a run already", file=folder, hint="choose another output, or move it away")
    job = prepare(run, progress)
    for note in job.notes:
        say(note)
    results = self_test(job, lambda r: say(f"self-test {r.name}: {r.detail}"))
    say(compile_for(job, results))
    log = begin(job, folder, results, command, views(job))
    told = Told(log, Meter(flops_per_token(job.source.spec, job.course.layout.length), _peak(job), job.world.size))
    state = fresh_state(job)
    try:
        evaluations = Evaluations(job, told)
        evaluations.at(0, tokens=0)
        after: list[Act] = [First(job, told, results), evaluations, Exports(told, command)]
        if job.objective.routers:
            after.insert(1, Readings(job, told))
        train(job, state, told, after)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        log.end("stopped" if stopped else "failed", state["progress"].step, str(error).partition("\n")[0])
        raise
    log.end("finished", state["progress"].step)
    return Done(folder, state["progress"].step, told.tokens, state["spikes"].skipped, told.loss, told.meter.seconds,
                tuple(told.exports))  # fmt: skip


def compile_for(job: Job, results: Sequence[Result]) -> str:
    """Compile the layers where it pays, by the time that the test of the gradient took."""
    took = next((r.seconds for r in results if r.name == "gradient"), 0.0)
    seconds = took * job.course.layout.steps * job.course.accumulation(0)
    return compiled(job.model, job.run.train.compile, device=job.world.device, seconds=seconds,
                    dense=not job.objective.routers)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the folder


def begin(job: Job, folder: Path, results: Sequence[Result], command: Sequence[str], views: Sequence[View]) -> RunLog:
    """Write what the run is."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / run_folder.CONFIG) as file:
        file.write(to_yaml(job.run.model_dump(mode="json")))
    write_json(folder / run_folder.RUN, facts(job, folder, command))
    write_json(folder / run_folder.SELFTESTS, [asdict(r) for r in results])
    if (plan := getattr(job.batches, "plan", None)) is not None:
        sources = [s.model_dump(mode="json") for s in plan.file.sources]
        write_json(folder / run_folder.PLAN, {"sources": sources, "notes": list(plan.file.notes)})
    return RunLog(folder, views)


def facts(job: Job, folder: Path, command: Sequence[str]) -> dict[str, Any]:
    """What the run is: run.json."""
    spec, layout = job.source.spec, job.course.layout
    model = {"path": str(job.source.path), "format": job.source.format, "family": spec.family, "digest": job.digest,
             "parameters": spec.parameters(), "active_parameters": spec.parameters(active=True)}  # fmt: skip
    return {
        "format": FORMAT,
        "name": folder.name,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": {"name": device_name(job.world.device), "count": job.world.size},
        "model": model,
        "steps": layout.steps,
        "tokens": layout.tokens,
        "flops_per_token": flops_per_token(spec, layout.length),
        "seed": job.run.train.seed,
        "parents": [job.digest],
        "notes": list(job.notes),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"


def _peak(job: Job) -> float | None:
    return peak_flops(device_name(job.world.device))
