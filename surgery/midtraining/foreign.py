"""Another trainer's config as a run of surgery: what can be said is said, and what cannot is named.

    found = translated("olmo", {"optimizer.learning_rate": 6e-5, "max_grad_norm": 1.0, "canceled_check_interval": 50})
    found.run["train"]["clip_norm"], found.left               # 1.0, {"canceled_check_interval": 50}
    found = read_foreign("olmo", "config.yaml")               # also "neox" and "megatron" (a file of its arguments)

Sources: OLMo's olmo/config.py, GPT-NeoX' neox_args, Megatron-LM's megatron/training/arguments.py.  Keys that describe
the model or the machine are left out: the model is opened from its own files.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.containers.text import YAML_LIMIT
from surgery.containers.yaml_loader import parse_yaml
from surgery.containers.yaml_writer import to_yaml
from surgery.errors import ConfigError
from surgery.midtraining.conventions import put
from surgery.tensors.files import read_small

Said = Mapping[str, Any]  # our dotted keys; those that begin with "_" are put together at the end
Rule = str | Callable[[Any], Said]


@dataclass(frozen=True)
class Translated:
    """A run, the mixture that it names (None: the config names no data), and the keys that no key of ours says."""

    run: Mapping[str, Any]
    mixture: Mapping[str, Any] | None
    left: Mapping[str, Any] = field(default_factory=dict)

    def text(self, data: str) -> str:
        """The run's YAML; `data` is the file that the mixture goes to."""
        run = {**self.run, **({"data": {"mixture": data}} if self.mixture else {})}
        rest = [f"# not taken over: {key}: {value}" for key, value in self.left.items()]
        missing = [f"# still to be said: {key}" for key in ("model", "data", "output") if key not in run]
        return to_yaml(run).decode() + "".join(f"{line}\n" for line in (*missing, *rest))


def read_foreign(trainer: str, path: str | os.PathLike[str]) -> Translated:
    """Raises FileError or ConfigError if the file is no config of the trainer."""
    data = read_small(path, YAML_LIMIT, "config")
    if trainer == "megatron":
        return translated(trainer, _arguments(data, path))
    value = parse_yaml(data, os.fspath(path), "config", aliases=True)
    if not isinstance(value, dict):
        raise ConfigError("holds no keys and values", file=path)
    flat = dict(_flat(value))
    return translated(trainer, {k.replace("-", "_"): v for k, v in flat.items()} if trainer == "neox" else flat)


def translated(trainer: str, given: Mapping[str, Any]) -> Translated:
    """Of dotted keys.  Raises ConfigError for a value that no rule understands."""
    rules, about = RULES[trainer], ABOUT[trainer]
    said: dict[str, Any] = {"train.convention": CONVENTION[trainer]}
    left = {}
    for key, value in given.items():
        rule = rules.get(key)
        if rule is None:
            if value is not None and not re.fullmatch(about, key):
                left[key] = value
        elif value is not None:
            try:
                said |= {rule: value} if isinstance(rule, str) else rule(value)
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{key} is {value!r}, which is not understood ({error})") from None
    if said.get("_trainer") is False:
        left["reset_trainer_state"] = "false: a run's schedule and data begin anew here"
    mixture = _mixture(said)
    run: dict[str, Any] = {}
    for key, value in _together(said).items():
        put(run, key, value)
    return Translated(run, mixture, left)


def _together(said: Mapping[str, Any]) -> dict[str, Any]:
    """Ours alone, with what takes several of theirs."""
    ours = {key: value for key, value in said.items() if not key.startswith("_")}
    rows, length = said.get("_rows"), said.get("_length")
    if rows and length:
        ours["train.batch_tokens"] = rows * length
    if said.get("_z") and said.get("_z_on", True):
        ours["train.z_loss"] = said["_z"]
    elif "_z_on" in said or "_z" in said:
        ours["train.z_loss"] = 1e-4 if said.get("_z_on") else 0.0
    if "_beta1" in said or "_beta2" in said:
        ours["train.optimizer.betas"] = [said.get("_beta1", 0.9), said.get("_beta2", 0.999)]
    if said.get("_fresh"):
        ours["init.optimizer"] = "fresh"
    return ours


