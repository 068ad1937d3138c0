"""A hash of places: what stands at a place depends on the place and a key alone, in blocks of any size.

splitmix64(np.arange(4, dtype=np.uint64), key=7)          # four of 2^64 numbers, as good as random
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def splitmix64(places: Any, key: int) -> Any:
    """splitmix64 (Steele, Lea, Flood 2014) begun at `key`, of every place: uint64 in, uint64 out."""
    import numpy as np

    x = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def places(box: Sequence[tuple[int, int]], shape: Sequence[int]) -> Any:
    """The row-major numbers of the elements of a box, as uint64."""
    import numpy as np

    at: Any = np.zeros(1, np.uint64)
    for (a, b), n in zip(box, shape, strict=True):
        at = (at[:, None] * np.uint64(n) + np.arange(a, b, dtype=np.uint64)).reshape(-1)
    return at
