"""What trainers do differently, as data: the keys of a run that `train.convention` presets.

preset({"train": {"convention": "hf"}})      # {"train": {"convention": "hf", "schedule": {"count_warmup_from": 0, ...

Only mechanics, no hyperparameters: how steps are counted, what losses are divided by, who decays, how balance is
measured.  Each key can be given alone, too, and then keeps its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONVENTIONS: Mapping[str, Mapping[str, Any]] = {
    "surgery": {},
    "olmo_core": {  # ai2-olmo-core: optim/scheduler.py, train/train_module, nn/moe/loss.py
        "train.schedule.count_warmup_from": 1,
        "train.schedule.count_decay_from": 1,
        "train.optimizer.decay": "olmo",
        "moe.rule": "olmo_core",
    },
    "olmo": {  # ai2-olmo: olmo/train.py, olmo/optim.py
        "train.schedule.count_warmup_from": 1,
        "train.schedule.count_decay_from": 1,
        "train.schedule.warmup_from": "10%",
        "train.optimizer.decay": "olmo",
        "train.loss_divisor": "all_tokens",
    },
    "hf": {  # transformers: trainer.py, optimization.py
        "train.schedule.count_warmup_from": 0,
        "train.schedule.count_decay_from": 0,
        "train.schedule.decay_shape": "cosine",
        "train.optimizer.decay": "hf",
        "train.z_loss": 0.0,
        "moe.rule": "transformers",
        "moe.router_z": 0.0,
    },
    "megatron": {  # megatron-core: optimizer_param_scheduler.py, optimizer/__init__.py
        "train.schedule.count_warmup_from": 0,
        "train.schedule.count_decay_from": 0,
        "train.optimizer.decay": "megatron",
        "moe.rule": "megatron",
    },
}


def preset(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the YAML says with the convention's keys beneath, and by dotted key which convention set it.

    What is no known convention, or no mapping where one belongs, is left to the settings to refuse.
    """
    out = _copied(given)
    train = out.get("train")
    name = train.get("convention", "surgery") if isinstance(train, dict) else "surgery"
    origins = {}
    for key, value in CONVENTIONS.get(name, {}).items() if isinstance(name, str) else ():
        if put(out, key, value, replace=False):
            origins[key] = name
    return out, origins


def put(mapping: dict[str, Any], key: str, value: Any, replace: bool = True) -> bool:
    """Set a dotted key, making the mappings on the way.  False if it is there, or something else is in the way."""
    *path, leaf = key.split(".")
    for step in path:
        inner = mapping.setdefault(step, {})
        if not isinstance(inner, dict):
            return False
        mapping = inner
    if leaf in mapping and not replace:
        return False
    mapping[leaf] = value
    return True


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value
