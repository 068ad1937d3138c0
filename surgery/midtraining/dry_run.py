"""What a run would be, before it is one: steps, tokens, epochs, memory, time, learning rates.

    forecast = foretell(job)                      # one step is measured; the weights stay as they are
    forecast.steps, forecast.seconds, forecast.memory["activations"], forecast.rates

Memory is counted on this device: what lies there for the whole run, and what a micro-batch's forward pass keeps for its
backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from surgery.midtraining.batching import micro_batches, rows_of
from surgery.midtraining.course import Course
from surgery.midtraining.loss import CHUNK
from surgery.midtraining.objections import spans, wasted
from surgery.midtraining.optimizer import set_rate
from surgery.midtraining.sharding import Sizes
from surgery.midtraining.step import gradients
from surgery.tensors.memory import free_memory

if TYPE_CHECKING:
    from surgery.midtraining.loop import Job

POINTS = 72  # of the curve of learning rates
LOADED = ("weights", "masters")  # memory that is taken when the step is measured


@dataclass(frozen=True)
class Forecast:
    """All that is known before the run starts.

    stages    steps that are alike: first, steps, rows, length, micro_rows, accumulation
    sources   of a plan: name, instances taken and there, epochs; empty for a record
    memory    bytes on a device: weights, masters, gradients, moments, activations, logits
    free      bytes that were free on the device, weights and masters being there; None if it does not tell
    step_seconds, seconds   of the first step, and of all at that speed
    rates     (step, learning rate), evenly over the run
    """

    steps: int
    tokens: int
    parameters: int
    trained: int
    stages: tuple[Mapping[str, int], ...]
    sources: tuple[Mapping[str, Any], ...]
    memory: Mapping[str, int]
    free: int | None
    step_seconds: float
    seconds: float
    rates: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def foretell(job: Job, processes: int = 1) -> Forecast:
    """Measure the first micro-batch, and count the rest; for so many processes, of which this is one.

    Raises ConfigError if batch or model cannot be divided among them.
    """
    if processes > job.world.size:
        course = Course.of(job.run.train, job.batches, processes, job.course.schedule.peak)
        job = replace(job, course=course)
    layout, schedule = job.course.layout, job.course.schedule
    free = _free(job.world.device)
    kept, seconds = _measured(job)
    each = len({*range(1, layout.steps + 1, max(1, layout.steps // POINTS)), layout.steps})
    points = sorted({1, *(1 + round(i * (layout.steps - 1) / max(1, each - 1)) for i in range(each))})
    counts = [p.numel() for p in job.model.parameters()]
    notes = [*job.notes]
    if lost := wasted(job.course):
        notes.append(f"{spans(lost)} will have a learning rate of 0, as train.convention counts")
    if schedule(1) < 0.01 * schedule.peak and not schedule.warmup:
        notes.append(f"the first learning rate is {schedule(1):.3g}, {schedule(1) / schedule.peak:.2%} of the peak")
    unused = getattr(job.batches, "unused", 0)
    if unused:
        notes.append(f"{unused:,} rows at the end of the plan make no whole batch and are not used")
    memory = _memory(job, kept, Sizes.of(job.run.parallel, processes).fsdp if processes > 1 else 1)
    if processes > 1:
        notes.append(
            f"{processes} processes are counted, one was measured: what they say to each other is not in the time"
        )
    if free is not None and sum(n for name, n in memory.items() if name not in LOADED) > free:
        notes.append("it will not fit: besides the weights it needs more than is free; a smaller train.micro_batch and "
                     "train.activation_checkpointing need less")  # fmt: skip
    total = seconds * layout.tokens / layout.tokens_of(layout.stages[0])
    return Forecast(
        steps=layout.steps, tokens=layout.tokens, parameters=sum(counts),
        trained=sum(p.numel() for p in job.parameters),
        stages=tuple(_stages(job)), sources=tuple(_sources(job)), memory=memory, free=free,
        step_seconds=seconds, seconds=total, rates=tuple((s, schedule(s)) for s in points), notes=tuple(notes),
    )  # fmt: skip


def _stages(job: Job) -> Iterator[dict[str, int]]:
    layout, course = job.course.layout, job.course
    ends = [*(s.first for s in layout.taken[1:]), layout.steps]
    for stage, end in zip(layout.taken, ends, strict=True):
        rows = stage.units * layout.rows * (layout.length // stage.length)
        each = {"micro_rows": course.micro_rows(stage.first), "accumulation": course.accumulation(stage.first)}
        yield {"first": stage.first + 1, "steps": end - stage.first, "rows": rows, "length": stage.length, **each}


def _sources(job: Job) -> Iterator[dict[str, Any]]:
    """How often each source is seen; in proportion, where the run is shorter than the plan."""
    plan = getattr(job.batches, "plan", None)
    if plan is None:
        return
    share = job.course.layout.tokens / (len(plan.order) * job.course.layout.length)
    for source in plan.file.sources:
        taken = source.take * share
        yield {"name": source.name, "have": source.have, "take": round(taken),
               "epochs": taken / source.have if source.have else 0.0}  # fmt: skip


def _memory(job: Job, kept: int, shared: int) -> dict[str, int]:
    """`shared`: how many processes divide weights, gradients and moments."""
    own = sum(p.numel() * p.element_size() for p in job.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in job.parameters)
    masters = sum(m.numel() * 4 for _, m in job.masters.pairs) if job.masters else 0
    vocabulary = job.model.get_output_embeddings().weight.shape[0]
    tokens = job.course.micro * job.course.layout.length
    chunk = job.objective.chunk or max(1, CHUNK.get(job.world.device, CHUNK["cuda"]) // vocabulary)
    divided = {"weights": own, "masters": masters, "gradients": trained, "moments": 2 * trained}
    return {**{name: size // shared for name, size in divided.items()}, "activations": kept,
            "logits": min(chunk, tokens) * vocabulary * 4 * 2}  # fmt: skip


def _free(device: str) -> int | None:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def _measured(job: Job) -> tuple[int, float]:
    """Bytes that the forward pass of a micro-batch keeps, and seconds of a step: one micro-batch times their number,
    and an update with a rate of 0.  A pass to warm up comes first."""
    rows = rows_of(job.batches, job.course.layout, 0, job.world.rank, job.world.size)
    part = next(micro_batches(rows, job.course.micro_rows(0), job.world.device))
    with _kept(job.model) as kept:
        gradients(job.model, [part], job.objective, job.world)
    begun = _now(job)
    gradients(job.model, [part], job.objective, job.world)
    computed = _now(job)
    set_rate(job.optimizer, 0.0)
    job.optimizer.step()
    seconds = (computed - begun) * job.course.accumulation(0) + (_now(job) - computed)
    job.optimizer.zero_grad()
    return sum(kept.values()), seconds


@contextmanager
def _kept(model: Any) -> Iterator[dict[int, int]]:
    """Bytes of what autograd keeps inside, by memory; without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            found[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def _now(job: Job) -> float:
    if job.world.device.startswith("cuda"):
        torch.cuda.synchronize(job.world.device)
    return time.perf_counter()
