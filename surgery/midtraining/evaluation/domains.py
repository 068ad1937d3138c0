"""Loss and bits per byte on rows of tokens that are kept out of training, for each domain by itself.

    domains = {source: batches.heldout(source) for source in batches.sources}
    found = heldout_loss(model, domains, lengths)         # lengths: bytes of each token
    found["math"]                                 # {"loss": 2.63, "bpb": 0.94, "tokens": 98304, "bytes": 275251}

Rows are taken in their order, all of them; the loss is nats per label.  Bits per byte compare models whose tokenizers
differ: the bits of all labels over the bytes of text that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.data.rows import IGNORE, Rows
from surgery.midtraining.evaluation.resting import ALONE, Advance, Ranks, device_of, resting
from surgery.running.device import nobody

if TYPE_CHECKING:
    import torch

LOGITS = 1 << 27  # of them at once: 512 MiB in fp32


def heldout_loss(
    model: Any,
    domains: Mapping[str, Rows],
    lengths: Sequence[int] | None = None,
    *,
    ranks: Ranks = ALONE,
    advance: Advance = nobody,
) -> dict[str, dict[str, float | int | None]]:
    """`loss`, `bpb` (None without `lengths`), `tokens` and `bytes` of each domain.  `advance` is told the rows done."""
    import torch

    sums = torch.zeros(len(domains), 3, dtype=torch.float64)  # nats, labels, bytes
    vocabulary = model.config.get_text_config().vocab_size
    sizes = torch.zeros(vocabulary, dtype=torch.int64)
    if lengths is not None:
        sizes[: len(lengths)] = torch.tensor(lengths[:vocabulary])
    with resting(model):
        for i, rows in enumerate(domains.values()):
            for batch, mine in ranks.share(_batches(rows, vocabulary)):
                nats, labels = _nats(model, rows, batch)
                if mine:
                    sums[i] += torch.tensor([nats, len(labels), int(sizes[labels].sum())], dtype=torch.float64)
                    advance(batch.stop - batch.start)
    found = ranks.total(sums).tolist()
    return {name: _summary(row, lengths is not None) for name, row in zip(domains, found, strict=True)}


def _batches(rows: Rows, vocabulary: int) -> list[slice]:
    """The rows, some at a time: as many as `LOGITS` allows."""
    count, sequence = rows.tokens.shape
    some = max(1, LOGITS // (sequence * vocabulary))
    return [slice(start, min(start + some, count)) for start in range(0, count, some)]


def _nats(model: Any, rows: Rows, batch: slice) -> tuple[float, torch.Tensor]:
    """The sum over the labels of a batch, in nats, and these labels [n] on the CPU."""
    import torch

    there = device_of(model)
    tokens, labels = (torch.from_numpy(a[batch]).long() for a in (rows.tokens, rows.labels))
    positions = None if rows.positions is None else torch.from_numpy(rows.positions[batch]).long().to(there)
    logits = model(input_ids=tokens.to(there), position_ids=positions, use_cache=False).logits
    nats = [
        torch.nn.functional.cross_entropy(x.float(), y, ignore_index=IGNORE, reduction="none").double().sum()
        for x, y in zip(logits, labels.to(there), strict=True)
    ]
    return float(torch.stack(nats).sum()), labels[labels != IGNORE]


def _summary(sums: Sequence[float], measured: bool) -> dict[str, float | int | None]:
    nats, labels, told = sums
    return {
        "loss": nats / labels if labels else None,
        "bpb": nats / math.log(2) / told if told else None,
        "tokens": int(labels),
        "bytes": int(told) if measured else None,
    }
