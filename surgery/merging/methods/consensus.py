"""Methods that weigh models by how they agree: Model Stock and SCE.

model_stock(inputs, {"filter_wise": False}).apply(block)

Formulas: mergekit 0.1.5, `merge_methods/{model_stock,sce}.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.merging.engine.arithmetic import added, mask, norms, oriented, squares, sums, totals, whole
from surgery.merging.engine.inputs import Block, Inputs
from surgery.merging.engine.keep import NEVER, Bound, between, parts
from surgery.merging.engine.merged import Ready
from surgery.merging.engine.order_statistics import Found, Query, behind, integers, order

if TYPE_CHECKING:
    import torch

Options = Mapping[str, Any]
FLOOR = 1e-6


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
    share = _share(inputs.count, mean)

    def fused(block: Block, out: Any) -> None:
        t, rest = (x.reshape(()).numpy()[()] for x in (share, 1 - share))
        block.kernels.stock(block.bits, t, rest, out)

    return Ready(lambda block: _stock(block, mean), fused=fused)


def _products(inputs: Inputs, pairs: Sequence[tuple[int, int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The norms of all offsets from the base, and the products of pairs of them."""
    import numpy as np
    import torch

    from surgery.tensors.lazy import torch_dtype

    def products(block: Block) -> Iterator[torch.Tensor]:
        offsets = block.deltas()
        yield from (offsets[i] * offsets[j] for i, j in pairs)

    def all_products(block: Block) -> Iterator[torch.Tensor]:
        yield from map(squares, block.deltas())
        yield from products(block)

    def compiled(block: Block) -> torch.Tensor:
        first, second = np.array([(i, i) for i in range(inputs.count)] + list(pairs)).T.copy()
        out = torch.zeros(len(first), dtype=torch.float64)
        block.kernels.products(block.bits, first, second, out.numpy())
        return out

    if inputs.single:
        return norms(inputs, Block.deltas), sums(inputs, lambda block: list(products(block)))
    found = list(sum(inputs.scan(compiled), torch.zeros(()))) if inputs.stored else totals(inputs, all_products)
    dtype = torch_dtype(inputs.work)
    lengths = [s.sqrt().to(dtype) for s in found[: inputs.count]]
    return lengths, [d.to(dtype) for d in found[inputs.count :]]


def _cosine(dot: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (dot / (a * b).clamp(min=1e-6)).clamp(-1, 1)


def _cosines_of_rows(block: Block) -> torch.Tensor:
    import torch

    offsets = block.deltas()
    lengths = [torch.norm(o, dim=-1) for o in offsets]
    cosines = [
        _cosine((offsets[i] * offsets[j]).sum(dim=-1), lengths[i], lengths[j])
        for i in range(len(offsets))
        for j in range(i + 1, len(offsets))
    ]
    return torch.stack(cosines).mean(dim=0).unsqueeze(-1)


def _stock(block: Block, cosine: torch.Tensor) -> torch.Tensor:
    t = _share(len(block.others), cosine)
    mean = sum(block.others[1:], block.others[0]) / len(block.others)
    return t * mean + (1 - t) * block.base


def _share(count: int, cosine: torch.Tensor) -> torch.Tensor:
    """How far from the base to the mean."""
    import torch

    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6
    return torch.where(singular, 0, (count * cosine) / torch.where(singular, 1, denominator))


def sce(inputs: Inputs, options: Options) -> Ready:
    """Select where models vary most, calculate their weights, erase minority signs (arXiv 2408.07990)."""
    import numpy as np
    import torch

    from surgery.tensors.lazy import torch_dtype

    if not inputs.count:
        return Ready(lambda block: block.base)
    bound = _most_varied(inputs, options["select_topk"])
    dtype = torch_dtype(inputs.work)

    def vectors(block: Block) -> list[torch.Tensor]:
        deltas = block.deltas()
        if bound == 0:
            return deltas
        varied = behind(block, _variance(deltas), bound, True) if isinstance(bound, Found) else 0
        return [d * varied for d in deltas]

    def compiled(block: Block) -> torch.Tensor:
        out = torch.zeros(inputs.count, dtype=torch.float64)
        for bits, pick in parts(block, between(block, [(bound, NEVER)], True)):
            block.kernels.squares(bits, pick.least[0], out.numpy())
        return out

    if inputs.single and inputs.numel:
        means = torch.stack(whole(inputs, vectors)).square().mean(dim=1)
    elif inputs.stored:
        means = (sum(inputs.scan(compiled), torch.zeros(())).to(dtype) / inputs.numel).to(dtype)
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
        return mixed.div_(own.clamp_(min=FLOOR)).add_(block.base)

    def fused(block: Block, out: Any) -> None:
        at = 0
        for bits, pick in parts(block, between(block, [(bound, NEVER)], True)):
            own = out[at : at + pick.count]
            block.kernels.agree(bits, pick.least[0], weights.numpy(), np.float32(FLOOR), own)
            at += pick.count

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

    count = -1 if block.bits is None else block.kernels.varied(block.bits)
    return int(np.count_nonzero(integers(_variances(block)))) if count < 0 else count


def _variances(block: Block) -> Any:
    if block.bits is None:
        return _variance(block.deltas())
    out = block.room("values")[0]
    block.kernels.variances(block.bits, out)
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
