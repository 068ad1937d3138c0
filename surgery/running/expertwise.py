"""Experts of a layer that are run one after another: each is read, applied to its tokens, and let go.

    for name, module in expert_modules(model).items():              # "model.layers.0.mlp.experts"
        module.forward = one_by_one(module, gate_up, down, torch.float32, on)

transformers holds all experts of a layer as two tensors, [experts, 2 f, h] and [experts, h, f].  Here only one of them
is in memory.  Every token's outputs are summed in the order of its choices, as transformers' grouped products do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from surgery.running.device import Device
from surgery.running.rowwise import Blocks, product
from surgery.tensors.lazy import Lazy

if TYPE_CHECKING:
    import torch

STORED = ("gate_up_proj", "down_proj")


def expert_modules(model: Any) -> dict[str, Any]:
    """The modules that hold the experts of a layer as `STORED`, by name; none of a model that has it otherwise."""
    return {name: module for name, module in model.named_modules() if _known(module)}


def _known(module: Any) -> bool:
    return (
        set(module._parameters) == set(STORED)
        and hasattr(module, "_apply_gate")
        and not (getattr(module, "is_transposed", True) or getattr(module, "has_bias", True))
        and not getattr(module, "has_post_expert_norm", False)
    )


def one_by_one(
    module: Any, gate_up: Lazy, down: Lazy, dtype: torch.dtype, on: Device, blocks: Blocks | None = None
) -> Callable[..., Any]:
    """The `forward` of such a module: hidden [tokens, h], chosen [tokens, k], weights [tokens, k] -> [tokens, h].

    With `blocks`, not even one expert is whole.
    """

    def times(x: Any, stored: Lazy, expert: int) -> Any:
        from torch.nn.functional import linear

        return product(x, blocks.rows(stored, expert)) if blocks else linear(x, on.holds(stored[expert], dtype))

    def forward(hidden: Any, chosen: Any, weights: Any) -> Any:
        import torch

        k = chosen.shape[1]
        wide = torch.promote_types(hidden.dtype, weights.dtype)
        out = hidden.new_zeros(chosen.numel(), hidden.shape[1], dtype=wide)
        weight = weights.reshape(-1, 1)
        for e in range(gate_up.shape[0]):
            places = (chosen.reshape(-1) == e).nonzero().reshape(-1)
            if len(places):
                x = module._apply_gate(times(hidden[places // k], gate_up, e))
                out[places] = times(x, down, e) * weight[places]
            if not (blocks and len(places)):  # which tell it themselves
                on.advance((gate_up.nbytes + down.nbytes) // gate_up.shape[0])
        return out.unflatten(0, (-1, k)).sum(1).to(hidden.dtype)

    return forward
