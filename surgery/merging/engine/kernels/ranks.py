"""Loops of order statistics: ranks of values, and values by their rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.merging.engine.kernels.compiled import compiled
from surgery.merging.engine.kernels.numbers import u4, u8


@compiled
def within(values: Any, low: Any, high: Any, out: Any) -> Any:
    """How many values lie below `low`, and how many in [low, high]: these are put into `out`, as long as `values`.

    What lies behind them in `out` is overwritten.
    """
    under, count, span = np.int64(0), np.int64(0), u4(high - low)
    for j in range(len(values)):
        under += values[j] < low
    for j in range(len(values)):
        out[count] = values[j]
        count += u4(values[j] - low) <= span  # what is below wraps around
    return under, count


@compiled
def ranked(values: Any, rank: int) -> Any:
    """The value of a rank, from the smallest (0), by counting 8 bits after the other."""
    prefix, counts = u4(0), np.zeros(256, np.int64)
    for shift in (24, 16, 8, 0):
        counts[:] = 0
        for j in range(len(values)):
            if shift == 24 or values[j] >> u4(shift + 8) == prefix >> u4(shift + 8):
                counts[(values[j] >> u4(shift)) & u4(255)] += 1
        digit = 0
        while rank >= counts[digit]:
            rank -= counts[digit]
            digit += 1
        prefix |= u4(digit) << u4(shift)
    return prefix


@compiled
def rank_of(line: Any, place: Any) -> Any:
    """How many values are smaller than the one at a place, or equal and before it."""
    value = line[place]
    return _below(line[:place], value, True) + _below(line[place:], value, False)


@compiled
def _below(line: Any, value: Any, equal: bool) -> Any:
    """How many are smaller, or `equal`: beginning at 0, for of an index that may be negative numba makes slow loops."""
    count = u4(0)
    if equal:
        for j in range(len(line)):
            count = u4(count + u4(line[j] <= value))
    else:
        for j in range(len(line)):
            count = u4(count + u4(line[j] < value))
    return count


@compiled
def sort(line: Any, ranks: Any) -> None:
    """All ranks, by sorting 8 bits after the other."""
    n = len(line)
    keys, spare, counts = np.empty(n, u8), np.empty(n, u8), np.empty(256, np.int64)
    for j in range(n):
        keys[j] = u8(line[j]) << u8(32) | u8(j)
    for digit in range(4):
        shift, total = u8(32 + 8 * digit), 0
        counts[:] = 0
        for j in range(n):
            counts[(keys[j] >> shift) & u8(255)] += 1
        for b in range(256):
            count, counts[b] = counts[b], total
            total += count
        for j in range(n):
            b = (keys[j] >> shift) & u8(255)
            spare[counts[b]] = keys[j]
            counts[b] += 1
        keys, spare = spare, keys
    for j in range(n):
        ranks[keys[j] & u8(0xFFFFFFFF)] = j
