"""Task vectors (model minus base), thinned in one of four ways, weighted, and added to the base again.

    run = method("magnitude", agree=True)                 # TIES
    run(inputs, {"weight": [1, 1], "density": [0.2, 0.2], "normalize": True, "rescale": False, "lambda": 1.0})

    magnitude   the largest share `density` stays                               TIES, arXiv 2306.01708
    random      each element stays with probability `density`                   DARE, arXiv 2311.03099
    outliers    the largest share `gamma` goes, then the smallest               breadcrumbs, arXiv 2312.06795
    ranks       the probability rises with the rank in the row                  DELLA, arXiv 2406.11617

With `agree`, an element takes part only where its sign is that of the weighted sum.  Formulas: mergekit 0.1.5,
`sparsify.py` and `merge_methods/generalized_task_arithmetic.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError
from surgery.soups.arithmetic import added, sums
from surgery.soups.engine import Block, Inputs, Ready
from surgery.soups.select import Found, Query, bits_of, order

if TYPE_CHECKING:
    import torch

Options = Mapping[str, Any]
Keep = Callable[[Block, int, "torch.Tensor"], "torch.Tensor | None"]  # block, source, delta -> which elements stay
TINY = 1e-7


def method(thinning: str, agree: bool) -> Callable[[Inputs, Options], Ready]:
    """The method of one way of thinning ("" for none)."""

    def run(inputs: Inputs, options: Options) -> Ready:
        if not inputs.count:
            return Ready(lambda block: block.base)
        keep, span = THINNING[thinning](inputs, options)
        factors = _factors(inputs, keep, span) if options["rescale"] and keep is not None else None
        return Ready(_mixer(inputs, options, agree, keep, factors), span)

    return run


def _deltas(block: Block) -> list[torch.Tensor]:
    return [t - block.base for t in block.others]


def _kept(block: Block, i: int, delta: torch.Tensor, keep: Keep | None) -> torch.Tensor:
    mask = keep(block, i, delta) if keep is not None else None
    return delta if mask is None else delta * mask


def _factors(inputs: Inputs, keep: Keep, span: int) -> list[torch.Tensor | None]:
    """What makes the thinned vectors as long (l1) as they were; None where that cannot be said."""
    import torch

    from surgery.lazy import torch_dtype

    def lengths(block: Block) -> list[torch.Tensor]:
        deltas = _deltas(block)
        return [x.abs() for i, d in enumerate(deltas) for x in (d, _kept(block, i, d, keep))]

    if span == 0:
        totals = sums(inputs, lengths)
    else:
        parts = inputs.scan(lambda block: [x.sum() if inputs.single else x.double().sum() for x in lengths(block)],
                            span)  # fmt: skip
        totals = [torch.stack(list(c)).sum() if len(c) > 1 else c[0] for c in zip(*parts, strict=True)]
    kind = torch_dtype(inputs.work)
    out: list[torch.Tensor | None] = []
    for before, after in zip(totals[::2], totals[1::2], strict=True):
        out.append(None if before < TINY or after < TINY else before.to(kind) / after.to(kind))
    return out


def _mixer(
    inputs: Inputs, options: Options, agree: bool, keep: Keep | None, factors: list[torch.Tensor | None] | None
) -> Callable[[Block], torch.Tensor]:
    import torch

    from surgery.lazy import torch_dtype

    dtype = torch_dtype(inputs.work)
    weights = torch.tensor(options["weight"], dtype=dtype)
    total = weights.sum(dim=0)
    total = torch.where(total.abs() < 1e-8, 1, total)

    def weighted(block: Block) -> list[torch.Tensor]:
        out = []
        for i, delta in enumerate(_deltas(block)):
            thin = _kept(block, i, delta, keep)
            factor = factors[i] if factors else None
            out.append((thin if factor is None else (thin * factor).to(dtype)).mul(weights[i]))
        return out

    def apply(block: Block) -> torch.Tensor:
        deltas = weighted(block)
        divisor = total
        if agree:
            up = added(deltas) >= 0
            agreed = [torch.where(up, d > 0, d < 0) for d in deltas]
            mixed = added([d * a for d, a in zip(deltas, agreed, strict=True)])
            if options["normalize"]:
                divisor = added([w * a for w, a in zip(weights, agreed, strict=True)])
                divisor.masked_fill_(divisor == 0, 1)
        else:
            mixed = added(deltas)
        if options["normalize"]:
            mixed /= divisor
        if options["lambda"] != 1:
            mixed *= options["lambda"]
        return block.base + mixed

    return apply


def _none(inputs: Inputs, options: Options) -> tuple[Keep | None, int]:
    return None, 0


def _magnitude(inputs: Inputs, options: Options) -> tuple[Keep, int]:
    """The largest max(1, density * n) elements; of equal ones the first in the tensor."""
    n = inputs.numel
    queries = [Query(i, n - max(1, int(d * n)), True) for i, d in enumerate(options["density"]) if 0 < d < 1 and n]
    found = dict(zip((q.of for q in queries), order(inputs, _magnitudes, queries), strict=True))

    def keep(block: Block, i: int, delta: torch.Tensor) -> torch.Tensor | None:
        import torch

        if options["density"][i] >= 1:
            return None
        return _behind(block, delta, found[i], True) if i in found else torch.zeros_like(delta, dtype=torch.bool)

    return keep, 0


def _magnitudes(block: Block) -> list[torch.Tensor]:
    return [d.abs() for d in _deltas(block)]


def _behind(block: Block, delta: torch.Tensor, found: Found, first_wins: bool) -> torch.Tensor:
    """The element itself and what is larger.  Of equal ones those before it, or (not first_wins) behind it."""
    bits = bits_of(delta.abs())
    equal = bits == found.bits
    more = bits > found.bits
    if equal.any():
        index = block.index()
        more |= equal & ((index <= found.index) if first_wins else (index >= found.index))
    return more


def _outliers(inputs: Inputs, options: Options) -> tuple[Keep, int]:
    """density * n elements, beginning behind the gamma * n largest; of equal ones, the last count as larger."""
    n = inputs.numel
    queries, ranges = [], []
    for i, (density, gamma) in enumerate(zip(options["density"], options["gamma"], strict=True)):
        target = int(density * n)
        low = max(0, n - target - int(gamma * n))
        ranges.append((low, low + target))
        if density < 1:
            queries += [Query(i, rank) for rank in (low, low + target) if 0 < rank < n]
    found = {(q.of, q.rank): f for q, f in zip(queries, order(inputs, _magnitudes, queries), strict=True)}

    def keep(block: Block, i: int, delta: torch.Tensor) -> torch.Tensor | None:
        import torch

        if options["density"][i] >= 1:
            return None
        low, high = ranges[i]
        mask = torch.full(delta.shape, low < high, dtype=torch.bool)
        if (i, low) in found:
            mask &= _behind(block, delta, found[i, low], False)
        if (i, high) in found:
            mask &= ~_behind(block, delta, found[i, high], False)
        return mask

    return keep, 0


def _random(inputs: Inputs, options: Options) -> tuple[Keep, int]:
    """Each element with probability `density`."""
    if bad := [d for d in options["density"] if d < 0]:
        raise ConfigError(f"density is {bad[0]}, no probability")

    def keep(block: Block, i: int, delta: torch.Tensor) -> torch.Tensor | None:
        density = options["density"][i]
        return None if density >= 1 else block.uniform(i) < round(density * (1 << 32))

    return keep, 0


def _ranks(inputs: Inputs, options: Options) -> tuple[Keep, int]:
    """With a probability from density - epsilon (the smallest of a row) to density + epsilon (the largest)."""
    for d, e in zip(options["density"], options["epsilon"], strict=True):
        if 0 < d < 1 and (d + e >= 1 or d - e <= 0):
            raise ConfigError(f"density {d} and epsilon {e}: the probabilities do not lie between 0 and 1")

    def keep(block: Block, i: int, delta: torch.Tensor) -> torch.Tensor | None:
        import torch

        density, epsilon = options["density"][i], options["epsilon"][i]
        if density >= 1:
            return None
        if density <= 0:
            return torch.zeros_like(delta, dtype=torch.bool)
        rows = delta if delta.dim() > 1 else delta.reshape(1, -1)
        ranks = ranks_in_rows(rows.abs()).to(delta.dtype if delta.dtype != torch.float16 else torch.float32) + 1
        low, high = ranks.amin(1, True), ranks.amax(1, True)
        probability = (density - epsilon) + ((ranks - low) / (high - low)).clamp(0, 1) * 2 * epsilon
        probability = probability.nan_to_num(density)  # a row of one element
        return block.uniform(i).double() < probability.double().mul(1 << 32).reshape(delta.shape)

    # rows are the last dimension of a matrix; of stacked matrices (experts) each column of one, as in mergekit
    return keep, 2 if len(inputs.shape) > 2 else 1


def ranks_in_rows(magnitudes: torch.Tensor) -> torch.Tensor:
    """The rank (from 0) of every element along dimension 1; of equal ones the first is the smaller."""
    import numpy as np
    import torch

    if magnitudes.dtype == torch.float64 or magnitudes.shape[1] >= 1 << 31:
        order = torch.sort(magnitudes, dim=1, stable=True).indices
    else:
        lines = magnitudes.movedim(1, -1)
        place = torch.arange(lines.shape[-1])
        keys = (bits_of(lines).long() << 32) | place
        order = torch.from_numpy(np.sort(keys.numpy(), axis=-1)).bitwise_and(0xFFFFFFFF).movedim(-1, 1)
    ranks = torch.empty_like(order)
    shape = [1, -1] + [1] * (order.dim() - 2)
    return ranks.scatter_(1, order, torch.arange(order.shape[1]).reshape(shape).expand_as(order))


THINNING: Mapping[str, Callable[[Inputs, Options], tuple[Keep | None, int]]] = {
    "": _none,
    "magnitude": _magnitude,
    "random": _random,
    "outliers": _outliers,
    "ranks": _ranks,
}
