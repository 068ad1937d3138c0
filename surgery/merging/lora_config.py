"""The config of a LoRA adapter, `adapter_config.json`: all that changes the weights is understood, or refused by name.

    config = read_lora(Path("adapter"))
    config.targets("model.layers.0.self_attn.q_proj")           # whether peft puts an adapter there
    config.scale("model.layers.0.self_attn.q_proj", rank=8)     # what b a is multiplied by: alpha / rank

Keys and meanings: peft 0.21 `tuners/lora/config.py`; which modules are meant: `tuners/tuners_utils.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.containers.text import read_json
from surgery.errors import ConfigError, FileError, show, some
from surgery.formats.keys import Keys

FILE = "adapter_config.json"
MERGE = "merge the adapter with peft first (merge_and_unload)"
SECONDS = 0.5  # that a regular expression from the file may take on one name
# start values of which nothing is left once an adapter is trained; peft applies PiSSA, OLoRA, LoftQ and CorDA to other
# base weights than the ones that are stored
STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "lora_ga")
# what may be said and does not change the merged weights
INERT = """
    auto_mapping base_model_name_or_path corda_config eva_config inference_mode lora_dropout lora_ga_config loftq_config
    megatron_core peft_version qalora_group_size revision runtime_config task_type
""".split()
# other defaults than none, false or empty, of keys that only matter beside others
DEFAULTS: Mapping[str, Any] = {
    "r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": None, "alpha_pattern": None, "target_modules": None,
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None,
    "bias": "none", "ensure_weight_tying": False, "init_lora_weights": True, "fan_in_fan_out": False,
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """What the file says.  `modules` are names (or one pattern) of what is adapted, `saved` of what is stored whole;
    `tied`: the head of a tied model stays its embedding."""

    file: str
    rank: int
    alpha: float
    root: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    modules: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...]
    stacks: tuple[str, ...]
    saved: tuple[str, ...]
    biases: str
    tied: bool
    drawn: bool  # what is not stored was drawn at random, and peft draws it anew

    def scale(self, module: str, rank: int) -> float:
        """Alpha / rank, or alpha / sqrt(rank).  Raises ConfigError if the file says another rank than the tensors."""
        wanted = self._of(self.ranks, module, self.rank)
        if rank != wanted:
            raise ConfigError(f"the rank of {module} is {rank}, but {wanted:g} is stated", file=self.file)
        return self._of(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.root else rank)

    def targets(self, module: str, is_head: bool = False) -> bool:
        """Whether a module of the model is adapted."""
        if self._named(self.excluded, module) or any(f".{s}." in f".{module}." for s in self.saved):
            return False
        if isinstance(self.modules, str):
            if self.modules.lower() == "all-linear":
                return not is_head
            return self._matches(self.modules, module)
        if self.modules is None:
            return True  # peft has defaults by family: what is stored tells
        return _among(self.modules, module) and self._in_layers(module)

    def saves(self, module: str) -> bool:
        """Whether a module is stored whole: peft looks at how its name ends, dots or not."""
        return module.endswith(self.saved)

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        patterns = [rf"(?:^|.*?\.){re.escape(stack)}\.(\d+)\." for stack in self.stacks] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for p in patterns if (match := re.match(p, module))), None)
        return found is not None and int(found[1]) in self.layers

    def _named(self, names: tuple[str, ...] | str, module: str) -> bool:
        return self._matches(names, module) if isinstance(names, str) and names else _among(tuple(names), module)

    def _of(self, patterns: Mapping[str, float], module: str, default: float) -> float:
        """The entry of the first pattern that the module's name ends in."""
        return next((value for p, value in patterns.items() if self._matches(rf"(.*\.)?({p})", module)), default)

    def _matches(self, pattern: str, text: str) -> bool:
        """A regular expression of the file, for a bounded time.  Raises ConfigError."""
        import regex

        try:
            return regex.fullmatch(pattern, text, timeout=SECONDS) is not None
        except TimeoutError:
            raise ConfigError(f"the pattern {show(pattern)} takes too long", file=self.file, hint=MERGE) from None
        except (regex.error, RecursionError, MemoryError) as error:
            raise ConfigError(f"{show(pattern)} is no regular expression: {error}", file=self.file) from None


def _among(names: Iterable[str], module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_lora(folder: Path) -> LoraConfig:
    """The config in an adapter's folder.  Raises ConfigError naming every key that is not understood."""
    file = str(folder / FILE)
    config = read_json(folder / FILE, "adapter config")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        what = show(config.get("peft_type")) if isinstance(config, dict) else "no mapping"
        raise ConfigError(f"is no LoRA adapter (peft_type is {what})", file=file, hint=MERGE)
    keys = Keys(config, file, absent=DEFAULTS, nulls=True)
    start = keys.get("init_lora_weights")
    known = isinstance(start, (str, bool, type(None))) and start in STARTS
    keys.get("fan_in_fan_out")  # peft knows better, and so does the model's table
    found = LoraConfig(
        file, keys.integer("r"), keys.real("lora_alpha"), keys.flag("use_rslora"), _numbers(keys, "rank_pattern"),
        _numbers(keys, "alpha_pattern"), _names(keys, "target_modules"), _names(keys, "exclude_modules") or (),
        _whole_numbers(keys, "layers_to_transform"), _listed(keys, "layers_pattern"), _listed(keys, "modules_to_save"),
        keys.choice("bias", ("none", "all", "lora_only")), keys.flag("ensure_weight_tying"), start is False,
    )  # fmt: skip
    empty = [key for key, value in config.items() if value == {} and key not in (*INERT, *DEFAULTS)]  # a method is on
    odd = [*dict.fromkeys((*keys.unknown({*INERT, "peft_type"}), *empty))] + (
        [] if known else [f"init_lora_weights: {show(start)}"]
    )
    if odd:
        raise ConfigError(f"not understood, and the weights may depend on it: {some(odd)}", file=file, hint=MERGE)
    return found


def locate_adapter(folder: Path) -> Path:
    """The folder itself, or the only one in it that holds an adapter: peft saves named ones so.  Raises FileError."""
    if (folder / FILE).is_file():
        return folder
    inside = sorted(p.parent for p in folder.glob(f"*/{FILE}")) if folder.is_dir() else []
    if len(inside) == 1:
        return inside[0]
    found = f"; one of {some(p.name for p in inside)} is meant" if inside else ""
    raise FileError(f"holds no adapter ({FILE}){found}", file=folder)


def _numbers(keys: Keys, key: str) -> Mapping[str, float]:
    section = keys.section(key)
    if any(type(v) not in (int, float) or not 0 < v < 1e9 for v in section.values()):
        raise keys.bad(key, section, "a mapping from names to positive numbers")
    return section


def _names(keys: Keys, key: str) -> tuple[str, ...] | str | None:
    """A list of names, or one pattern."""
    value = keys.get(key)
    return value if isinstance(value, str) else None if value is None else _listed(keys, key)


def _listed(keys: Keys, key: str) -> tuple[str, ...]:
    value = keys.get(key)
    value = [value] if isinstance(value, str) else value or []
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise keys.bad(key, value, "a list of names")
    return tuple(value)


def _whole_numbers(keys: Keys, key: str) -> tuple[int, ...]:
    value = keys.get(key)
    value = [value] if type(value) is int else value or []
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        raise keys.bad(key, value, "a list of layers")
    return tuple(value)