def _mixture(said: Mapping[str, Any]) -> dict[str, Any] | None:
    paths, length = said.get("_paths"), said.get("_length")
    if not paths or not length:
        return None
    more = {"dtype": said["_dtype"]} if "_dtype" in said else {}
    more |= {"label_mask": said["_masks"]} if said.get("_masks") else {}
    weights = said.get("_weights")
    if weights:
        sources = [{"name": f"source-{i}", "paths": [p], "weight": w} for i, (p, w) in
                   enumerate(zip(paths, weights, strict=True))]  # fmt: skip
        return {"sequence_length": length, "isolate": False, "budget": {"epochs": 1}, "sources": sources}
    return {"sequence_length": length, "isolate": said.get("_isolate", False),
            "sources": [{"name": "data", "paths": paths, "multiplier": 1, **more}]}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the rules


def _duration(value: Any) -> Said:
    """OLMo's: steps, '5e9T' (tokens) or '1ep'."""
    if isinstance(value, str) and value.endswith("T"):
        return {"train.length": f"{int(float(value[:-1]))} tokens"}
    if value in ("1ep", 1.0):
        return {}
    return {"train.length": int(value)}


def _style(names: Mapping[str, str]) -> Callable[[Any], Said]:
    return lambda value: {"train.schedule.name": names[str(value).lower()]}


def _share(key: str) -> Callable[[Any], Said]:
    return lambda value: {key: f"{float(value) * 100:.12g}%"}


def _betas(value: Any) -> Said:
    return {"train.optimizer.betas": [float(b) for b in value]}


def _second(name: str) -> Callable[[Any], Said]:
    return lambda value: {name: float(value)}


def _when(on: Said, off: Said | None = None) -> Callable[[Any], Said]:
    return lambda value: on if value else off or {}


def _blend(value: Any) -> Said:
    """Megatron's --data-path: a prefix, or weights and prefixes in turn."""
    words = [str(v) for v in value] if isinstance(value, list) else str(value).split()
    if len(words) % 2 or len(words) < 2:
        return {"_paths": [f"{w}.bin" for w in words]}
    return {"_weights": [float(w) for w in words[0::2]], "_paths": [f"{w}.bin" for w in words[1::2]]}


OLMO_SCHEDULES = {"cosine_with_warmup": "cosine", "linear_with_warmup": "linear", "constant": "constant",
                  "inverse_sqrt_with_warmup": "inverse_sqrt"}  # fmt: skip
STYLES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "wsd": "wsd",
          "inverse-square-root": "inverse_sqrt"}  # fmt: skip
