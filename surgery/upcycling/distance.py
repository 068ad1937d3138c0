"""How far the logits of two runs are apart: the largest difference, KL, perplexities, by blocks of the vocabulary.

    apart = distance(result, source, tokens, room=8 << 20)       # runs of `running.before_head`
    apart.max_diff, apart.kl

Sums over the vocabulary are kept in double precision and rescaled as they grow, as in flash attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError
from surgery.running.before_head import BeforeHead
from surgery.running.rowwise import NUMBER

if TYPE_CHECKING:
    import torch

NUMBERS = 56  # bytes for each logit of a block: of both runs as they were computed, and in double precision


@dataclass(frozen=True)
class Distance:
    """Between two runs: max |a - b| of the logits, mean KL divergence in nats, and both perplexities."""

    max_diff: float
    kl: float
    perplexity: float
    reference_perplexity: float


def distance(a: BeforeHead, b: BeforeHead, tokens: torch.Tensor, room: int) -> Distance:
    """Of run `a` from the reference `b` on tokens [batch, length], in blocks of at most `room` bytes."""
    import torch

    said = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], 1).flatten()  # what follows; -1: nobody knows
    count, largest = len(said), 0.0
    log_a, log_b = (torch.full((count,), -math.inf, dtype=torch.float64) for _ in range(2))  # log of the sum of exp
    apart, losses_a, losses_b = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    mine, theirs = (run.blocks(room // 4) for run in (a, b))
    for start, stop in _spans(a, b, count, room):
        x, y = a.logits(start, stop, mine).double(), b.logits(start, stop, theirs).double()
        if not bool(y.isfinite().all()):
            raise SurgeryError("the source's logits are not all finite",
                               hint="surgery inspect --scan finds NaN in weights")  # fmt: skip
        here = ((said >= start) & (said < stop)).nonzero().reshape(-1)
        losses_a[here] -= x[here, said[here] - start]
        losses_b[here] -= y[here, said[here] - start]
        log_a = torch.logaddexp(log_a, x.logsumexp(1))
        before, log_b = log_b, torch.logaddexp(log_b, y.logsumexp(1))
        gap = y - x
        largest = max(largest, float(gap.abs().max().nan_to_num(math.inf)))
        apart = apart * (before - log_b).exp() + (gap * (y - log_b[:, None]).exp()).sum(1)
    known = said >= 0
    kl = float((apart + log_a - log_b).mean())  # NaN stays NaN: who compares it with a limit is not misled
    loss_a, loss_b = (float((log + loss)[known].sum()) for log, loss in ((log_a, losses_a), (log_b, losses_b)))
    predicted = max(1, int(known.sum()))
    return Distance(largest, max(kl, 0.0), _exp(loss_a / predicted), _exp(loss_b / predicted))


def _spans(a: BeforeHead, b: BeforeHead, tokens: int, room: int) -> Iterator[tuple[int, int]]:
    rows, width = min(a.head.shape[0], b.head.shape[0]), max(a.hidden.shape[1], b.hidden.shape[1])
    step = max(1, min(room // 4 // (NUMBER * width), room // 2 // (NUMBERS * tokens)))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
