"""Go on from a checkpoint: what a run keeps in it, and how all of it comes back, divided as it was or in another way.

    saver.save(step, tensors_of(job, state), trainer_of(job, state))
    saved = previous(run, world, say)          # the newest good checkpoint in the run's folder, or None
    job = prepare(run, saved=saved)
    restore(job, state, saved)

With as many processes and the same device a run that goes on does bit for bit what it would have done; otherwise data,
weights, moments, schedule and log go on, sums are added in another order, and dropout draws anew.  What may differ from
the settings of the checkpoint is `FREE`; anything else is refused, with what changed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from surgery.containers.text import YAML_LIMIT
from surgery.containers.yaml_loader import parse_yaml
from surgery.data.plans.fingerprint import differences, sampled
from surgery.data.rows import RowSource
from surgery.errors import ConfigError, FileError, OutputError, show, shown, some
from surgery.midtraining import parallel
from surgery.midtraining.checkpoint import FOLDER, FORMAT, Saved, newest
from surgery.midtraining.loop import Job, State
from surgery.midtraining.model import filled
from surgery.midtraining.optimizer import named
from surgery.midtraining.parallel import World
from surgery.midtraining.run_file import PATHS
from surgery.midtraining.run_folder import CONFIG, END, is_run, read_folder
from surgery.midtraining.saving import set_aside
from surgery.midtraining.settings import Run
from surgery.model.spec import FIELDS
from surgery.tensors.files import read_small
from surgery.tensors.fingerprint import Ledger

# Keys that may change when a run goes on: what is computed stays the same, or is compared by its content.
FREE = (
    "output", "resume", "log.*", "export*", "evaluation.*", "checkpoint.*", "parallel.*", "device", "skip_self_tests",
    "train.micro_batch", "train.activation_checkpointing", "train.compile", "train.loss_chunk", "model.experts",
    "model.attention", "model.format", "model.options*", "init.*", *PATHS,
)  # fmt: skip
PACKAGES = ("checkpoint-surgery", "torch", "transformers", "numpy", "safetensors")


# -------------------------------------------------------------------------------------------------------- what is kept


def tensors_of(job: Job, state: State) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint keeps, by its name there; what is divided as what this process holds of it."""
    found = {f"model.{name}": tensor for name, tensor in job.weights().items()}
    for name, parameter in named(job.optimizer):
        found |= {f"optim.{kind}.{name}": value for kind, value in job.optimizer.state[parameter].items()}
    for entry, part in state.items():
        if hasattr(part, "tensors"):
            found |= {f"{entry}.{name}": tensor for name, tensor in part.tensors().items()}
    return found


def random_state(job: Job) -> dict[str, torch.Tensor]:
    """Of this process's generators."""
    found = {f"rng.cpu.{job.world.rank:05d}": torch.get_rng_state()}
    if job.world.device != "cpu":
        found[f"rng.cuda.{job.world.rank:05d}"] = torch.cuda.get_rng_state(job.world.device)
    return found


def trainer_of(job: Job, state: State) -> dict[str, Any]:
    """What trainer.json says."""
    layout, step = job.course.layout, state["progress"].step
    kept = {name: part.state_dict() for name, part in state.items() if name not in ("model", "optimizer")}
    return {
        "format": FORMAT,
        "step": step,
        "state": kept,
        "data": {"step": step, "tokens": layout.tokens_before(step), "fingerprint": fingerprint_of(job.batches)},
        "schedule": asdict(job.course.schedule),
        "choices": dict(job.choices),
        "world": {"processes": job.world.size, "device": job.world.device.partition(":")[0],
                  "parallel": job.run.parallel.model_dump(mode="json")},
        "run": job.run.model_dump(mode="json"),
        "spec": spec_of(job),
        "versions": versions(),
        "lineage": {"model": job.digest, "source": shown(job.source.path)},
    }  # fmt: skip


def fingerprint_of(batches: RowSource) -> dict[str, Any]:
    """Of where rows come from, whatever it is called now."""
    plan, path = getattr(batches, "plan", None), getattr(batches, "path", None)
    found: dict[str, Any] = plan.fingerprint if plan else {"record": sampled(path)} if path else {}
    return found


def spec_of(job: Job) -> dict[str, str]:
    """What the model is."""
    return {name: repr(getattr(job.source.spec, name)) for name in FIELDS}


# ------------------------------------------------------------------------------------------------------- how it returns


def previous(run: Run, world: World, say: Callable[[str], None]) -> Saved | None:
    """The newest good checkpoint in the run's folder, to go on from; None if the run is to begin.

    Damaged ones are told of and set aside.  Raises OutputError if the folder holds a run that cannot go on, or `resume`
    forbids what is to be done; ConfigError if the run that lies there has other settings.
    """
    folder = Path(run.output)
    holds = parallel.first(world, is_run(folder))
    if run.resume == "never":
        if holds:
            raise OutputError("holds a run already", file=folder, hint="choose another output, or resume: auto")
        return None
    found = newest(folder / FOLDER, world)
    told = "\n  ".join(why for why in found.bad.values())
    if found.saved:
        check_settings(run.model_dump(mode="json"), found.saved.trainer.run, folder)
        if found.bad:
            say(f"checkpoints that are damaged, and set aside:\n  {told}")
            parallel.together(world, lambda: set_aside(found.bad), main=True)
        return found.saved
    if found.bad:
        raise OutputError(f"holds no checkpoint that is good:\n  {told}", file=folder, hint="choose another output")
    if run.resume == "must":
        raise OutputError("holds no checkpoint", file=folder, hint="resume: auto begins anew")
    if holds:
        parallel.together(world, lambda: _may_begin_anew(run, folder), main=True)
        say("the run that lies here came to no checkpoint: it begins anew")
    return None


