"""Log-likelihoods of token ids given those before them, in batches of similar length.

    spans = [Span([5, 9, 2, 7], start=2)]                 # how likely are 2 and 7 after 5 and 9?
    score(model, spans, context=2048)                     # [Score(nats=-7.31, greedy=False)]

As lm-eval does it (lm_eval/models/huggingface.py): ids that do not fit into the context are cut off on the left, rows
are padded on the right without a mask, the longest come first.  Spans with the same ids before the last share a row, so
choices of one token cost one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import UsageError
from surgery.midtraining.evaluation.resting import ALONE, Advance, Ranks, device_of, resting
from surgery.running.device import nobody

if TYPE_CHECKING:
    import torch

BATCH = 4096  # tokens that are run at once, with padding
LOGITS = 1 << 26  # of them in fp32 at once, 256 MiB


@dataclass(frozen=True)
class Span:
    """Ids of which those from `start` on (at least 1) are scored, given all before them."""

    ids: Sequence[int]
    start: int

    def within(self, context: int) -> Span:
        """The last ids, as many as the model sees.  Raises UsageError if these are fewer than are to be scored."""
        scored = len(self.ids) - self.start
        if scored > context:
            raise UsageError(f"{scored} tokens are to be scored at once, the model sees {context}")
        cut = max(0, len(self.ids) - context - 1)
        return Span(self.ids[cut:], self.start - cut)


@dataclass(frozen=True)
class Score:
    """The log-likelihood in `nats`; `greedy`: each id is the likeliest one at its place."""

    nats: float
    greedy: bool


@dataclass(frozen=True)
class _Row:
    """Ids that are run, and the spans (by number) that are read off."""

    ids: tuple[int, ...]
    spans: list[int]


def score(
    model: Any,
    spans: Sequence[Span],
    *,
    context: int,
    batch: int = BATCH,
    ranks: Ranks = ALONE,
    advance: Advance = nobody,
) -> list[Score]:
    """One score for each span.  `advance` is told how many are done.

    Raises UsageError if more ids are to be scored than the model sees.
    """
    import torch

    spans = [span.within(context) for span in spans]
    found = torch.zeros(len(spans), 2, dtype=torch.float64)
    with resting(model):
        for rows, mine in ranks.share(_batches(spans, batch)):
            wanted = [(r, i) for r, row in enumerate(rows) for i in row.spans]
            nats, best = _read(model, rows, [(r, spans[i]) for r, i in wanted])
            if mine:
                found[[i for _, i in wanted]] = torch.stack([nats, best.double()], 1).cpu()
                advance(len(wanted))
    return [Score(nats, best == 1) for nats, best in ranks.total(found).tolist()]


def _batches(spans: Sequence[Span], batch: int) -> list[list[_Row]]:
    """Rows of falling length, together at most `batch` ids with their padding (but at least one row)."""
    rows: dict[tuple[int, ...], _Row] = {}
    for i, span in enumerate(spans):
        ids = tuple(span.ids[:-1])
        rows.setdefault(ids, _Row(ids, [])).spans.append(i)
    out: list[list[_Row]] = []
    for row in sorted(rows.values(), key=lambda row: -len(row.ids)):
        if not out or (len(out[-1]) + 1) * len(out[-1][0].ids) > batch:
            out.append([])
        out[-1].append(row)
    return out


def _read(model: Any, rows: Sequence[_Row], wanted: Sequence[tuple[int, Span]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats and whether greedy [spans] of each (row, span)."""
    import torch

    longest = len(rows[0].ids)
    ids = torch.tensor([row.ids + (0,) * (longest - len(row.ids)) for row in rows], device=device_of(model))
    first = min(span.start for _, span in wanted) - 1
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=longest - first).logits
    places = [(r, t - 1 - first, span.ids[t]) for r, span in wanted for t in range(span.start, len(span.ids))]
    row, place, token = torch.tensor(places, device=ids.device).T
    nats, best = _picked(logits, row, place, token)
    owner = torch.tensor([n for n, (_, span) in enumerate(wanted) for _ in range(span.start, len(span.ids))])
    owner, sums = owner.to(ids.device), torch.zeros(2, len(wanted), dtype=torch.float64, device=ids.device)
    sums[0].index_add_(0, owner, nats.double())
    sums[1].index_add_(0, owner, (~best).double())
    return sums[0], sums[1] == 0


def _picked(
    logits: torch.Tensor, row: torch.Tensor, place: torch.Tensor, token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each token [n] at its place, and whether it is the likeliest there."""
    import torch

    nats, best = [], []
    for part in torch.arange(len(row), device=row.device).split(max(1, LOGITS // logits.shape[-1])):
        x = logits[row[part], place[part]].float().log_softmax(-1)
        nats.append(x.gather(1, token[part, None])[:, 0])
        best.append(x.argmax(-1) == token[part])
    return torch.cat(nats), torch.cat(best)
