"""Per-element random masks (DARE, DELLA): the same for an element whatever block or thread asks for it.

    below((seed, "model.norm.weight", 1), [(4096, 100)], 0.3)     # which of elements 4096..4195 stay, as booleans

Every element of a tensor has a number in [0, 1) of its own.  Its first 16 bits are a quarter of the hash of a quarter
of the element's place, its other bits, which one comparison in 65536 asks for, those of the hash of the place itself.
Both hashes have keys of their own, which are made of seed, tensor and source.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

from surgery.tensors.hashing import splitmix64
from surgery.tensors.lazy import Box, Shape

FINE = 37  # bits of a number behind the first 16


def below(key: tuple[int, str, int], runs: Sequence[tuple[int, int]], probability: Any) -> Any:
    """Which elements of `runs` of (first element, how many) have a number below `probability`, one or one for each."""
    import numpy as np

    coarse, fine = keys(key)
    pieces = [_coarse(coarse, start, count) for start, count in runs]
    drawn = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    whole, rest = shares(probability)
    chosen = drawn < whole
    if rest.any() and len(close := np.flatnonzero(drawn == whole)):
        number = (splitmix64(_places(runs, close), fine) >> np.uint64(64 - FINE)).astype(np.float64) * 2.0**-FINE
        chosen[close] = number < (rest if rest.ndim == 0 else rest[close])
    return chosen


def shares(probability: Any) -> tuple[Any, Any]:
    """A probability, or an array of them, in 65536ths: how many (16 bits), and what is left of one."""
    import numpy as np

    scaled = np.asarray(probability, np.float64) * 65536
    whole = np.minimum(scaled, 65535).astype(np.uint16)[()]
    return whole, scaled - whole


def _places(runs: Sequence[tuple[int, int]], at: Any) -> Any:
    """The elements that are number `at` of `runs`."""
    import numpy as np

    counts = np.cumsum([0] + [count for _, count in runs])
    which = np.searchsorted(counts, at, side="right") - 1
    return (np.array([start for start, _ in runs])[which] + at - counts[which]).astype(np.uint64)


@functools.lru_cache(maxsize=1024)
def keys(key: tuple[int, str, int]) -> tuple[int, int]:
    """What the first 16 bits and what the others are hashed under."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _coarse(key: int, start: int, count: int) -> Any:
    """The first 16 bits of the numbers of elements [start, start + count)."""
    import numpy as np

    first, skip = divmod(start, 4)
    words = splitmix64(np.arange(first, first + (skip + count + 3) // 4, dtype=np.uint64), key)
    return words.astype("<u8", copy=False).view("<u2")[skip : skip + count]


class Bitmap:
    """Which elements of a tensor were chosen, one bit each: noted while it is scanned, then asked for.

    `runs` are (first element, how many), as above.
    """

    def __init__(self, sources: int, numel: int) -> None:
        import numpy as np

        self._bits = np.zeros((sources, -(-numel // 8)), np.uint8)
        self._torn = False
        self.complete = False

    @property
    def nbytes(self) -> int:
        return int(self._bits.nbytes)

    def put(self, source: int, runs: Sequence[tuple[int, int]], chosen: Any) -> None:
        """Note the booleans of what was scanned, in several threads at once."""
        import numpy as np

        at = 0
        for start, count in runs:
            if start % 8:  # two threads would write the same byte
                self._torn = True
                return
            bits = np.packbits(chosen[at : at + count])
            self._bits[source, start // 8 :][: len(bits)] = bits
            at += count

    def close(self) -> None:
        """All is noted; it is `complete` if all could be noted."""
        self.complete = not self._torn

    def get(self, source: int, runs: Sequence[tuple[int, int]]) -> Any:
        """The booleans of any runs."""
        import numpy as np

        bits = self._bits[source]
        pieces = [
            np.unpackbits(bits[start // 8 : (start + count + 7) // 8])[start % 8 :][:count] for start, count in runs
        ]
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).view(bool)


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
