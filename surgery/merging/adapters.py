"""LoRA adapters as peft saves them, added to a model lazily: W + scale * B A, row by row, rounded once.

    checkpoint = with_adapter(open_checkpoint("base"), Path("adapter"))     # adapter_config.json, adapter_model.*

Understood: rank and alpha patterns, rsLoRA, fan_in_fan_out, whole modules (modules_to_save).  Everything else that
would change the weights (DoRA, embeddings, trained biases, other adapters) is an error.  peft `tuners/lora/`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.containers import open_tensors
from surgery.containers.text import read_json
from surgery.errors import ConfigError, FileError, show, some
from surgery.formats.base import Checkpoint
from surgery.formats.hf.table import table
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.weave import gather
from surgery.merging.view import hf_family, view
from surgery.tensors.lazy import Box, Lazy

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."


class LowRank(Lazy):
    """`src` + scale * b a, in fp32 (fp64 for fp64), rounded once to the dtype of `src`."""

    __slots__ = ("a", "b", "dtype", "scale", "shape", "src", "turned")

    def __init__(self, src: Lazy, a: Lazy, b: Lazy, scale: float, turned: bool) -> None:
        self.src, self.a, self.b, self.scale, self.turned = src, a, b, scale, turned
        self.shape, self.dtype = src.shape, src.dtype

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src, self.a, self.b)

    def read(self, box: Box) -> torch.Tensor:
        import torch

        wide = torch.float64 if self.dtype == "float64" else torch.float32
        rows, columns = (box[1], box[0]) if self.turned else box
        rank = (0, self.a.shape[0])
        delta = self.b.read((rows, rank)).to(wide) @ self.a.read((rank, columns)).to(wide)
        delta = delta.T if self.turned else delta
        return (self.src.read(box).to(wide) + delta * self.scale).to(self.torch_dtype)


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The model with a LoRA adapter merged into it.  Raises SurgeryError naming what is not understood."""
    config = read_json(folder / "adapter_config.json", "adapter config")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError("is no LoRA adapter", file=folder / "adapter_config.json")
    for key in ("use_dora", "use_qalora", "alora_invocation_tokens", "target_parameters", "megatron_config"):
        if config.get(key):
            raise ConfigError(f"{key} is set, which is not understood", file=folder / "adapter_config.json",
                              hint="merge the adapter with peft first (merge_and_unload)")  # fmt: skip
    names = [n for n in ("adapter_model.safetensors", "adapter_model.bin") if (folder / n).is_file()]
    if not names:
        raise FileError("holds no adapter_model.safetensors", file=folder)
    stored = open_tensors(folder / names[0])
    rows = table(hf_family(checkpoint), [n.removeprefix(PREFIX) for n in stored])
    tensors = view(checkpoint, rows)
    left = set(stored)
    for name in stored:
        if match := re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_A(\.default)?\.weight", name):
            module, other = match[1], name.replace(".lora_A", ".lora_B")
            target = module + ".weight"
            if target not in tensors or other not in stored:
                raise ConfigError(f"{show(name)} changes {show(target)}, which the model does not have", file=folder)
            tensors[target] = _low_rank(tensors[target], stored[name], stored[other], module, config, folder)
            left -= {name, other}
        elif name.removeprefix(PREFIX).replace(".modules_to_save.default", "") in tensors and ".lora_" not in name:
            target = name.removeprefix(PREFIX).replace(".modules_to_save.default", "")
            tensors[target] = stored[name]
            left.discard(name)
    if left:
        raise ConfigError(f"the adapter holds what is not understood: {some(sorted(left))}", file=folder)
    parts = gather(rows, {Rank(): tensors}, checkpoint.spec, ONE_RANK).parts
    files = (*checkpoint.files, folder / names[0])
    return replace(checkpoint, parts=parts, files=files)


def _low_rank(src: Lazy, a: Lazy, b: Lazy, module: str, config: Mapping[str, Any], folder: Path) -> LowRank:
    """One module's change.  peft: the scale is alpha / r, or alpha / sqrt(r)."""
    rank = a.shape[0]
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    turned = bool(config.get("fan_in_fan_out"))
    shape = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 and b.shape[1] == rank else None
    if shape is None or (shape[::-1] if turned else shape) != src.shape:
        raise ConfigError(f"the adapter of {module} is {list(b.shape)} x {list(a.shape)}, the weight {list(src.shape)}",
                          file=folder)  # fmt: skip
    if type(alpha) not in (int, float):
        raise ConfigError(f"lora_alpha is {show(alpha)}", file=folder)
    return LowRank(src, a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), turned)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The entry of a pattern whose key a module's name ends in."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
