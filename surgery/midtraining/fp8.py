"""Products in fp8, by torchao: those of the blocks' linear layers, whose weights stay as they are.

    check_fp8("cuda")                   # raises SurgeryError where there is no torchao, or no GPU that has fp8
    use_fp8(model)                      # before weights are read and divided among processes

Left out are the head, experts that are computed together, routers, and layers whose sizes are no multiples of 16.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from surgery.errors import SurgeryError

CAPABLE = (8, 9)  # Ada, Hopper and later
MULTIPLE = 16


def check_fp8(device: str) -> None:
    """Raises SurgeryError, and says what is missing."""
    if find_spec("torchao") is None:
        hint = "pip install 'checkpoint-surgery[fp8]', or train.precision: autocast"
        raise SurgeryError("train.precision: fp8 needs torchao, which is not installed", hint=hint)
    if not device.startswith("cuda"):
        raise SurgeryError("train.precision: fp8 needs a GPU, this run has none", hint="train.precision: autocast")
    if torch.cuda.get_device_capability(device) < CAPABLE:
        name = torch.cuda.get_device_name(device)
        raise SurgeryError(f"train.precision: fp8: {name} has no fp8", hint="train.precision: autocast")


def use_fp8(model: Any) -> int:
    """Let torchao compute the blocks' linear layers; returns how many they are."""
    from torchao.float8 import convert_to_float8_training

    chosen = [name for name, module in model.base_model.named_modules() if _fits(module)]
    convert_to_float8_training(model.base_model, module_filter_fn=lambda module, name: name in set(chosen))
    return len(chosen)


def _fits(module: Any) -> bool:
    linear = isinstance(module, torch.nn.Linear)
    return linear and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
