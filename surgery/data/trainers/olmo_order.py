"""The data order and the source mixtures of OLMo and OLMo-core, recomputed.

    olmo_order(instances=19, seed=6198, epoch=0)                 # uint32 [19]: what `global_indices.npy` holds
    core_order(instances=444, seed=6198, epoch=1)                # OLMo-core counts epochs from 1
    core_mixture([CoreSource("math", {"math-0.npy": 640}, ratio=0.15)], requested=3000, batch=64, length=16)

Facts from `olmo/data/iterable_dataset.py` and `util.py`, `olmo_core/data/data_loader.py` and `source_mixture.py`.  A
step takes the next `batch` entries of the order, and rank r of w takes entries r, r + w, ... of them.  A mixture in
which a source has too few tokens is an error there; nothing is poured over to the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.data.files.mapped import Array
from surgery.errors import ConfigError


def olmo_order(instances: int, seed: int, epoch: int = 0) -> Array:
    """uint32 [instances]; OLMo's epochs count from 0."""
    order = np.arange(instances, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
    return order


def core_order(instances: int, seed: int, epoch: int = 1, chunk: int = 1) -> Array:
    """uint32; OLMo-core's epochs count from 1.  Runs of `chunk` instances stay together; a shorter rest is left out."""
    chunks = olmo_order(instances // chunk, seed, epoch)
    return (
        chunks if chunk == 1 else (chunks[:, None] * np.uint32(chunk) + np.arange(chunk, dtype=np.uint32)).reshape(-1)
    )


def repetitive(tokens: Array, min_period: int, max_period: int, times: int) -> Array:
    """bool [rows]: which rows [rows, sequence] hold some n tokens `times` times on end, for an n between the periods.

    OLMo's `instance_filter`: such a row is left out of the loss.
    """
    found = np.zeros(len(tokens), bool)
    for period in range(min_period, min(max_period, tokens.shape[1] // 3) + 1):
        same = tokens[:, period:] == tokens[:, :-period]
        count = np.cumsum(same, axis=1)
        runs = count - np.maximum.accumulate(np.where(same, 0, count), axis=1)
        found |= runs.max(axis=1, initial=0) >= (times - 1) * period
    return found


@dataclass(frozen=True)
class CoreSource:
    """A source of an OLMo-core mixture: `files` and their tokens.

    ratio, repetition, fraction    target_ratio, max_repetition_ratio, max_source_fraction of its config
    """

    name: str
    files: Mapping[str, int]
    ratio: float
    repetition: float = 1.0
    fraction: float = 1.0


@dataclass
class Part:
    """Tokens of one pass over one file: `tokens` from its front, of the `most` that it has."""

    source: str
    path: str
    tokens: int
    most: int


def core_mixture(sources: Sequence[CoreSource], requested: int, batch: int, length: int) -> list[Part]:
    """What OLMo-core takes of every file: `requested` tokens in whole batches of `batch`, instances of `length`.

    Raises ConfigError, in its words, if a source has too few tokens, the ratios do not add up to 1, or a batch is no
    whole number of instances.
    """
    ratios = float(np.sum([source.ratio for source in sources]))
    if not np.allclose(ratios, 1.0):
        raise ConfigError(f"target_ratios must sum to 1.0, got {ratios}")
    if batch % length:
        raise ConfigError("global_batch_size must be multiple of sequence_length")
    parts = [part for source in sources for part in _parts(source, requested)]
    want = math.ceil(requested / batch) * (batch // length)
    most = [part.most // length for part in parts]
    rows = [min(part.tokens // length, limit) for part, limit in zip(parts, most, strict=True)]
    remainders = [
        part.tokens % length / length if n < limit else 0.0 for part, n, limit in zip(parts, rows, most, strict=True)
    ]
    _fill(rows, most, remainders, want)
    for part, n in zip(parts, rows, strict=True):
        part.tokens = n * length
    return parts


def _parts(source: CoreSource, requested: int) -> list[Part]:
    """Passes over the files of a source: as many whole ones as are needed, then the front of each file."""
    have, need = sum(source.files.values()), int(requested * source.ratio)
    cap = int(have * source.fraction * source.repetition)
    if cap < need:
        what = f"Insufficient tokens for source: {source.name} @ target global ratio: {source.ratio} :: {cap} < {need}"
        raise ConfigError(what, hint="OLMo-core does not take more of the others; `surgery data plan` does")
    if not have:
        raise ConfigError(f"{source.name} has no tokens")
    ratios, rest = [], need / have
    while rest > 0:
        ratios.append(min(1.0, rest))
        rest -= ratios[-1]
    return [
        Part(source.name, path, math.ceil(tokens * ratio), tokens)
        for ratio in ratios or [0.0]
        for path, tokens in source.files.items()
    ]


def _fill(rows: list[int], most: Sequence[int], remainders: Sequence[float], want: int) -> None:
    """Add instances until there are `want`: the same number to each with room, then one each by largest remainder."""
    missing = want - sum(rows)
    open_ = [i for i, n in enumerate(rows) if n < most[i]]
    if missing <= 0 or not open_:
        return
    each = missing // len(open_)
    for i in open_:
        rows[i] += min(each, most[i] - rows[i])
    missing = want - sum(rows)
    candidates = sorted(((remainders[i], i) for i in open_ if rows[i] < most[i]), reverse=True)
    for _, i in candidates[: max(missing, 0)]:
        rows[i] += 1
