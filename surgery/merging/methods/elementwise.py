"""Methods that look at one element of every source at a time.

linear(inputs, {"weight": [0.5, 0.3, 0.2], "normalize": True}).apply(block)

Sources are added in the order of the file.  Formulas: mergekit 0.1.5, `merge_methods/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError
from surgery.merging.engine.arithmetic import added
from surgery.merging.engine.inputs import Block, Inputs
from surgery.merging.engine.merged import Ready

if TYPE_CHECKING:
    import torch

Options = Mapping[str, Any]


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
    return Ready(apply, fused=lambda block, bits: block.kernels.linear(block.bits, given, divisor, bits))


def passthrough(inputs: Inputs, options: Options) -> Ready:
    """The one source, times `scale` if that is given."""
    scale = options["scale"][0]
    return Ready(lambda block: block.tensors[0] if scale is None else block.tensors[0] * scale)


def nearswap(inputs: Inputs, options: Options) -> Ready:
    """The base, pulled towards the other model the more, the closer they are (alchemonaut, QuartetAnemoi)."""

    def apply(block: Block) -> torch.Tensor:
        a, b = block.tensors
        weight = (options["t"] / (a - b).abs().clamp(min=1e-6)).clamp(min=0, max=1)
        return weight * b + (1 - weight) * a

    return Ready(apply)


def ram(inputs: Inputs, options: Options) -> Ready:
    """Task vectors averaged over the models that changed an element (arXiv 2601.13572)."""
    return Ready(lambda block: _ram(block, options["epsilon"], None))


def ramplus_tl(inputs: Inputs, options: Options) -> Ready:
    """As ram; elements that one model alone changed are enlarged by that model's share of common changes."""
    import torch

    if not inputs.count:
        return Ready(lambda block: block.base)

    def count(block: Block) -> torch.Tensor:
        changed = _changed(block, options["epsilon"])
        contributors = changed.sum(0)
        return torch.stack([(changed & (contributors > 1)).sum(1), (changed & (contributors == 1)).sum(1)])

    shared, unique = torch.stack(inputs.scan(count)).sum(0)
    rho = shared / unique.clamp(min=options["epsilon"])
    scales = 1 + options["r"] * rho.clamp(min=0, max=options["alpha"])
    return Ready(lambda block: _ram(block, options["epsilon"], scales))


def _changed(block: Block, epsilon: float) -> torch.Tensor:
    """[models, elements]: where a model's task vector is larger than epsilon."""
    import torch

    return torch.stack([delta.reshape(-1).abs() > epsilon for delta in block.deltas()])


def _ram(block: Block, epsilon: float, scales: torch.Tensor | None) -> torch.Tensor:
    base = block.base
    if not block.others:
        return base
    deltas = block.deltas()
    changed = [d.abs() > epsilon for d in deltas]
    contributors = sum(c.long() for c in changed)
    assert not isinstance(contributors, int)
    unique, common, divisor = contributors == 1, contributors > 1, contributors.clamp(min=1)
    terms = []
    for i, (delta, own) in enumerate(zip(deltas, changed, strict=True)):
        kept = delta * own
        alone = kept * unique
        # the scale is fp32 (a tensor, not a number), which makes the rest so
        terms.append((alone if scales is None else alone * scales[i : i + 1]) + kept * common / divisor)
    return base + added(terms)
