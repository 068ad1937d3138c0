"""SCE: select where models vary most, calculate their weights, erase minority signs (arXiv 2408.07990).

    sce(inputs, {"select_topk": 0.5}).apply(block)

Formulas: mergekit 0.1.5, `merge_methods/sce.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.merging.engine.arithmetic import added, indicator, oriented, squares, sums, whole
from surgery.merging.engine.inputs import Block, Inputs
from surgery.merging.engine.order_statistics import Found, Query, at_least, integers, order
from surgery.merging.engine.ready import Options, Ready
from surgery.merging.engine.sparsity import NEVER, Bound, between, parts
from surgery.tensors.lazy import torch_dtype

if TYPE_CHECKING:
    import torch

FLOOR = 1e-6


def sce(inputs: Inputs, options: Options) -> Ready:
    """Select where models vary most, calculate their weights, erase minority signs (arXiv 2408.07990)."""
    import numpy as np
    import torch

    if not inputs.count:
        return Ready(lambda block: block.base)
    bound = _most_varied(inputs, options["select_topk"])
    dtype = torch_dtype(inputs.work)

    def vectors(block: Block) -> list[torch.Tensor]:
        deltas = block.deltas()
        if bound == 0:
            return deltas
        varied = at_least(block, _variance(deltas), bound, True) if isinstance(bound, Found) else 0
        return [d * varied for d in deltas]

    def compiled(block: Block) -> torch.Tensor:
        out = torch.zeros(inputs.count, dtype=torch.float64)
        for bits, mask in parts(block, between(block, [(bound, NEVER)], True)):
            block.loops.squares(bits, mask.least[0], out.numpy())
        return out

    if inputs.single and inputs.numel:
        means = torch.cat([v.reshape(1, -1).square().mean(dim=1) for v in whole(inputs, vectors)])
    elif inputs.loops:
        means = (sum(inputs.scan(compiled), torch.zeros(())).to(dtype) / inputs.numel).to(dtype)
    else:
        found = sums(inputs, lambda block: list(map(squares, vectors(block))))
        means = torch.stack([s / inputs.numel for s in found]).to(dtype)
    total = torch.sum(means).item()
    weights = torch.ones_like(means) / len(means) if abs(total) < 1e-6 else means / total

    def apply(block: Block) -> torch.Tensor:
        deltas = vectors(block)
        sign = oriented(deltas)
        own = added([indicator(d, "gt", 0).mul_(w) for w, d in zip(weights, deltas, strict=True)])
        mixed = added([d.mul_(w) for w, d in zip(weights, deltas, strict=True)]).mul_(sign)
        return mixed.div_(own.clamp_(min=FLOOR)).add_(block.base)

    def fused(block: Block, out: Any) -> None:
        at = 0
        for bits, mask in parts(block, between(block, [(bound, NEVER)], True)):
            own = out[at : at + mask.count]
            block.loops.agree(bits, mask.least[0], weights.numpy(), np.float32(FLOOR), own)
            at += mask.count

    return Ready(apply, fused=fused)


def _most_varied(inputs: Inputs, share: float) -> Bound:
    """The least varied of the `share` of those elements that vary at all with the largest variance."""
    import torch

    if share >= 1:
        return 0
    k = 0
    if share > 0:
        counts = inputs.scan(_varying)
        k = int(torch.tensor(sum(counts)) * share)
    if k == 0:
        return NEVER
    return order(inputs, lambda block: [_variances(block)], [Query(0, inputs.numel - k, True)])[0]


def _varying(block: Block) -> int:
    """How many elements vary at all."""
    import numpy as np

    count = -1 if not block.loops else block.loops.varied(block.bits)
    return int(np.count_nonzero(integers(_variances(block)))) if count < 0 else count


def _variances(block: Block) -> Any:
    if not block.loops:
        return _variance(block.deltas())
    out = block.room("values")[0]
    block.loops.variances(block.bits, out)
    return out


def _variance(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The variance over the sources, element by element, by Welford's steps in fp64.

    These are the steps of `torch.var` along the first dimension of stacked tensors, which takes them one element after
    the other and needs eleven times as long.
    """
    import torch

    mean = tensors[0].double()
    total = torch.zeros_like(mean)
    for count, t in enumerate(tensors[1:], 2):
        value = t.double()
        off = value - mean
        mean.add_(off / count)
        total.addcmul_(off, value.sub_(mean))
    return total.div_(len(tensors)).to(tensors[0].dtype)
