"""The learning rate that a source's run had come to, as its files record it: `start_lr: inherit`.

    recorded_rate(source)          # (6.15e-05, "the schedule in config.yaml at step 928,646"), or None
    peak_rate(settings, source)    # (rate, note); raises ConfigError if it is to be inherited and nobody knows it

Nothing is guessed: a key that is missing or has another form makes the rate unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surgery.containers.text import read_json
from surgery.errors import ConfigError
from surgery.formats.base import Checkpoint
from surgery.midtraining.run_folder import read_folder, run_of
from surgery.midtraining.schedule import SHAPES, Schedule
from surgery.midtraining.settings_train import Schedule as Wanted

Found = tuple[float, str]


class Unknown(Exception):
    """A file does not say it."""


def peak_rate(wanted: Wanted, source: Checkpoint, last: float | None = None) -> Found:
    """The rate after the warm-up, and where it is from.  `last` is its last one, by its optimizer's state."""
    if wanted.start_lr != "inherit":
        return wanted.start_lr.of(0.0), f"learning rate {wanted.start_lr.value:g}, as the settings say"
    found = recorded_rate(source) or (None if last is None else (last, "the state of its optimizer"))
    if found is None or not found[0] > 0:
        said = "is 0 at the end of its run" if found else "is not recorded beside it"
        raise ConfigError(
            f"train.schedule.start_lr is to be inherited, but the rate of {source.path.name} {said}",
            hint="say it: train.schedule.start_lr: 3e-5",
        )
    return found[0], f"learning rate {found[0]:.4g}, by {found[1]}"


def recorded_rate(source: Checkpoint) -> Found | None:
    """The rate of the step after the last one of the source's run; None if its files do not tell."""
    try:
        return _own(source) or (READERS[source.format](source) if source.format in READERS else None)
    except Unknown:
        return None


def _own(source: Checkpoint) -> Found | None:
    """The metrics of the run of surgery that has exported it."""
    found = run_of(source.path)
    if not found:
        return None
    run, step = found
    rates = [line.get("lr") for line in read_folder(run).metrics if line.get("step") == step]
    if not rates or type(rates[-1]) is not float:
        raise Unknown
    return rates[-1], f"step {step:,} of the run {run.name}"


def _hf(source: Checkpoint) -> Found:
    """transformers' Trainer logs the rate that it has used."""
    file = source.path / "trainer_state.json"
    if not file.is_file():
        raise Unknown
    state = read_json(file)
    log = state.get("log_history") if isinstance(state, dict) else None
    rates = [line["learning_rate"] for line in log or () if isinstance(line, dict) and "learning_rate" in line]
    if not rates or type(rates[-1]) not in (int, float):
        raise Unknown
    return float(rates[-1]), "the last line of trainer_state.json"


def _olmo(source: Checkpoint) -> Found:
    """olmo/optim.py: a floor of alpha_f times the peak; t_warmup and t_max in the scheduler's units."""
    optimizer, scheduler = _section(source.config, "optimizer"), _section(source.config, "scheduler")
    names = {"cosine_with_warmup": "cosine", "linear_with_warmup": "linear"}
    peak, step = _number(optimizer, "learning_rate"), _number(source.details, "step")
    if scheduler.get("name") not in names:
        raise Unknown
    t: float = step
    if scheduler.get("units", "steps") == "tokens":
        t *= _number(source.config, "global_train_batch_size")
        t *= _number(_section(source.config, "model"), "max_sequence_length")
    total = _number({"t_max": _count(scheduler.get("t_max") or source.config.get("max_duration"))}, "t_max")
    warmup, floor = _number(scheduler, "t_warmup"), _number({"alpha_f": 0.1, **scheduler}, "alpha_f")
    if t < warmup or total <= warmup:
        raise Unknown
    left = SHAPES[names[scheduler["name"]]](min(1.0, (t - warmup) / (total - warmup)))
    return peak * (floor + (1 - floor) * left), f"the schedule in config.yaml at step {step:,}"


def _megatron(source: Checkpoint) -> Found:
    """megatron/core/optimizer_param_scheduler.py, by the args of the run; all counted in iterations."""
    args = source.config
    style, step = args.get("lr_decay_style"), _number(source.details, "iteration")
    in_samples = args.get("lr_decay_samples") or args.get("lr_warmup_samples")
    if style not in ("linear", "cosine", "constant") or in_samples:
        raise Unknown
    total = int(_number({"iters": args.get("lr_decay_iters") or args.get("train_iters")}, "iters"))
    share = _number({"share": args.get("lr_warmup_fraction") or 0}, "share")
    warmup = round(share * total) if share else int(_number({"iters": args.get("lr_warmup_iters") or 0}, "iters"))
    schedule = Schedule(
        peak=_number(args, "lr"), steps=total, warmup=warmup, decay=0 if style == "constant" else total - warmup,
        shape="cosine" if style == "cosine" else "linear", final=_number(args, "min_lr"), count_warmup_from=0,
    )  # fmt: skip
    return schedule(int(step) + 1), f"the schedule in the args at iteration {step:,}"


def _section(mapping: Mapping[str, object], key: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    if not isinstance(value, Mapping):
        raise Unknown
    return value


def _number(mapping: Mapping[str, Any], key: str) -> float | int:
    value = mapping.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unknown
    return value


def _count(duration: object) -> object:
    """OLMo writes tokens as 5e12T."""
    if not isinstance(duration, str):
        return duration
    try:
        return float(duration.removesuffix("T"))
    except ValueError:
        raise Unknown from None


READERS: Mapping[str, Callable[[Checkpoint], Found]] = {
    "hf": _hf,
    "olmo": _olmo,
    "megatron": _megatron,
    "megatron-dist": _megatron,
}
