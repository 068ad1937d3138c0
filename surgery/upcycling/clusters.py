"""Clusters of equal size, and neurons given to experts by importance: plain functions of tensors.

centres, label = kmeans(x, 8, seed=0)              # by angle, so that the largest product is the nearest centre
label = balanced(x, 8, seed=0)                     # every cluster gets as many rows
experts = assigned(scores, 96)                     # scores [experts, neurons] -> neurons of each expert
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.upcycling.chance import permutation

if TYPE_CHECKING:
    import torch

ROUNDS = 30


def kmeans(x: torch.Tensor, k: int, seed: int = 0, equal: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit centres [k, width] and the cluster of every row of `x` [n, width], by angle.

    `equal`: every cluster has n / k rows, as near as that goes.  The first centres, far apart, depend on the seed.
    """
    import torch

    x = torch.nn.functional.normalize(x.float(), dim=1)
    first = permutation(seed, f"kmeans {tuple(x.shape)} {k}", len(x))[0]
    picked = [first]
    nearest = x @ x[first]
    while len(picked) < k:
        picked.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, x @ x[picked[-1]])
    centres, label = x[picked], torch.full((len(x),), -1)
    for _ in range(ROUNDS):
        near = x @ centres.T
        new = _filled(near) if equal else near.argmax(1)
        if torch.equal(new, label):
            break
        label = new
        sums = torch.zeros_like(centres).index_add_(0, label, x)
        empty = sums.norm(dim=1) == 0
        sums[empty] = centres[empty]
        centres = torch.nn.functional.normalize(sums, dim=1)
    return centres, label


def balanced(x: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
    """The cluster of every row, all clusters of the same size."""
    return kmeans(x, k, seed, equal=True)[1]


def _filled(near: torch.Tensor) -> torch.Tensor:
    """Rows to columns, the nearest pairs first, until columns are full."""
    import torch

    n, k = near.shape
    label, room, left = torch.full((n,), -1), [-(-n // k)] * k, n
    if n % k == 0:
        room = [n // k] * k
    for place in near.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, k)
        if room[column] and int(label[row]) < 0:
            label[row] = column
            room[column] -= 1
            left -= 1
            if not left:
                break
    return label


def assigned(scores: torch.Tensor, size: int, sharing: bool = False) -> list[list[int]]:
    """The neurons of every expert, `size` each, by importance [experts, neurons]: the highest scores first, each neuron
    once; with `sharing` every expert takes its own best, whoever else has them."""
    if sharing:
        return [sorted(row.topk(size).indices.tolist()) for row in scores]
    label = _filled(scores.T)
    return [(label == e).nonzero().flatten().tolist() for e in range(len(scores))]


def residual(scores: torch.Tensor, size: int, count: int) -> list[int]:
    """`count` neurons for an expert that is always on: those that most experts have among their best `size`, the more
    important ones first."""
    import torch

    best = torch.zeros_like(scores).scatter(1, scores.topk(size, 1).indices, 1.0).sum(0)
    total = scores.sum(0) / scores.sum().clamp_min(1e-30)
    return sorted((best + total / (1 + total.max())).argsort(descending=True, stable=True)[:count].tolist())
