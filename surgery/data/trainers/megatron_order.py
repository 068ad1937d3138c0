"""Megatron-core's order of training data: its document, sample and shuffle indices, and its blends.

    train, valid, test = split_documents("90,8,2", documents=120)       # range(0, 108), range(108, 118) ...
    order = sample_order(index.lengths, train, samples=60, length=32, seed=1234)
    order.shuffle[0]                        # which sample comes first
    order.span(order.shuffle[0])            # ((31, 12), (33, 4)): from token 12 of documents[31] to token 4 of [33]
    blend([0.5, 0.3, 0.2], size=1000)       # which dataset, and which of its samples, comes when

Facts from Megatron-core 0.16 (`datasets/gpt_dataset.py`, `helpers.cpp`, `blended_dataset.py`): all epochs are shuffled
together, but for the last one if it gives less than 80% of its samples; all samples of the epochs are made, not only
those asked for; one RandomState shuffles the documents first, then the samples.  "Documents" here are sequences of the
index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from surgery.data.files.mapped import Array
from surgery.errors import ConfigError

MOST = 1 << 40  # places in a document index
APART = 0.80  # the last epoch is shuffled by itself below this share of its samples
Place = tuple[int, int]


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """The three indices, as Megatron builds them.

    documents  int32 [documents], numbers of sequences, shuffled
    samples    [samples + 1, 2], the place in `documents` and the token there where each sample begins, and the end
    shuffle    [samples], their order
    """

    documents: Array
    samples: Array
    shuffle: Array

    def span(self, sample: int) -> tuple[Place, Place]:
        """Where a sample begins and where the next one does."""
        (a, x), (b, y) = self.samples[sample].tolist(), self.samples[sample + 1].tolist()
        return (a, x), (b, y)


def split_documents(split: str, documents: int) -> list[range]:
    """Which documents are for training, validation and test, by weights like "969,30,1".  Raises ConfigError."""
    try:
        weights = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or any(not w >= 0 or math.isinf(w) for w in weights) or sum(weights) <= 0:
        raise ConfigError(f"split {split!r} is not three weights", hint="write it as 969,30,1")
    weights += [0.0] * (3 - len(weights))
    shares = np.concatenate([[0.0], np.cumsum(np.array(weights) / np.sum(weights))])
    cuts = [round(float(share) * documents) for share in shares]
    return [range(a, b) for a, b in pairwise(cuts)]


def sample_order(
    lengths: Array,
    documents: range | Array,
    samples: int | None,
    length: int,
    seed: int,
    *,
    extra: bool = True,
    drop_last: bool = True,
) -> SampleOrder:
    """The three indices of a GPTDataset.

    lengths    int32, tokens of every sequence of the index        documents  those that the dataset may use
    samples    how many are asked for; None: one epoch             length     tokens of a sample, less the extra one
    extra      a sample has one token more, so that every position has a label
    drop_last  leave out what is too short for a sample at the end
    Raises ConfigError if there are too few tokens for one sample: of one epoch, if `samples` is None.
    """
    allowed = np.asarray(documents, np.int32)
    per_epoch = int(lengths[allowed].sum(dtype=np.int64))
    enough = 2 if samples or not drop_last else length + extra  # Megatron wants two tokens, and repeats them as often
    if per_epoch < enough:
        what = f"{len(allowed)} documents of {per_epoch} tokens make no sample of {length}"
        raise ConfigError(what, hint="give this split more documents")
    epochs = 1 if samples is None else max(-(-(samples * length + extra) // per_epoch), 1)
    if epochs * len(allowed) > MOST:
        what = f"{samples} samples are {epochs} epochs of {len(allowed)} documents, more than any memory holds"
        raise ConfigError(what, hint="ask for fewer samples")
    before_last = ((epochs - 1) * per_epoch - extra) // length if epochs > 1 else 0
    apart = epochs > 1 and (samples or 0) - before_last < int(APART * ((per_epoch - extra) // length))
    random = np.random.RandomState(seed)
    order = _shuffled_documents(allowed, epochs, random, apart)
    found = _samples(lengths[order], length, epochs * per_epoch, int(extra), drop_last)
    count = len(found) - 1
    first = before_last if apart else count
    shuffle = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    for part in (shuffle[:first], shuffle[first:]):
        random.shuffle(part)
    return SampleOrder(order, found, shuffle)


def _shuffled_documents(documents: Array, epochs: int, random: np.random.RandomState, apart: bool) -> Array:
    parts = [np.tile(documents, epochs - 1), documents.copy()] if apart else [np.tile(documents, epochs)]
    for part in parts:
        random.shuffle(part)
    return np.concatenate(parts)


def _samples(lengths: Array, length: int, tokens: int, extra: int, drop_last: bool) -> Array:
    """Where each sample begins: the documents are one stream, and sample i begins `length * i` tokens into it."""
    usable = tokens - extra
    count = usable // length if drop_last else math.ceil(float(np.float32(usable) / np.float32(length)))
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens_before = np.arange(count + 1, dtype=np.int64) * length
    # Without an extra token, a sample that ends with a document's last token ends in that document.
    document = np.minimum(np.searchsorted(ends, tokens_before - (1 - extra), side="right"), len(ends) - 1)
    offset = tokens_before - (ends[document] - lengths[document])
    found = np.stack([document, offset], axis=1)
    found[0] = 0
    if tokens_before[-1] > usable:
        found[-1] = len(ends) - 1, lengths[-1] - extra
    return found.astype(np.int32 if max(len(ends), int(found.max())) <= np.iinfo(np.int32).max else np.int64)


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1, to the last bit as Megatron rounds them: a tie in a blend hangs on it."""
    given = np.array(weights, np.float64)
    shares: list[float] = (given / np.sum(given)).tolist()
    return shares


def blend(weights: Sequence[float], size: int) -> tuple[Array, Array]:
    """int16 and int64 [size]: the dataset of each sample, and its number there.

    Whoever is furthest behind its share of the samples so far comes next.
    """
    return _blend(normalized(weights), [None] * len(weights), size)


def exhaustive_blend(sizes: Sequence[int]) -> tuple[Array, Array]:
    """The same, taking `sizes[i]` samples of dataset i, in proportion to these sizes until one has no more."""
    return _blend([size / sum(sizes) for size in sizes], list(sizes), sum(sizes))


def _blend(shares: Sequence[float], limits: Sequence[int | None], size: int) -> tuple[Array, Array]:
    dataset, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    taken = [0] * len(shares)
    left = [i for i, limit in enumerate(limits) if limit != 0]
    for i in range(size):
        step = max(float(i), 1.0)
        chosen = max(left, key=lambda d: shares[d] * step - taken[d])
        dataset[i], sample[i] = chosen, taken[chosen]
        taken[chosen] += 1
        if taken[chosen] == limits[chosen]:
            left.remove(chosen)
    return dataset, sample


def surplus_samples(weights: Sequence[float], size: int, surplus: float = 0.005) -> list[int]:
    """How many samples Megatron asks of each dataset of a blend, so that none runs out."""
    return [math.ceil(math.ceil(size * share) * (1 + surplus)) for share in normalized(weights)]
