"""Methods that weigh models by how they agree: Model Stock and SCE.

model_stock(inputs, {"filter_wise": False}).apply(block)

Formulas: mergekit 0.1.5, `merge_methods/{model_stock,sce}.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.soups.arithmetic import added, norms, sums
from surgery.soups.engine import Block, Inputs, Ready
from surgery.soups.select import Query, bits_of, order

if TYPE_CHECKING:
    import torch

Options = Mapping[str, Any]


def model_stock(inputs: Inputs, options: Options) -> Ready:
    """Between the base and the mean, the further out the more the models agree (arXiv 2403.19522).

    The angle is that of whole tensors; with `filter_wise`, of every row.
    """
    import torch

    if options["filter_wise"]:
        return Ready(lambda block: _stock(block, _cosines_of_rows(block)), span=1)
    pairs = [(i, j) for i in range(inputs.count) for j in range(i + 1, inputs.count)]
    lengths = norms(inputs, _offsets)
    dots = sums(inputs, lambda block: [o[i] * o[j] for o in (_offsets(block),) for i, j in pairs])
    cosines = [_cosine(dot, lengths[i], lengths[j]) for dot, (i, j) in zip(dots, pairs, strict=True)]
    mean = torch.stack(cosines).mean(dim=0)
    return Ready(lambda block: _stock(block, mean))


def _offsets(block: Block) -> list[torch.Tensor]:
    return [t - block.base for t in block.others]


def _cosine(dot: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (dot / (a * b).clamp(min=1e-6)).clamp(-1, 1)


def _cosines_of_rows(block: Block) -> torch.Tensor:
    import torch

    offsets = _offsets(block)
    lengths = [torch.norm(o, dim=-1) for o in offsets]
    cosines = [
        _cosine((offsets[i] * offsets[j]).sum(dim=-1), lengths[i], lengths[j])
        for i in range(len(offsets))
        for j in range(i + 1, len(offsets))
    ]
    return torch.stack(cosines).mean(dim=0).unsqueeze(-1)


def _stock(block: Block, cosine: torch.Tensor) -> torch.Tensor:
    import torch

    count = len(block.others)
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6
    t = torch.where(singular, 0, (count * cosine) / torch.where(singular, 1, denominator))
    mean = sum(block.others[1:], block.others[0]) / count
    return t * mean + (1 - t) * block.base


def sce(inputs: Inputs, options: Options) -> Ready:
    """Select where models vary most, calculate their weights, erase minority signs (arXiv 2408.07990)."""
    import torch

    from surgery.lazy import torch_dtype

    if not inputs.count:
        return Ready(lambda block: block.base)
    chosen = _most_varied(inputs, options["select_topk"])
    dtype = torch_dtype(inputs.work)

    def vectors(block: Block) -> list[torch.Tensor]:
        deltas = _offsets(block)
        mask = chosen(block, deltas) if chosen else None
        return deltas if mask is None else [d * mask for d in deltas]

    if inputs.single:
        means = inputs.scan(lambda block: torch.stack(vectors(block)).square().mean(dim=1))[0]
    else:
        squares = sums(inputs, lambda block: [v.double().square() for v in vectors(block)])
        means = torch.stack([s / inputs.numel for s in squares]).to(dtype)
    total = torch.sum(means).item()
    weights = torch.ones_like(means) / len(means) if abs(total) < 1e-6 else means / total

    def apply(block: Block) -> torch.Tensor:
        deltas = vectors(block)
        up = added(deltas) >= 0
        # a zero has neither sign: it is erased everywhere
        own = [w * torch.where(up, d > 0, d < 0) for w, d in zip(weights, deltas, strict=True)]
        mixed = added([d * w for d, w in zip(deltas, own, strict=True)])
        return block.base + mixed / added(own).clamp(min=1e-6)

    return Ready(apply)


def _most_varied(inputs: Inputs, share: float) -> Any:
    """Which elements are among the `share` of those that vary at all with the largest variance; None: all."""
    import torch

    def variance(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.var(torch.stack(list(deltas)), dim=0, unbiased=False)

    if share >= 1:
        return None
    nothing = lambda block, deltas: torch.zeros(deltas[0].shape, dtype=torch.bool)  # noqa: E731
    if share <= 0:
        return nothing
    varied = sum(int(n) for n in inputs.scan(lambda block: torch.count_nonzero(variance(_offsets(block)))))
    k = int(torch.tensor(varied) * share)
    if k == 0:
        return nothing
    found = order(inputs, lambda block: [variance(_offsets(block)).abs()], [Query(0, inputs.numel - k, True)])[0]

    def chosen(block: Block, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        bits = bits_of(variance(deltas).abs())
        return (bits > found.bits) | ((bits == found.bits) & (block.index() <= found.index))

    return chosen