def _may_begin_anew(run: Run, folder: Path) -> None:
    """Raises OutputError or ConfigError if that would lose another run than this one."""
    if (folder / END).is_file() and read_folder(folder).status == "finished":
        hint = "choose another output, or move it away"
        raise OutputError("holds a run already, which is finished", file=folder, hint=hint)
    config = folder / CONFIG
    if config.is_file():
        before = parse_yaml(read_small(config, YAML_LIMIT, "run"), str(config), "run")
        check_settings(run.model_dump(mode="json"), before if isinstance(before, dict) else {}, folder)


def check_settings(run: Mapping[str, Any], earlier: Mapping[str, Any], folder: Path) -> None:
    """Raises ConfigError unless only what is `FREE` changed."""
    before, now = dict(_leaves(earlier)), dict(_leaves(run))
    changed = [
        f"{key}: {show(before.get(key, 'not there'))} -> {show(now.get(key, 'gone'))}"
        for key in before | now
        if before.get(key) != now.get(key) and not any(fnmatchcase(key, free) for free in FREE)
    ]
    if changed:
        text = "\n  ".join(["the run that lies here has other settings, and cannot go on with these:", *changed])
        hint = "bring them back, or choose another output for a new run"
        raise ConfigError(text, file=folder, hint=hint)


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{at}.{key}" if at else str(key))
    else:
        yield at, value


def check_same(job: Job, saved: Saved) -> None:
    """Raises ConfigError unless model, data and schedule are the checkpoint's."""
    trainer = saved.trainer
    pairs = {
        "model": (trainer.spec, spec_of(job)),
        "data": (trainer.data["fingerprint"], fingerprint_of(job.batches)),
        "schedule": (trainer.schedule, asdict(job.course.schedule)),
    }
    changed = [f"{what}: {line}" for what, (old, new) in pairs.items() for line in differences(old, new)]
    if changed:
        text = "\n  ".join(["the checkpoint was made with something else:", *changed[:8]])
        raise ConfigError(text, file=saved.folder, hint="bring it back, or choose another output for a new run")


def restore(job: Job, state: State, saved: Saved, progress: Callable[[int], None] | None = None) -> None:
    """Weights, moments, averages, counters and random numbers: the job and the state are what they were.

    `progress` is told bytes of tensors.  Raises ConfigError if model, data or schedule are others, FileError if the
    checkpoint does not hold what the run needs.
    """
    check_same(job, saved)
    lazies = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith("rng.")}
    _make_room(job, any(name.startswith("optim.") for name in lazies))
    targets = tensors_of(job, state)
    if odd := sorted(targets.keys() ^ lazies.keys()):
        raise FileError(f"does not hold what the run needs, or more: {some(odd)}", file=saved.folder)
    if odd := sorted(name for name, target in targets.items() if tuple(target.shape) != lazies[name].shape):
        raise FileError(f"holds {some(odd)} in another shape than the run needs", file=saved.folder)
    with torch.no_grad():
        for size, _ in filled(targets, lazies, Ledger(), job.world):
            if progress:
                progress(size)
    if job.masters:
        job.masters.copy_back()
    for name, part in saved.trainer.state.items():
        state[name].load_state_dict(part)
    _draw_on(job, saved)


def _make_room(job: Job, moments: bool) -> None:
    """Give the optimizer the state that it would have after a step."""
    for _, parameter in named(job.optimizer) if moments else ():
        state = job.optimizer.state[parameter]
        state["step"] = torch.zeros((), device=parameter.device)
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _draw_on(job: Job, saved: Saved) -> None:
    """Put the random generators where they were; new ones if this process had none."""
    if not _same_world(job, saved):
        torch.manual_seed(((job.run.train.seed << 32) + (saved.step << 16) + job.world.rank) % (1 << 63))
        return
    torch.set_rng_state(saved.tensors[f"rng.cpu.{job.world.rank:05d}"].full())
    if job.world.device != "cpu":
        torch.cuda.set_rng_state(saved.tensors[f"rng.cuda.{job.world.rank:05d}"].full(), job.world.device)


def _same_world(job: Job, saved: Saved) -> bool:
    told = saved.trainer.world
    return bool(told["processes"] == job.world.size and told["device"] == job.world.device.partition(":")[0])


def said(job: Job, saved: Saved) -> Iterator[str]:
    """What is to be said about a run that goes on."""
    told = saved.trainer.world
    if not _same_world(job, saved):
        yield (f"{told['processes']} processes on {told['device']} made the checkpoint, {job.world.size} on "
               f"{job.world.device.partition(':')[0]} go on: equal up to the order of sums")  # fmt: skip
    elif told["parallel"] != job.run.parallel.model_dump(mode="json"):
        yield "the model is divided in another way than before: equal up to the order of sums"
    now = versions()
    if other := [f"{n} {v} -> {now.get(n)}" for n, v in saved.trainer.versions.items() if now.get(n) != v]:
        yield f"other versions than the checkpoint's: {', '.join(other)}"


@cache
def versions() -> Mapping[str, str]:
    """Of what computes; read once, as every checkpoint says it."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
