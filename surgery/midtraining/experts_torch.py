"""Experts by torch alone: the plain loop, which all others must equal, and `grouped_mm`.

    y_TH = loop(module, x_TH, experts_TK, weights_TK)

Arguments as transformers' experts interface gives them: x [tokens, width], the numbers of the experts that each token
chose [tokens, k], and what their outputs are weighted by [tokens, k].  Letters: see experts_layout.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.midtraining.experts_layout import (
    activated,
    combined,
    computation_dtype,
    expert_weights,
    finished,
    gathered,
    here,
    ordered,
)

ALIGNMENT = 16  # bytes: what torch asks of the rows of a grouped product


def loop(module: Any, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """One expert after another, on the tokens that chose it; summed in fp32."""
    experts, weights = here(module, experts, weights)
    w, y = expert_weights(module), torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    ups, downs = w.up.unbind(), w.down.unbind()
    for e in range(module.num_experts):
        token, choice = torch.where(experts == e)
        rows = x[token].to(w.up.dtype) @ ups[e]
        rows = activated(module, rows if w.up_bias is None else rows + w.up_bias[e]) @ downs[e]
        rows = finished(module, rows if w.down_bias is None else rows + w.down_bias[e])
        y.index_add_(0, token, (rows * weights[token, choice, None]).to(y.dtype))
    return y.to(x.dtype)


def grouped_mm(module: Any, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """All experts in one product, torch.nn.functional.grouped_mm: on a GPU one kernel, on a CPU a loop in C++.

    transformers has a function of the same name; under autocast that one goes on in fp32, this one does not.
    """
    experts, weights = here(module, experts, weights)
    w, pairs = expert_weights(module), ordered(experts, module.num_experts)
    multiply = F.grouped_mm if w.up.dtype == torch.bfloat16 else uncompiled_grouped_mm
    rows = multiply(gathered(x.to(w.up.dtype), pairs), w.up, offs=pairs.ends)
    rows = activated(module, rows if w.up_bias is None else rows + w.up_bias[pairs.experts])
    rows = multiply(rows, w.down, offs=pairs.ends)
    rows = finished(module, rows if w.down_bias is None else rows + w.down_bias[pairs.experts])
    return combined(rows, weights, pairs).to(x.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def uncompiled_grouped_mm(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """torch.compile knows the function in bf16 alone."""
    product: Tensor = F.grouped_mm(rows, weight, offs=offs)
    return product


def no_grouped_mm(module: Any) -> str:
    """Why torch cannot multiply this module's experts in groups; "" if it can."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm; 2.10 is the first that has"
    up, down = (module.gate_up_proj if module.has_gate else module.up_proj), module.down_proj
    width = computation_dtype(up).itemsize
    sizes = {*up.shape[1:], *down.shape[1:]}
    odd = sorted(n for n in sizes if n * width % ALIGNMENT)
    return f"rows of {odd[0]} numbers are no multiple of {ALIGNMENT} bytes" if odd else ""
