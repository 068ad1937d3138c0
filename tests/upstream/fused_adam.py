"""A FusedAdam for the CPU, which keeps its books as those of Transformer Engine and Apex do.

    FusedAdam([{"params": parameters}], lr=1e-3)
    stand_in()                                     # who imports apex.optimizers from now on gets this one

Groups count updates, in whole numbers; parameters have no state but the moments, and any other ends in an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW by its formula."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01, bias_correction: bool = True, adam_w_mode: bool = True, **_: object,
    ) -> None:  # fmt: skip
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "bias_correction": bias_correction})  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if odd := {name for state in self.state.values() for name in state} - {"exp_avg", "exp_avg_sq"}:
            raise KeyError(f"FusedAdam knows no {odd}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            t = group["step"] = group.get("step", 0) + 1
            if type(t) is not int:
                raise TypeError(f"a kernel takes whole numbers, not {t!r}")
            one, two = group["betas"]
            first, second = (1 - one**t, 1 - two**t) if group["bias_correction"] else (1.0, 1.0)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - one)
                v.mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(m, (v.sqrt() / second**0.5).add_(group["eps"]), value=-group["lr"] / first)


def stand_in() -> None:
    """Take the place of Apex's optimizers; the rest of Apex is still missing."""
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam, optimizers.FusedSGD = FusedAdam, torch.optim.SGD  # type: ignore[attr-defined]
    sys.modules["apex.optimizers"] = optimizers
