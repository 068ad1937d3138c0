"""Random numbers that belong to elements: the same for an element whatever block or thread asks for it.

    words((seed, "model.norm.weight", 1), [(4096, 100)])      # 100 numbers in [0, 2^32) for elements 4096..4195

A stream of PCG64-DXSM (M. O'Neill) per tensor and source, seeded by a sha256 of both; its 64-bit draws are split into
two words, low half first, and `advance` jumps to any element.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable
from typing import Any

from surgery.lazy import Box, Shape


def words(key: tuple[int, str, int], runs: Iterable[tuple[int, int]]) -> Any:
    """The words of all elements in `runs` of (first element, how many), as one int64 array."""
    import numpy as np

    digest = hashlib.sha256(repr(key).encode()).digest()
    seed = np.random.SeedSequence(int.from_bytes(digest[:16], "little"))
    stream = np.random.PCG64DXSM(seed)
    pieces, at = [], 0  # `at`: draws made so far
    for start, count in runs:
        first, skip = divmod(start, 2)
        stream.advance((first - at) % (1 << 128))
        draws = (skip + count + 1) // 2
        at = first + draws
        pieces.append(stream.random_raw(draws).astype("<u8", copy=False).view("<u4")[skip : skip + count])
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return joined.astype(np.int64)


def runs(shape: Shape, box: Box) -> list[tuple[int, int]]:
    """The contiguous flat ranges that a box covers, in order."""
    k = len(shape)
    while k and box[k - 1] == (0, shape[k - 1]):
        k -= 1
    inner = math.prod(shape[k:])
    if k == 0:
        return [(0, inner)]
    strides = [math.prod(shape[i + 1 :]) for i in range(k)]
    lo, hi = box[k - 1]
    return [
        (sum(i * s for i, s in zip(index, strides, strict=False)) + lo * inner, (hi - lo) * inner)
        for index in itertools.product(*(range(a, b) for a, b in box[: k - 1]))
    ]
