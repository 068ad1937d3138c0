"""The Karcher mean: the point on the sphere nearest to all models (arXiv 2603.04972).

    karcher(inputs, {"max_iter": 10, "tol": 1e-5}).apply(block)

Formulas: mergekit 0.1.5, `merge_methods/karcher.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.merging.engine.arithmetic import added
from surgery.merging.engine.inputs import PIECE, Block, Inputs
from surgery.merging.engine.ready import Options, Ready

if TYPE_CHECKING:
    import torch


def karcher(inputs: Inputs, options: Options) -> Ready:
    """The Karcher mean of equal weights on the sphere, times the mean of the norms (arXiv 2603.04972)."""
    if inputs.count == 1:
        return Ready(lambda block: block.tensors[0])
    if inputs.single:
        return _karcher_whole(inputs, options)
    return _karcher_span(inputs, options)


def _karcher_whole(inputs: Inputs, options: Options) -> Ready:
    """Iterated on the elements, in the working dtype: mergekit's own steps, for tensors of one chunk."""
    import torch

    wide = torch.float64 if inputs.work == "float64" else torch.float32
    tol, tensors = options["tol"], inputs.all().tensors
    kind = tensors[0].dtype

    def size(t: torch.Tensor) -> torch.Tensor:
        length: torch.Tensor = torch.linalg.vector_norm(t.to(wide))
        return length

    lengths = [size(t) for t in tensors]
    units = [(t / n).to(kind) for t, n in zip(tensors, lengths, strict=True) if n > tol]
    if not units:
        return Ready(lambda block: torch.zeros_like(block.tensors[0]))
    mean = torch.zeros_like(units[0])
    alpha = (1.0 / len(tensors)) / sum([1.0 / len(tensors)] * len(units))
    for unit in units:
        mean += alpha * unit
    mean = units[0].clone() if size(mean) < tol else (mean / size(mean)).to(kind)
    for _ in range(options["max_iter"]):
        tangent = torch.zeros_like(mean)
        for unit in units:
            dot = torch.clamp(torch.dot(mean.flatten(), unit.flatten()), -1.0, 1.0)
            theta = torch.arccos(dot)
            if theta.item() >= tol:
                tangent += alpha * (theta / torch.sin(theta)) * (unit - dot * mean)
        step = size(tangent)
        if step.item() < tol:
            break
        mean = (torch.cos(step) * mean + torch.sin(step) * (tangent / step)).to(kind)
        if size(mean).item() > tol:
            mean = (mean / size(mean)).to(kind)
    whole = sum(1.0 / len(tensors) * n for n in lengths) * mean
    assert isinstance(whole, torch.Tensor)
    return Ready(lambda block: _part(whole, block), nbytes=whole.nbytes)


def _part(whole: torch.Tensor, block: Block) -> torch.Tensor:
    assert block.box is not None
    return whole[tuple(slice(a, b) for a, b in block.box)]


def _karcher_span(inputs: Inputs, options: Options) -> Ready:
    """The same iteration in the span of the sources: all it needs are their products with each other, in fp64."""
    import torch

    def products(block: Block) -> list[list[float]]:
        stacked = torch.empty(len(block.tensors), block.numel, dtype=torch.float64)
        for row, t in zip(stacked, block.tensors, strict=True):
            row.copy_(t.reshape(-1))
        return (stacked @ stacked.T).tolist()

    gram = torch.tensor(inputs.scan(products, size=PIECE // inputs.crowd), dtype=torch.float64).sum(0)
    lengths, tol = gram.diagonal().sqrt(), options["tol"]
    used = lengths > tol
    if not used.any():
        return Ready(lambda block: torch.zeros_like(block.tensors[0]))
    gram = gram / torch.where(used, lengths, 1).outer(torch.where(used, lengths, 1))
    one = torch.eye(len(lengths), dtype=torch.float64)
    active = used.nonzero().reshape(-1).tolist()
    alpha = 1.0 / len(active)

    def size(c: torch.Tensor) -> torch.Tensor:
        return (c @ gram @ c).clamp(min=0).sqrt()

    mean = used.double() * alpha  # coefficients of the unit vectors
    mean = one[active[0]] if size(mean) < tol else mean / size(mean)
    for _ in range(options["max_iter"]):
        tangent = torch.zeros_like(mean)
        for i in active:
            dot = (mean @ gram[i]).clamp(-1, 1)
            theta = torch.arccos(dot)
            if theta >= tol:
                tangent += alpha * (theta / torch.sin(theta)) * (one[i] - dot * mean)
        step = size(tangent)
        if step < tol:
            break
        mean = torch.cos(step) * mean + torch.sin(step) * (tangent / step)
        mean = mean / size(mean)
    weights = lengths.mean() * mean / torch.where(used, lengths, 1)
    dtype = inputs.work
    scaled = weights.to(torch.float64 if dtype == "float64" else torch.float32)
    return Ready(lambda block: added([t * w for t, w in zip(block.tensors, scaled, strict=True)]))
