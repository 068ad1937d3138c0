"""Elements as they are stored, and fp32 numbers; what the loops share."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.merging.engine.kernels.compiled import bits_of, compiled, float_of

STRIP = 2000  # elements that a loop handles at a time, so that what it makes of them stays in a cache; no power of two,
#               for then strips would share the places they can have there
GROUP = 64  # numbers that are added in fp32 before they go into an fp64 sum
f4, f8, u2, u4, u8 = np.float32, np.float64, np.uint16, np.uint32, np.uint64
MAGNITUDE, INFINITE = u4(0x7FFFFFFF), u4(0x7F800000)


@compiled
def load(stored: Any, j: int) -> Any:
    """An element as an fp32 number."""
    return float_of(u4(stored[j]) << u4(16) if stored.itemsize == 2 else u4(stored[j]))


@compiled
def store(value: Any, out: Any, j: int) -> None:
    """Round an fp32 number to nearest, ties to even, where `out` is bf16."""
    bits = bits_of(value)
    if out.itemsize == 2:
        rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
        out[j] = u2(0x7FC0) if (bits & MAGNITUDE) > INFINITE else u2(rounded)
    else:
        out[j] = bits


@compiled
def magnitudes(base: Any, stored: Any, out: Any) -> None:
    """The bits of |stored - base|: integers of the same order."""
    for j in range(len(out)):
        out[j] = bits_of(load(stored, j) - load(base, j)) & MAGNITUDE
