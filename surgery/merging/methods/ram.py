"""RAM: task vectors averaged over the models that changed an element (arXiv 2601.13572), and RAM+.

    ram(inputs, {"epsilon": 1e-5}).apply(block)

Formulas: mergekit 0.1.5, `merge_methods/ram.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.merging.engine.arithmetic import added
from surgery.merging.engine.inputs import Block, Inputs
from surgery.merging.engine.ready import Options, Ready

if TYPE_CHECKING:
    import torch


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

    shared, unique = torch.stack(inputs.scan(count, size=inputs.piece)).sum(0)
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
