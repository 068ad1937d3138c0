"""Spherical interpolation: slerp, nuslerp (by weights, of models or task vectors), multislerp (of several models).

    slerp(inputs, {"t": 0.5}).apply(block)

Each asks for norms and products over the whole tensor first; what is left is a weighted sum per element.
Formulas: mergekit 0.1.5, `merge_methods/{slerp,nuslerp,multislerp}.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.errors import LayoutError
from surgery.merging.engine.arithmetic import added, norms, sums
from surgery.merging.engine.inputs import CHUNK, Block, Inputs
from surgery.merging.engine.ready import Options, Ready
from surgery.tensors.lazy import torch_dtype

if TYPE_CHECKING:
    import torch

COLINEAR = 0.9995


def slerp(inputs: Inputs, options: Options) -> Ready:
    """The base at t = 0, the other model at t = 1, the shorter arc between; nearly parallel tensors are averaged.

    In fp32 at least, in chunks of 2^20 elements, as mergekit.
    """
    import torch

    wide = torch.float64 if inputs.work == "float64" else torch.float32
    t = torch.tensor([[options["t"]]]).to(wide)

    def lengths(block: Block) -> list[float]:
        return [float(torch.linalg.vector_norm(x.to(wide).reshape(1, -1), dim=1)) for x in block.tensors]

    parts = torch.tensor(inputs.scan(lengths, size=CHUNK), dtype=wide)  # [chunks, 2]
    norm = [torch.linalg.vector_norm(parts[:, i].reshape(-1, 1, 1), dim=0) for i in range(2)]
    a_norm, b_norm = (torch.where(n > 1e-8, n, 1) for n in norm)

    def product(block: Block) -> float:
        a, b = (x.to(wide).reshape(1, -1) for x in block.tensors)
        return float((a / a_norm).mul_(b / b_norm).sum(dim=1))

    dots = torch.tensor(inputs.scan(product, size=CHUNK), dtype=wide).reshape(-1, 1, 1)
    dot = dots.sum(dim=0).clamp(-1, 1)
    straight = dot.abs() > COLINEAR
    theta = torch.acos(torch.where(straight, 0, dot))
    sin = torch.sin(theta)
    of_a = torch.where(straight, 1 - t, torch.sin((1 - t) * theta) / sin).reshape(())
    of_b = torch.where(straight, t, torch.sin(t * theta) / sin).reshape(())
    factors = of_a.numpy()[()], of_b.numpy()[()]
    return Ready(
        lambda block: of_a * block.tensors[0].to(wide) + of_b * block.tensors[1].to(wide),
        fused=lambda block, bits: block.loops.blend(block.bits, *factors, bits),
    )


def nuslerp(inputs: Inputs, options: Options) -> Ready:
    """slerp by relative weights, of the models or (with a base) of their task vectors; whole tensors or rows."""
    first, second = options["weight"]
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total

    def vectors(block: Block) -> list[torch.Tensor]:
        return block.deltas() if inputs.based else block.others

    if not options["nuslerp_flatten"] and len(inputs.shape) > 0:
        dim = 0 if options["nuslerp_row_wise"] else -1

        def rows(block: Block) -> torch.Tensor:
            a, b = (v.transpose(dim, -1) if dim != -1 else v for v in vectors(block))
            made = _arc(t, a, b, None, None, None)
            made = made.transpose(dim, -1) if dim != -1 else made
            return block.base + made if inputs.based else made

        # along the rows a block holds whole rows; along the first dimension it would hold the whole tensor
        if dim == -1 or len(inputs.shape) == 1 or inputs.single:
            return Ready(rows, 1 if dim == -1 else len(inputs.shape))
        return _columns(inputs, t, vectors)
    lengths = norms(inputs, vectors)
    a_norm, b_norm = (n.clamp(min=1e-7) for n in lengths)
    cos = sums(inputs, lambda block: [_times(vectors(block), a_norm, b_norm)])[0]

    def apply(block: Block) -> torch.Tensor:
        a, b = vectors(block)
        made = _arc(t, a, b, a_norm, b_norm, cos)
        return block.base + made if inputs.based else made

    return Ready(apply)


def _columns(inputs: Inputs, t: float, vectors: Any) -> Ready:
    """nuslerp along the first dimension: norms and products of all columns at once, then element by element."""
    import torch

    dtype = torch_dtype(inputs.work)

    def add(fn: Any) -> list[torch.Tensor]:
        parts = inputs.scan(lambda block: [v.double().sum(0) for v in fn(block)], len(inputs.shape) - 1, inputs.piece)
        return [torch.stack(list(column)).sum(0) for column in zip(*parts, strict=True)]

    a_norm, b_norm = (
        s.sqrt().to(dtype).clamp(min=1e-7) for s in add(lambda block: [v.square() for v in vectors(block)])
    )
    cos = add(lambda block: [_times(vectors(block), a_norm, b_norm)])[0].to(dtype)

    def apply(block: Block) -> torch.Tensor:
        a, b = vectors(block)
        made = _arc(t, a, b, a_norm, b_norm, cos)
        return block.base + made if inputs.based else made

    return Ready(apply, len(inputs.shape) - 1, 3 * a_norm.nbytes)


def _times(pair: list[torch.Tensor], a_norm: torch.Tensor, b_norm: torch.Tensor) -> torch.Tensor:
    return (pair[0] / a_norm) * (pair[1] / b_norm)


def _arc(t: float, a: torch.Tensor, b: torch.Tensor, a_norm: Any, b_norm: Any, cos: Any) -> torch.Tensor:
    """The point t of the arc from a to b; without norms these are taken along the last dimension."""
    import torch

    if cos is None:
        a_norm, b_norm = (torch.norm(v, dim=-1, keepdim=True).clamp(min=1e-7) for v in (a, b))
        cos = torch.sum(_times([a, b], a_norm, b_norm), dim=-1, keepdim=True)
    cos = cos.clamp(-1, 1)
    straight = (1 - cos.square()) <= 1e-16
    theta = torch.acos(torch.where(straight, 0, cos))
    made = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)
    return torch.where(straight, (1 - t) * a + t * b, made)


def multislerp(inputs: Inputs, options: Options) -> Ready:
    """The weighted centre of several tensors on a sphere, by one step in the tangent space at their mean."""
    import torch

    if inputs.count == 1:
        return Ready(lambda block: block.others[0])
    weights = torch.tensor(options["weight"], dtype=torch_dtype(inputs.work))
    if options["normalize_weights"]:
        weights = weights / weights.sum()
    eps = options["eps"]

    def vectors(block: Block) -> list[torch.Tensor]:
        return block.deltas() if inputs.based else block.others

    lengths = norms(inputs, vectors)

    def units(block: Block) -> list[torch.Tensor]:
        return [v / (n + eps) for v, n in zip(vectors(block), lengths, strict=True)]

    def weighted(tensors: list[torch.Tensor]) -> torch.Tensor:
        return added([v * w for v, w in zip(tensors, weights, strict=True)])

    size = norms(inputs, lambda block: [weighted(units(block))])[0]
    if size < eps:
        if inputs.count != 2:
            raise LayoutError("the weighted sum of the tensors is zero", hint="change the weights")
        return Ready(lambda block: _based(block, vectors(block)[0] * weights[0] + vectors(block)[1] * weights[1]))

    dots = sums(inputs, lambda block: [u * (weighted(units(block)) / size) for u in units(block)])

    def tangent(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        own = units(block)
        mean = weighted(own) / size
        return mean, weighted([u - d * mean for u, d in zip(own, dots, strict=True)])

    angle = norms(inputs, lambda block: [tangent(block)[1]])[0] + eps
    scale = (torch.stack(lengths) * weights).sum()

    def apply(block: Block) -> torch.Tensor:
        mean, towards = tangent(block)
        return _based(block, (mean * torch.cos(angle) + towards * (torch.sin(angle) / angle)) * scale)

    return Ready(apply)


def _based(block: Block, made: torch.Tensor) -> torch.Tensor:
    return made + block.base if block.inputs.based else made
