"""Loops that choose elements at random, as `surgery.soups.masks`: all with one chance, or by rank in a line."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.compiled import compiled, float_of
from surgery.soups.kernels.numbers import INFINITE, STRIP, f4, f8, u2, u4, u8
from surgery.soups.kernels.ranks import rank_of, sort

BUCKETS, FEW = 512, 64
TINY = u4(0x10000000)  # 2.5e-29


@compiled
def splitmix64(place: Any, key: Any) -> Any:
    """As `surgery.mixing.splitmix64`, of one place."""
    x = (place + u8(1)) * u8(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> u8(30))) * u8(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> u8(27))) * u8(0x94D049BB133111EB)
    return x ^ (x >> u8(31))


@compiled
def choose(starts: Any, counts: Any, coarse: Any, fine: Any, whole: Any, rest: Any, out: Any) -> None:
    """As `masks.below` of one probability: `whole` of 65536, and `rest` of one of these."""
    words = np.empty(STRIP // 4, u8)
    at = 0
    for run in range(len(starts)):
        stop = starts[run] + counts[run]
        for first in range(starts[run] // 4 * 4, stop, STRIP):
            for j in range(len(words)):
                words[j] = splitmix64(u8(first // 4 + j), coarse)
            low, high = max(first, starts[run]), min(first + STRIP, stop)
            drawn, own = words.view(u2)[low - first : high - first], out[at : at + high - low]
            close = 0
            for j in range(len(own)):
                own[j] = drawn[j] < whole
                close += drawn[j] == whole
            if close and rest > 0:
                for j in range(len(own)):
                    if drawn[j] == whole:
                        own[j] = f8(splitmix64(u8(low + j), fine) >> u8(27)) * 2.0**-37 < rest
            at += high - low


@compiled
def choose_by_rank(
    values: Any, lines: Any, place: int, coarse: Any, fine: Any, whole: Any, rest: Any, out: Any
) -> None:
    """As `choose`, with the probability of every element's rank in its line, from the smallest value.

    `values`, bits of magnitudes, are the elements from `place` on as [outer, n, inner], `lines`; lines run along n.
    Of equal values the first is the smaller.  Values are counted in buckets, which tells nearly every element that its
    number is below, or above, the probabilities of all ranks of its bucket; the ranks of the few others are counted,
    or, where equal values make them many, found by sorting.
    """
    outer, n, inner = lines
    line, drawn, bucket, own = np.empty(n, u4), np.empty(n, u2), np.empty(n, np.int32), np.empty(n, np.uint8)
    starts, low, high = np.empty(BUCKETS, np.int64), np.empty(BUCKETS, u2), np.empty(BUCKETS, u2)
    doubtful, ranks = np.empty(n + 1, np.int64), np.empty(n, np.int64)
    for o in range(outer):
        for i in range(inner):
            first = o * n * inner + i
            line[:] = values[first : first + (n - 1) * inner + 1 : inner]
            _draw(place + first, inner, coarse, drawn)
            _count(line, bucket, starts)
            _limits(starts, n, whole, low, high)
            count = _classify(drawn, bucket, low, high, own, doubtful)
            if count > FEW:
                sort(line, ranks)
            for j in doubtful[:count]:
                rank = ranks[j] if count > FEW else rank_of(line, j)
                own[j] = drawn[j] < whole[rank]
                if drawn[j] == whole[rank] and rest[rank] > 0:
                    number = splitmix64(u8(place + first + j * inner), fine) >> u8(27)
                    own[j] = f8(number) * 2.0**-37 < rest[rank]
            out[first : first + (n - 1) * inner + 1 : inner] = own


@compiled
def _classify(drawn: Any, bucket: Any, low: Any, high: Any, own: Any, doubtful: Any) -> int:
    """What is chosen whatever its rank in its bucket; how many may be, and which."""
    count = 0
    for j in range(len(own)):
        b = bucket[j]
        own[j] = drawn[j] < low[b]
        doubtful[count] = j
        count += (drawn[j] >= low[b]) & (drawn[j] <= high[b])
    return count


@compiled
def _draw(place: int, stride: int, key: Any, out: Any) -> None:
    """The first 16 bits of the numbers of every `stride`-th element from `place` on."""
    if stride == 1:
        words = np.empty(len(out) // 4 + 2, u8)
        for j in range(len(words)):
            words[j] = splitmix64(u8(place // 4 + j), key)
        out[:] = words.view(u2)[place % 4 : place % 4 + len(out)]
        return
    for j in range(len(out)):
        at = place + j * stride
        out[j] = u2(splitmix64(u8(at // 4), key) >> u8(16 * (at % 4)))


@compiled
def _count(line: Any, bucket: Any, starts: Any) -> None:
    """The bucket of every value, the larger the higher, and how many are in each."""
    top = u4(0)
    for j in range(len(line)):
        top = max(top, line[j])
    scale = f4(BUCKETS) / float_of(top) if (top > TINY) & (top < INFINITE) else f4(0)  # 0: all are in the first
    starts[:] = 0
    for j in range(len(line)):
        bucket[j] = min(np.int32(float_of(line[j]) * scale), np.int32(BUCKETS - 1)) if scale > 0 else np.int32(0)
    for j in range(len(line)):
        starts[bucket[j]] += 1


@compiled
def _limits(starts: Any, n: int, whole: Any, low: Any, high: Any) -> None:
    """From how many are in each bucket to the rank of its first; the least and the largest of `whole` in each."""
    total = 0
    for b in range(len(starts)):
        count, starts[b] = starts[b], total
        if count:
            a, z = whole[total], whole[total + count - 1]
            low[b], high[b] = min(a, z), max(a, z)
        total += count
