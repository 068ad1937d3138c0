"""The loop of a content digest, as `tensors.fingerprint`."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.merging.engine.kernels.compiled import compiled


@compiled
def row_sums(words: Any, weights: Any) -> Any:
    """What a fingerprint adds up: of every row of 32-bit words, the sum of their products with 64-bit weights."""
    out = np.zeros(len(words), np.int64)
    for r in range(len(words)):
        row, total = words[r], np.int64(0)
        for k in range(len(weights)):
            total += np.int64(row[k]) * weights[k]
        out[r] = total
    return out
