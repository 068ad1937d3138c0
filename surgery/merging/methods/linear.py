"""Weighted sums of models: linear, passthrough, nearswap.

    linear(inputs, {"weight": [0.5, 0.3, 0.2], "normalize": True}).apply(block)

Sources are added in the order of the file.  Formulas: mergekit 0.1.5, `merge_methods/{linear,passthrough,nearswap}.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.errors import ConfigError
from surgery.merging.engine.inputs import Block, Inputs
from surgery.merging.engine.ready import Options, Ready

if TYPE_CHECKING:
    import torch


def linear(inputs: Inputs, options: Options) -> Ready:
    """A weighted mean (model soups, arXiv 2203.05482), in fp32 at least; without `normalize` a weighted sum."""
    import torch

    wide = torch.float64 if inputs.work == "float64" else torch.float32
    weights = torch.tensor(options["weight"], dtype=wide)
    total = weights.reshape(1, -1).sum(dim=1)[0]
    if options["normalize"] and float(total) == 0:
        raise ConfigError("the weights of a linear merge add up to zero", hint="set normalize: false for a plain sum")

    def apply(block: Block) -> torch.Tensor:
        out = torch.zeros(block.tensors[0].shape, dtype=wide)
        for t, weight in zip(block.tensors, weights, strict=True):
            out.addcmul_(t.to(wide), weight)
        if options["normalize"]:
            out.div_(total)
        return out

    given, divisor = weights.numpy(), (total if options["normalize"] else torch.ones((), dtype=wide)).numpy()[()]
    return Ready(apply, fused=lambda block, bits: block.loops.linear(block.bits, given, divisor, bits))


def passthrough(inputs: Inputs, options: Options) -> Ready:
    """The one source, times `scale` if that is given."""
    scale = options["scale"][0]
    return Ready(lambda block: block.tensors[0] if scale is None else block.tensors[0] * scale)


def nearswap(inputs: Inputs, options: Options) -> Ready:
    """The base, pulled towards the other model the more, the closer they are (alchemonaut, QuartetAnemoi)."""

    def apply(block: Block) -> torch.Tensor:
        a, b = block.tensors
        weight: torch.Tensor = (options["t"] / (a - b).abs().clamp(min=1e-6)).clamp(min=0, max=1)
        return weight * b + (1 - weight) * a

    return Ready(apply)
