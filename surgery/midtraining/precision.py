"""In which precision a model is trained, chosen by what the device can do; the weights that learn are always fp32.

precision = choose("auto", "cpu")      # autocast where a bf16 product is quicker here, else fp32
with precision.computing("cpu"):
    loss = ...

fp32       all of it
autocast   products in bf16, weights, gradients and moments in fp32
fp8        the products of linear layers in fp8 (`fp8.py`), all else as autocast
bf16       what lies between the products in bf16, too: half the memory for activations; what learns is a copy of
           the weights in fp32, which gathers the gradients of all micro-batches (`Masters`)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from surgery.midtraining.fp8 import check_fp8

GAIN = 1.2  # bf16 must be so many times quicker
SIZE = 512  # of the matrices that are tried
SECONDS = 0.025  # per dtype


@dataclass(frozen=True)
class Precision:
    """`why` says what decided."""

    name: str
    why: str

    @property
    def weights(self) -> torch.dtype:
        """Of the module's parameters."""
        return torch.bfloat16 if self.name == "bf16" else torch.float32

    def computing(self, device: str) -> AbstractContextManager[Any]:
        """Around a forward pass."""
        if self.name not in ("autocast", "fp8"):
            return nullcontext()
        return torch.autocast(device.partition(":")[0], dtype=torch.bfloat16)


def choose(wanted: str, device: str) -> Precision:
    """`wanted`, or for "auto" what is quicker without leaving fp32 weights."""
    if wanted == "fp8":
        check_fp8(device)
    if wanted != "auto":
        return Precision(wanted, "as the settings say")
    if device != "cpu":
        fit = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision("autocast", "the GPU has bf16") if fit else Precision("fp32", "the GPU has no bf16")
    gain = bf16_gain()
    return Precision("autocast" if gain >= GAIN else "fp32", f"products in bf16 are {gain:.1f} times as quick here")


def bf16_gain(clock: Callable[[], float] = time.perf_counter) -> float:
    """How many times quicker this CPU multiplies in bf16 than in fp32, by a trial of 50 ms.

    Flags do not tell: where bf16 is emulated it is slow, whatever the processor claims.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(SIZE, SIZE).to(dtype)
        a @ a  # the first product sets things up
        begun, done, best = clock(), 0, 0.0
        while done < 3 or clock() - begun < SECONDS:
            before = clock()
            a @ a
            best, done = max(best, 1 / max(clock() - before, 1e-9)), done + 1
        rates[dtype] = best
    return rates[torch.bfloat16] / rates[torch.float32]


class Masters:
    """fp32 copies of bf16 parameters: they gather the gradients as these come, are updated, and are copied back.

    They take the places of the parameters in the groups of an optimizer.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        for group in groups:
            group["params"] = [self._master(p) for p in group["params"]]

    def _master(self, held: torch.nn.Parameter) -> torch.nn.Parameter:
        if held.dtype == torch.float32:
            return held
        master = torch.nn.Parameter(held.detach().float())
        held.register_post_accumulate_grad_hook(_giver(master))
        self.pairs.append((held, master))
        return master

    def copy_back(self) -> None:
        """After a step."""
        with torch.no_grad():
            for held, master in self.pairs:
                held.copy_(master)


def _giver(master: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
    def give(held: torch.Tensor) -> None:
        assert held.grad is not None
        wide = held.grad.float()
        master.grad = wide if master.grad is None else master.grad.add_(wide)
        held.grad = None

    return give
