"""Methods that weigh models by how they agree: Model Stock and SCE.

model_stock(inputs, {"filter_wise": False}).apply(block)

Formulas: mergekit 0.1.5, `merge_methods/{model_stock,sce}.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.soups.arithmetic import added, mask, norms, oriented, squares, sums, totals, whole
from surgery.soups.engine import Block, Inputs, Ready
from surgery.soups.select import Query, behind, order

if TYPE_CHECKING:
    import torch

Options = Mapping[str, Any]
Varied = Callable[[Block, "Sequence[torch.Tensor]"], "torch.Tensor"]


def model_stock(inputs: Inputs, options: Options) -> Ready:
    """Between the base and the mean, the further out the more the models agree (arXiv 2403.19522).

    The angle is that of whole tensors; with `filter_wise`, of every row.
    """
    import torch

    if options["filter_wise"]:
        return Ready(lambda block: _stock(block, _cosines_of_rows(block)), span=1)
    pairs = [(i, j) for i in range(inputs.count) for j in range(i + 1, inputs.count)]
    lengths, dots = _products(inputs, pairs)
    cosines = [_cosine(dot, lengths[i], lengths[j]) for dot, (i, j) in zip(dots, pairs, strict=True)]
    mean = torch.stack(cosines).mean(dim=0)
    return Ready(lambda block: _stock(block, mean))


def _products(inputs: Inputs, pairs: Sequence[tuple[int, int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The norms of all offsets from the base, and the products of pairs of them."""
    from surgery.lazy import torch_dtype

    def products(block: Block) -> Iterator[torch.Tensor]:
        offsets = _offsets(block)
        yield from (offsets[i] * offsets[j] for i, j in pairs)

    def all_products(block: Block) -> Iterator[torch.Tensor]:
        yield from map(squares, _offsets(block))
        yield from products(block)

    if inputs.single:
        return norms(inputs, _offsets), sums(inputs, lambda block: list(products(block)))
    found, dtype = totals(inputs, all_products), torch_dtype(inputs.work)
    lengths = [s.sqrt().to(dtype) for s in found[: inputs.count]]
    return lengths, [d.to(dtype) for d in found[inputs.count :]]


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
    varied = _most_varied(inputs, options["select_topk"])
    dtype = torch_dtype(inputs.work)

    def vectors(block: Block) -> list[torch.Tensor]:
        deltas = _offsets(block)
        return deltas if varied is None else [d * chosen for chosen in (varied(block, deltas),) for d in deltas]

    if inputs.single and inputs.numel:
        means = torch.stack(whole(inputs, vectors)).square().mean(dim=1)
    else:
        found = sums(inputs, lambda block: list(map(squares, vectors(block))))
        means = torch.stack([s / inputs.numel for s in found]).to(dtype)
    total = torch.sum(means).item()
    weights = torch.ones_like(means) / len(means) if abs(total) < 1e-6 else means / total

    def apply(block: Block) -> torch.Tensor:
        deltas = vectors(block)
        sign = oriented(deltas)
        own = added([mask(d, "gt", 0).mul_(w) for w, d in zip(weights, deltas, strict=True)])
        mixed = added([d.mul_(w) for w, d in zip(weights, deltas, strict=True)]).mul_(sign)
        return mixed.div_(own.clamp_(min=1e-6)).add_(block.base)

    return Ready(apply)


def _most_varied(inputs: Inputs, share: float) -> Varied | None:
    """A mask of what is among the `share` of those elements that vary at all with the largest variance; None: all."""
    import torch

    if share >= 1:
        return None
    k = 0
    if share > 0:
        k = int(torch.tensor(sum(inputs.scan(lambda block: int(_variance(_offsets(block)).count_nonzero())))) * share)
    if k == 0:
        return lambda block, deltas: torch.zeros_like(deltas[0])
    found = order(inputs, lambda block: [_variance(_offsets(block))], [Query(0, inputs.numel - k, True)])[0]
    return lambda block, deltas: behind(block, _variance(deltas), found, True)


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
