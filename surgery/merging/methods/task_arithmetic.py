"""Task vectors (model minus base), thinned in one of four ways, weighted, and added to the base again.

    options = {"weight": [1, 1], "density": [0.2, 0.2], "normalize": True, "rescale": False, "lambda": 1.0}
    task_arithmetic(inputs, options, thinning="magnitude", agree=True).apply(block)       # TIES

    magnitude   the largest share `density` stays                               TIES, arXiv 2306.01708
    random      each element stays with probability `density`                   DARE, arXiv 2311.03099
    outliers    the largest share `gamma` goes, then the smallest               breadcrumbs, arXiv 2312.06795
    ranks       the probability rises with the rank in the row                  DELLA, arXiv 2406.11617

With `agree`, an element takes part only where its sign is that of the weighted sum.  Formulas: mergekit 0.1.5,
`sparsify.py` and `merge_methods/generalized_task_arithmetic.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from surgery.merging.engine.arithmetic import added, indicator, oriented, sums
from surgery.merging.engine.inputs import Block, Inputs
from surgery.merging.engine.ready import Fused, Options, Ready
from surgery.merging.engine.sparsity import parts
from surgery.merging.methods.thinning import THINNING, Masks, Thin, Thinning
from surgery.tensors.lazy import torch_dtype

if TYPE_CHECKING:
    import torch

TINY = 1e-7


def task_arithmetic(inputs: Inputs, options: Options, *, thinning: str, agree: bool) -> Ready:
    """The base and the weighted sum of the task vectors, thinned in one of the ways of `THINNING` ("": not at all)."""
    if not inputs.count:
        return Ready(lambda block: block.base)
    way = THINNING[thinning](inputs, options)
    factors = _factors(inputs, way) if options["rescale"] and thinning else [None] * inputs.count
    if way.bitmap:
        way.bitmap.close()
    apply = _mixer(inputs, options, agree, way.thin, factors)
    element_wise = not way.span or (way.bitmap is not None and way.bitmap.complete)
    fused = _fused(inputs, options, agree, way.masks, factors) if element_wise else None
    return Ready(apply, way.span, way.nbytes, fused)


def _factors(inputs: Inputs, way: Thinning) -> list[torch.Tensor | None]:
    """What makes the thinned vectors as long (l1) as they were; None where that cannot be said."""
    import numpy as np
    import torch

    def lengths(block: Block) -> list[torch.Tensor]:
        own = block.deltas()
        thinned = [way.thin(block, i, d).abs() for i, d in enumerate(own)]
        return [x for d, kept in zip(own, thinned, strict=True) for x in (d.abs_(), kept)]

    def compiled(block: Block) -> Any:
        out = np.zeros((inputs.count, 2))
        for bits, own in parts(block, way.masks(block)):
            block.loops.lengths(bits, *own.limits, out)
        return out

    kind = torch_dtype(inputs.work)
    if inputs.loops and inputs.single and inputs.numel:
        totals = _lengths(inputs.all(), way.masks)
    elif inputs.loops:
        added_up = sum(inputs.scan(compiled, way.span), np.zeros((inputs.count, 2)))
        totals = list(torch.from_numpy(added_up).to(kind).reshape(-1))
    else:
        totals = sums(inputs, lengths, way.span)
    out: list[torch.Tensor | None] = []
    for before, after in zip(totals[::2], totals[1::2], strict=True):
        out.append(None if before < TINY or after < TINY else before.to(kind) / after.to(kind))
    return out


def _lengths(block: Block, masks: Masks) -> list[torch.Tensor]:
    """Of a whole small tensor, by torch's own sum: the l1 length of every task vector before and after."""
    import torch

    values, totals = block.room("lengths", 2), []
    made = list(parts(block, masks(block)))
    for i in range(len(block.bits) - 1):
        at = 0
        for bits, own in made:
            before, after = values[:, at : at + own.count]
            block.loops.magnitudes(bits[0], bits[i + 1], before)
            least, most = own.least[i], own.most[i]
            block.loops.thinned(bits[0], bits[i + 1], least, most, own.kept[i], after.view("f4"))
            at += own.count
        values[1] &= 0x7FFFFFFF
        totals += [row.sum() for row in torch.from_numpy(values.view("f4"))]
    return totals


def _mixer(
    inputs: Inputs, options: Options, agree: bool, thin: Thin, factors: Sequence[torch.Tensor | None]
) -> Callable[[Block], torch.Tensor]:
    weights, total = _weights(inputs, options)

    def weighted(block: Block) -> list[torch.Tensor]:
        out = []
        for i, delta in enumerate(block.deltas()):
            kept, factor = thin(block, i, delta), factors[i]
            out.append((kept if factor is None else kept.mul_(factor)).mul_(weights[i]))
        return out

    def apply(block: Block) -> torch.Tensor:
        own = weighted(block)
        divisor = total
        if agree:
            sign = oriented(own)
            mixed = added(own).mul_(sign)
            if options["normalize"]:
                divisor = added([indicator(d, "gt", 0).mul_(w) for w, d in zip(weights, own, strict=True)])
                divisor += indicator(divisor, "eq", 0)
        else:
            mixed = added(own)
        if options["normalize"]:
            mixed /= divisor
        if options["lambda"] != 1:
            mixed *= options["lambda"]
        return mixed.add_(block.base)

    return apply


def _fused(
    inputs: Inputs, options: Options, agree: bool, masks: Masks, factors: Sequence[torch.Tensor | None]
) -> Fused | None:
    """The same as `_mixer`, compiled."""
    import numpy as np

    if not inputs.loops:
        return None
    weights, total = (t.numpy() for t in _weights(inputs, options))
    scales = np.array([1 if f is None else float(f) for f in factors], np.float32)
    how = agree, bool(options["normalize"]), total[()], np.float32(options["lambda"])

    def fused(block: Block, out: Any) -> None:
        at = 0
        for bits, own in parts(block, masks(block)):
            n = bits.shape[1]
            block.loops.mix(bits, *own.limits, scales, weights, *how, out[at : at + n])
            at += n

    return fused


def _weights(inputs: Inputs, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights, and what to divide by where all models take part."""
    import torch

    weights = torch.tensor(options["weight"], dtype=torch_dtype(inputs.work))
    total = weights.sum(dim=0)
    return weights, torch.where(total.abs() < 1e-8, 1, total)
