"""Loops that draw random masks, as `engine.random_masks`: of one probability, or by rank in a line."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.merging.engine.kernels.compiled import compiled, float_of
from surgery.merging.engine.kernels.numbers import INFINITE, STRIP, f4, f8, magnitudes, u2, u4, u8
from surgery.merging.engine.kernels.ranks import rank_of, sort

BUCKETS, FEW = 512, 200  # to sort a line takes as long as to count about FEW ranks
TINY = u4(0x10000000)  # 2.5e-29
STEP = u8(0x9E3779B97F4A7C15)  # of splitmix64, from one place to the next


@compiled
def splitmix64(place: Any, key: Any) -> Any:
    """As `surgery.tensors.hashing.splitmix64`, of one place."""
    return _mixed((place + u8(1)) * STEP + key)


@compiled
def _mixed(x: Any) -> Any:
    x = (x ^ (x >> u8(30))) * u8(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> u8(27))) * u8(0x94D049BB133111EB)
    return x ^ (x >> u8(31))


@compiled
def choose(starts: Any, counts: Any, coarse: Any, fine: Any, whole: Any, rest: Any, out: Any) -> None:
    """As `masks.below` of one probability: `whole` of 65536, and `rest` of one of these."""
    words, done = np.empty(STRIP // 4 + 2, u8), 0
    for run in range(len(starts)):
        for at in range(0, counts[run], STRIP):
            m = min(STRIP, counts[run] - at)
            choose_from(starts[run] + at, coarse, fine, whole, rest, words, out[done : done + m])
            done += m


@compiled
def choose_from(first: int, coarse: Any, fine: Any, whole: Any, rest: Any, words: Any, out: Any) -> None:
    """The same of a strip of elements, `first` being its first; `words` is overwritten."""
    _draw(first // 4, coarse, words[: len(out) // 4 + 2])
    drawn = words.view(u2)[first % 4 : first % 4 + len(out)]
    close = np.uint8(0)  # as narrow as what it is made of: a vector then holds the more
    for j in range(len(out)):
        out[j] = drawn[j] < whole
        close = np.uint8(close | np.uint8(drawn[j] == whole))
    if close and rest > 0:
        for j in range(len(out)):
            if drawn[j] == whole:
                out[j] = f8(splitmix64(u8(first + j), fine) >> u8(27)) * 2.0**-37 < rest


@compiled
def choose_by_rank(
    base: Any, stored: Any, lines: Any, place: int, coarse: Any, fine: Any, whole: Any, rest: Any, out: Any
) -> None:
    """As `choose`, with the probability of every element's rank in its line, from the smallest |stored - base|.

    The elements from `place` on are [outer, n, inner], `lines`; lines run along n.  Of equal magnitudes the first is
    the smaller.  They are counted in buckets, which tells nearly every element that its number is below, or above, the
    probabilities of all ranks of its bucket; the ranks of the few others are counted, or, where equal ones make them
    many, found by sorting.
    """
    outer, n, inner = lines
    line, bucket, starts, table = np.empty(n, u4), np.empty(n, u2), np.empty(BUCKETS, u4), np.empty(BUCKETS, u4)
    words, apart, own = np.empty(n // 4 + 2, u8), np.empty(n, u2), np.empty(n, np.uint8)
    limits, close, doubtful, ranks = np.empty(n, u4), np.empty(n, np.uint8), np.empty(n + 1, u4), np.empty(n, u4)
    for o in range(outer):
        for i in range(inner):
            first = o * n * inner + i
            stop, at = first + (n - 1) * inner + 1, place + first
            if inner == 1:
                magnitudes(base[first:stop], stored[first:stop], line)
                _draw(at // 4, coarse, words)
                drawn = words.view(u2)[at % 4 : at % 4 + n]
            else:
                magnitudes(base[first:stop:inner], stored[first:stop:inner], line)
                _draw_apart(at, inner, coarse, apart)
                drawn = apart
            _count(line, bucket, starts)
            _limits(starts, whole, table)
            for j in range(n):  # alone, for of the two lookups no vectors can be made
                limits[j] = table[bucket[j]]
            _classify(drawn, limits, own, close)
            count = _places(close, doubtful)
            if count > FEW:
                sort(line, ranks)
            for j in doubtful[:count]:
                rank = ranks[j] if count > FEW else rank_of(line, j)
                own[j] = drawn[j] < whole[rank]
                if drawn[j] == whole[rank] and rest[rank] > 0:
                    number = splitmix64(u8(at + j * inner), fine) >> u8(27)
                    own[j] = f8(number) * 2.0**-37 < rest[rank]
            if inner == 1:
                out[first:stop] = own
            else:
                out[first:stop:inner] = own


@compiled
def _draw(word: int, key: Any, out: Any) -> None:
    """The first 16 bits of the numbers of elements from 4 * word on, four in one."""
    x = (u8(word) + u8(1)) * STEP + key
    for j in range(len(out)):
        out[j] = _mixed(x)
        x += STEP  # not a product: few processors multiply 64 bits in vectors, and it took a third of the time


@compiled
def _draw_apart(place: int, stride: int, key: Any, out: Any) -> None:
    """The first 16 bits of the numbers of every `stride`-th element from `place` on."""
    for j in range(len(out)):
        at = place + j * stride
        out[j] = u2(splitmix64(u8(at // 4), key) >> u8(16 * (at % 4)))


@compiled
def _count(line: Any, bucket: Any, starts: Any) -> None:
    """The bucket of every value, the larger the higher, and how many are in each."""
    top = u4(0)
    for j in range(len(line)):
        top = max(top, line[j])
    starts[:] = 0
    if not (top > TINY) & (top < INFINITE):  # all are in the first
        bucket[:], starts[0] = 0, len(line)
        return
    scale = f4(BUCKETS) / float_of(top)
    for j in range(len(line)):
        bucket[j] = u2(min(np.int32(float_of(line[j]) * scale), np.int32(BUCKETS - 1)))
    for j in range(len(line)):
        starts[bucket[j]] += u4(1)


@compiled
def _limits(starts: Any, whole: Any, table: Any) -> None:
    """For each bucket: the least of `whole` there and, 16 bits up, how far the largest is from it."""
    total = u4(0)
    for b in range(len(starts)):
        count = starts[b]
        if count:
            a, z = whole[total], whole[u4(total + count - u4(1))]
            table[b] = u4(min(a, z)) | u4(u4(max(a, z) - min(a, z)) << u4(16))
        total = u4(total + count)


@compiled
def _classify(drawn: Any, limits: Any, own: Any, close: Any) -> None:
    """What is chosen whatever its rank in its bucket, and where that depends on it."""
    for j in range(len(own)):
        above = u4(u4(drawn[j]) - (limits[j] & u4(0xFFFF)))  # what is below wraps around
        own[j] = np.uint8(above >> u4(31))
        close[j] = above <= u4(limits[j] >> u4(16))


@compiled
def _places(flags: Any, out: Any) -> int:
    """The places of the few flags that are set."""
    count, words = 0, flags[: len(flags) // 8 * 8].view(u8)
    for w in range(len(words)):
        if words[w]:
            for j in range(8 * w, 8 * w + 8):
                out[count] = j
                count += flags[j]
    for j in range(8 * len(words), len(flags)):
        out[count] = j
        count += flags[j]
    return count