RULES: Mapping[str, Mapping[str, Rule]] = {
    "olmo": {
        "load_path": "model.path",
        "save_folder": "output",
        "seed": "train.seed",
        "data.seed": lambda v: {},
        "reset_trainer_state": _when({}, {"_trainer": False}),
        "optimizer.name": lambda v: {"train.optimizer.name": {"adamw": "adamw"}[v]},
        "optimizer.learning_rate": _second("train.schedule.start_lr"),
        "optimizer.weight_decay": _second("train.optimizer.weight_decay"),
        "optimizer.betas": _betas,
        "optimizer.eps": _second("train.optimizer.eps"),
        "optimizer.decay_norm_and_bias": _when({}, {"train.optimizer.no_decay": ["norm", "bias", "embedding"]}),
        "scheduler.name": _style(OLMO_SCHEDULES),
        "scheduler.t_warmup": lambda v: {"train.schedule.warmup": int(v)},
        "scheduler.alpha_f": _share("train.schedule.final_lr"),
        "scheduler.warmup_min_lr": _second("train.schedule.warmup_from"),
        "global_train_batch_size": "_rows",
        "device_train_microbatch_size": "train.micro_batch",
        "model.max_sequence_length": "_length",
        "max_duration": _duration,
        "max_grad_norm": _second("train.clip_norm"),
        "softmax_auxiliary_loss": "_z_on",
        "auxiliary_loss_multiplier": "_z",
        "precision": lambda v: {"train.precision": {"amp_bf16": "autocast", "fp32": "fp32"}[v]},
        "reset_optimizer_state": "_fresh",
        "data.paths": "_paths",
        "data.label_mask_paths": "_masks",
        "data.memmap_dtype": "_dtype",
        "data.effective_memmap_dtype": "_dtype",
        "data.generate_doc_lengths": "_isolate",
        "save_interval": "checkpoint.every",
    },
    "neox": {
        "load": "model.path",
        "save": "output",
        "seed": "train.seed",
        "optimizer.params.lr": _second("train.schedule.start_lr"),
        "optimizer.params.betas": _betas,
        "optimizer.params.eps": _second("train.optimizer.eps"),
        "min_lr": _second("train.schedule.final_lr"),
        "lr_decay_style": _style(STYLES),
        "warmup": _share("train.schedule.warmup"),
        "train_iters": "train.length",
        "train_batch_size": "_rows",
        "train_micro_batch_size_per_gpu": "train.micro_batch",
        "seq_length": "_length",
        "weight_decay": _second("train.optimizer.weight_decay"),
        "gradient_clipping": _second("train.clip_norm"),
        "precision": lambda v: {"train.precision": {"bfloat16": "autocast", "fp32": "fp32"}[v]},
        "data_path": lambda v: {"_paths": [f"{v}.bin"]},
        "train_data_paths": lambda v: {"_paths": [f"{p}.bin" for p in v]},
        "train_data_weights": lambda v: {"_weights": [float(w) for w in v]},
        "checkpoint_factor": "checkpoint.every",
        "hidden_dropout": _second("train.dropout"),
        "finetune": "_fresh",
    },
    "megatron": {
        "load": "model.path",
        "save": "output",
        "seed": "train.seed",
        "lr": _second("train.schedule.start_lr"),
        "min_lr": _second("train.schedule.final_lr"),
        "lr_decay_style": _style(STYLES),
        "lr_warmup_iters": lambda v: {"train.schedule.warmup": int(v)},
        "lr_warmup_fraction": _share("train.schedule.warmup"),
        "lr_warmup_init": _second("train.schedule.warmup_from"),
        "lr_wsd_decay_iters": lambda v: {"train.schedule.decay": int(v)},
        "train_iters": lambda v: {"train.length": int(v)},
        "global_batch_size": lambda v: {"_rows": int(v)},
        "micro_batch_size": lambda v: {"train.micro_batch": int(v)},
        "seq_length": lambda v: {"_length": int(v)},
        "weight_decay": _second("train.optimizer.weight_decay"),
        "adam_beta1": _second("_beta1"),
        "adam_beta2": _second("_beta2"),
        "adam_eps": _second("train.optimizer.eps"),
        "clip_grad": _second("train.clip_norm"),
        "moe_aux_loss_coeff": _second("moe.balance"),
        "moe_z_loss_coeff": _second("moe.router_z"),
        "bf16": _when({"train.precision": "autocast"}),
        "hidden_dropout": _second("train.dropout"),
        "data_path": _blend,
        "save_interval": lambda v: {"checkpoint.every": int(v)},
        "no_load_optim": _when({"_fresh": True}),
        "finetune": _when({"_fresh": True}),
    },
}
CONVENTION = {"olmo": "olmo", "neox": "megatron", "megatron": "megatron"}
# what describes the model, the machine or the look of logs: of no interest
ABOUT = {
    "olmo": r"model\..*|run_name|wandb\..*|tokenizer\..*|fsdp\..*|ddp\..*|compile\..*|data\.(?:num_workers|"
            r"prefetch_factor|persistent_workers|pin_memory|timeout|drop_last)|save_overwrite|console_log_interval|speed_monitor\..*",
    "neox": r"(?:pipe|model)_parallel_size|num_layers|hidden_size|num_attention_heads|norm|pos_emb|rotary_.*|log_.*|"
            r"zero_optimization.*|steps_per_print|wall_clock_breakdown|tensorboard_dir|optimizer\.type|vocab_file|"
            r"tokenizer_type|max_position_embeddings|no_weight_tying|gpt_j_residual|output_layer_parallelism",
    "megatron": r"(?:tensor|pipeline|expert|context)_.*parallel.*|num_(?:layers|attention_heads|query_groups|experts)|"
                r"(?:ffn_)?hidden_size|max_position_embeddings|tokenizer_.*|vocab_.*|log_.*|tensorboard_.*|wandb_.*|"
                r"distributed_.*|use_.*|swiglu|disable_bias_linear|normalization|position_embedding_type|rotary_.*",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- reading


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _arguments(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """--lr 3e-5 --bf16 ...: of a command, with or without what stands before them and with lines that go on."""
    try:
        words = shlex.split(data.decode().replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ConfigError(f"holds no arguments: {error}", file=path) from None
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value or True
        elif name:
            found[name] = word if found[name] is True else f"{found[name]} {word}"
    if not found:
        raise ConfigError("holds no arguments", file=path, hint="--lr 3e-5 --train-iters 1000 ...")
    return found


def write_foreign(found: Translated, path: Path) -> list[Path]:
    """The run's YAML, and beside it that of its data."""
    from surgery.writing.atomic import atomic_file

    data = path.with_name(f"{path.stem}-data.yaml")
    texts = {path: found.text(data.name).encode()}
    if found.mixture:
        texts[data] = to_yaml(found.mixture)
    for place, text in texts.items():
        with atomic_file(place, force=False) as file:
            file.write(text)
    return list(texts)
