"""Clusters of equal size: k-means whose assignment fills every cluster, deterministic for a seed.

    found = balanced(rows, k=8, seed=0, name="layers.3")
    found.labels, found.centres            # rows [n, d]: n // 8 (or one more) of each label; centres [8, d]

Lloyd's algorithm with a balanced assignment: pairs of row and cluster are taken nearest first while there is room, then
rows of two clusters are exchanged as long as that brings them nearer.  Starts are drawn as in k-means++ (Arthur and
Vassilvitskii 2007).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.tensors.random import Random

if TYPE_CHECKING:
    import torch

ROUNDS = 20  # of Lloyd's algorithm
PASSES = 8  # over all pairs of clusters, per assignment
BATCH = 8 << 20  # bytes of rows that are turned into float64 at once


@dataclass(frozen=True)
class Clusters:
    """labels [n] int64 and centres [k, d] float64."""

    labels: torch.Tensor
    centres: torch.Tensor

    def members(self, cluster: int) -> list[int]:
        """The rows of a cluster, ascending."""
        return [int(i) for i in (self.labels == cluster).nonzero().reshape(-1)]


def balanced(rows: torch.Tensor, k: int, seed: int, name: str) -> Clusters:
    """Cluster rows [n, d], n >= k, into k clusters whose sizes differ by one at most."""
    import torch

    n = len(rows)
    assert 0 < k <= n, (n, k)
    centres = _start(rows, k, seed, name)
    labels = torch.full((n,), -1)
    for _ in range(ROUNDS):
        fresh = assigned(_distances(rows, centres))
        if torch.equal(fresh, labels):
            break
        labels = fresh
        centres = _centres(rows, labels, k)
    return Clusters(labels, centres)


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length one; rows of zeros stay."""
    lengths: torch.Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths.clamp(min=1e-12)


def _start(rows: torch.Tensor, k: int, seed: int, name: str) -> torch.Tensor:
    """k rows, each drawn in proportion to its squared distance from those before."""
    import torch

    n = len(rows)
    draws = (Random((k,), "float64", f"{name}.start", seed, bound=1.0).full() + 1) / 2
    picks = [min(n - 1, int(draws[0] * n))]
    nearest = torch.full((n,), torch.inf, dtype=torch.float64)
    for draw in draws[1:]:
        nearest = torch.minimum(nearest, _distances(rows, rows[picks[-1:]].double())[:, 0])
        nearest[picks] = 0
        total = nearest.cumsum(0)
        if float(total[-1]) <= 0:  # fewer different rows than clusters
            picks.append(next(i for i in range(n) if i not in picks))
            continue
        picks.append(min(n - 1, int(torch.searchsorted(total, draw * total[-1], right=True))))
    return rows[picks].double()


def _distances(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances [n, k] in float64."""
    import torch

    step = max(1, BATCH // max(1, 8 * rows.shape[1]))
    lengths = centres.pow(2).sum(1)
    out = []
    for at in range(0, len(rows), step):
        some = rows[at : at + step].double()
        out.append(some.pow(2).sum(1, keepdim=True) - 2 * some @ centres.T + lengths)
    return torch.cat(out).clamp(min=0)


def _centres(rows: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    import torch

    return torch.stack([rows[labels == c].double().mean(0) for c in range(k)])


def assigned(cost: torch.Tensor) -> torch.Tensor:
    """Labels [n] for costs [n, k], every cluster as full as the others; a local optimum of the sum."""
    import torch

    n, k = cost.shape
    room = [n // k + (c < n % k) for c in range(k)]
    labels = [-1] * n
    left = n
    for at in torch.argsort(cost.reshape(-1), stable=True).tolist():
        i, c = divmod(at, k)
        if labels[i] < 0 and room[c]:
            labels[i], room[c], left = c, room[c] - 1, left - 1
            if not left:
                break
    return _exchanged(cost, torch.tensor(labels))


def _exchanged(cost: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Exchange rows between pairs of clusters while the sum falls."""
    k = cost.shape[1]
    for _ in range(PASSES):
        moved = False
        for a in range(k):
            for b in range(a + 1, k):
                moved |= _exchange(cost, labels, a, b)
        if not moved:
            break
    return labels


def _exchange(cost: torch.Tensor, labels: torch.Tensor, a: int, b: int) -> bool:
    """Exchange the best rows of two clusters, best with best, as far as it pays."""
    import torch

    gain: Any = cost[:, b] - cost[:, a]  # of leaving a for b, negative is good; the other way round for b
    of_a, of_b = (labels == a).nonzero().reshape(-1), (labels == b).nonzero().reshape(-1)
    first = of_a[torch.argsort(gain[of_a], stable=True)]
    second = of_b[torch.argsort(-gain[of_b], stable=True)]
    pairs = min(len(first), len(second))
    pays = gain[first[:pairs]] - gain[second[:pairs]] < -1e-12
    count = int(pays.sum())
    labels[first[:count]], labels[second[:count]] = b, a
    return count > 0
