"""The inner loops of merging, compiled: every source is read once, and nothing in between leaves the first cache.

    linear(bits, weights, total, out)

`bits` [sources, n] are the elements as they are stored: bf16 in uint16, fp32 in uint32; where there is a base, it is
the first.  `out` [n] is of one of these, too.  Arithmetic is fp32, in the order of the torch code that each of these
stands for, and rounded once; sums over many elements are taken in fp64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.compiled import bits_of, compiled, float_of, fma

STRIP = 1000  # elements that a loop handles at a time, so that some strips fit into the first cache; no power of two,
#               for then strips would share the places they can have there
GROUP = 64
BUCKETS, FEW = 512, 64
f4, f8, u2, u4, u8 = np.float32, np.float64, np.uint16, np.uint32, np.uint64
MAGNITUDE, INFINITE, TINY = u4(0x7FFFFFFF), u4(0x7F800000), u4(0x10000000)  # TINY: 2.5e-29


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
def linear(bits: Any, weights: Any, total: Any, out: Any) -> None:
    """((0 + a w) + b w) + ..., each step rounded once, over `total`."""
    sums, last = np.empty(STRIP, f4), len(bits) - 1
    for at in range(0, len(out), STRIP):
        m = min(STRIP, len(out) - at)
        acc = sums[:m]
        acc[:] = 0
        for i in range(last):
            _add_product(bits[i, at : at + m], weights[i], acc)
        _finish_linear(bits[last, at : at + m], weights[last], acc, total, out[at : at + m])


@compiled
def _add_product(stored: Any, weight: Any, acc: Any) -> None:
    for j in range(len(acc)):
        acc[j] = fma(load(stored, j), weight, acc[j])


@compiled
def _finish_linear(stored: Any, weight: Any, acc: Any, total: Any, out: Any) -> None:
    for j in range(len(acc)):
        store(fma(load(stored, j), weight, acc[j]) / total, out, j)


@compiled
def blend(bits: Any, of_a: Any, of_b: Any, out: Any) -> None:
    """of_a a + of_b b."""
    a, b = bits[0], bits[1]
    for j in range(len(out)):
        store(of_a * load(a, j) + of_b * load(b, j), out, j)


@compiled
def magnitudes(base: Any, stored: Any, out: Any) -> None:
    """The bits of |stored - base|: integers of the same order."""
    for j in range(len(out)):
        out[j] = bits_of(load(stored, j) - load(base, j)) & MAGNITUDE


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
def thinned(base: Any, stored: Any, least: Any, most: Any, kept: Any, out: Any) -> None:
    """stored - base where the bits of its magnitude lie in [least, most) and it is kept (no entries: all is)."""
    for j in range(len(out)):
        delta = load(stored, j) - load(base, j)
        magnitude = bits_of(delta) & MAGNITUDE
        out[j] = delta if (magnitude >= least) & (magnitude < most) else f4(0)
    for j in range(len(kept)):
        out[j] = out[j] if kept[j] else f4(0)


@compiled
def lengths(bits: Any, kept: Any, least: Any, most: Any, out: Any) -> None:
    """out[i] += the l1 length of task vector i before, and after it was thinned.

    fp32 adds up to GROUP elements that lie STRIP apart, fp64 the rest.
    """
    n, count = bits.shape[1], len(bits) - 1
    value, sums = np.empty(STRIP, f4), np.zeros((2, STRIP), f4)
    for i in range(count):
        for group in range(0, n, STRIP * GROUP):
            for at in range(group, min(group + STRIP * GROUP, n), STRIP):
                m = min(STRIP, n - at)
                base, stored = bits[0, at : at + m], bits[i + 1, at : at + m]
                thinned(base, stored, least[i], most[i], kept[i, at : at + m], value[:m])
                _add_lengths(base, stored, value[:m], sums[0, :m], sums[1, :m])
            for side in range(2):
                for j in range(STRIP):
                    out[i, side] += f8(sums[side, j])
                    sums[side, j] = 0


@compiled
def _add_lengths(base: Any, stored: Any, value: Any, before: Any, after: Any) -> None:
    for j in range(len(value)):
        before[j] += abs(load(stored, j) - load(base, j))
        after[j] += abs(value[j])


@compiled
def mix(
    bits: Any, kept: Any, least: Any, most: Any, factors: Any, weights: Any, agree: bool, normalize: bool,
    total: Any, scale: Any, out: Any,
) -> None:  # fmt: skip
    """Task vectors thinned, times their factors and weights, added up and added to the base; see `tasks`."""
    n, count = len(out), len(bits) - 1
    deltas = np.empty((count, STRIP), f4)
    sums, own = np.empty(STRIP, f4), np.empty(STRIP, f4)
    for at in range(0, n, STRIP):
        m = min(STRIP, n - at)
        base, acc = bits[0, at : at + m], sums[:m]
        acc[:] = 0
        for i in range(count):
            delta = deltas[i, :m]
            thinned(base, bits[i + 1, at : at + m], least[i], most[i], kept[i, at : at + m], delta)
            _scale_and_add(delta, factors[i], weights[i], acc)
        if agree:
            _elect(acc, deltas, weights, own[:m])
            if normalize:
                for j in range(m):
                    acc[j] /= f4(1) if own[j] == 0 else own[j]
        elif normalize:
            for j in range(m):
                acc[j] /= total
        if scale != 1:
            for j in range(m):
                acc[j] *= scale
        end = out[at : at + m]
        for j in range(m):
            store(acc[j] + load(base, j), end, j)


@compiled
def _scale_and_add(delta: Any, factor: Any, weight: Any, acc: Any) -> None:
    for j in range(len(acc)):
        delta[j] = delta[j] * factor * weight
        acc[j] += delta[j]


@compiled
def _elect(acc: Any, deltas: Any, weights: Any, own: Any) -> None:
    """acc: from the sum of all to that of those that have its sign;  own: the weights of these."""
    signs = np.empty(len(acc), f4)
    for j in range(len(acc)):
        signs[j] = f4(1) if acc[j] >= 0 else f4(-1)
        acc[j], own[j] = 0, 0
    for i in range(len(deltas)):
        _add_agreeing(deltas[i, : len(acc)], signs, weights[i], acc, own)
    for j in range(len(acc)):
        acc[j] *= signs[j]


@compiled
def _add_agreeing(delta: Any, signs: Any, weight: Any, acc: Any, own: Any) -> None:
    for j in range(len(acc)):
        value = delta[j] * signs[j]
        acc[j] += f4(0) if value < 0 else value
        own[j] += weight if value > 0 else f4(0)


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
                _sort(line, ranks)
            for j in doubtful[:count]:
                rank = ranks[j] if count > FEW else _rank(line, j)
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
def _rank(line: Any, place: int) -> Any:
    """How many values are smaller than the one at a place, or equal and before it."""
    value, count = line[place], u4(0)
    for j in range(place):
        count += line[j] <= value
    for j in range(place, len(line)):
        count += line[j] < value
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


@compiled
def _sort(line: Any, ranks: Any) -> None:
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


@compiled
def products(bits: Any, first: Any, second: Any, out: Any) -> None:
    """out[p] += the product of task vectors first[p] and second[p], numbered from 0.

    fp32 adds up to GROUP elements that lie STRIP apart, fp64 the rest.
    """
    n, sums = bits.shape[1], np.zeros(STRIP, f4)
    for p in range(len(out)):
        for group in range(0, n, STRIP * GROUP):
            for at in range(group, min(group + STRIP * GROUP, n), STRIP):
                m = min(STRIP, n - at)
                a, b = bits[first[p] + 1, at : at + m], bits[second[p] + 1, at : at + m]
                _add_products(bits[0, at : at + m], a, b, sums[:m])
            for j in range(STRIP):
                out[p] += f8(sums[j])
                sums[j] = 0


@compiled
def _add_products(base: Any, a: Any, b: Any, sums: Any) -> None:
    for j in range(len(sums)):
        origin = load(base, j)
        sums[j] += (load(a, j) - origin) * (load(b, j) - origin)


@compiled
def stock(bits: Any, t: Any, rest: Any, out: Any) -> None:
    """t times the mean of all but the base, and rest times the base."""
    sums, count = np.empty(STRIP, f4), f4(len(bits) - 1)
    for at in range(0, len(out), STRIP):
        m = min(STRIP, len(out) - at)
        base, acc, end = bits[0, at : at + m], sums[:m], out[at : at + m]
        acc[:] = f4(-0.0)  # which adds nothing, not even to the sign of a zero
        for i in range(1, len(bits)):
            _add(bits[i, at : at + m], acc)
        for j in range(m):
            store(t * (acc[j] / count) + rest * load(base, j), end, j)


@compiled
def _add(stored: Any, acc: Any) -> None:
    for j in range(len(acc)):
        acc[j] += load(stored, j)


@compiled
def variances(bits: Any, out: Any) -> None:
    """The bits of the variance of the task vectors, element by element; see `consensus`."""
    mean, total = np.empty(STRIP, f8), np.empty(STRIP, f8)
    for at in range(0, len(out), STRIP):
        m = min(STRIP, len(out) - at)
        own, mean_, total_ = out[at : at + m], mean[:m], total[:m]
        mean_[:] = 0
        total_[:] = 0
        for i in range(1, len(bits)):
            _welford(bits[0, at : at + m], bits[i, at : at + m], f8(i), mean_, total_)
        for j in range(m):
            own[j] = bits_of(f4(total_[j] / f8(len(bits) - 1)))


@compiled
def _welford(base: Any, stored: Any, count: Any, mean: Any, total: Any) -> None:
    for j in range(len(mean)):
        value = f8(load(stored, j) - load(base, j))
        off = value - mean[j]
        mean[j] += off / count
        total[j] = fma(off, value - mean[j], total[j])


@compiled
def squares(bits: Any, values: Any, least: Any, out: Any) -> None:
    """out[i] += the squares of task vector i, of its elements whose value is at least `least`."""
    n, sums = bits.shape[1], np.zeros(STRIP, f4)
    for i in range(len(out)):
        for group in range(0, n, STRIP * GROUP):
            for at in range(group, min(group + STRIP * GROUP, n), STRIP):
                m = min(STRIP, n - at)
                _add_squares(bits[0, at : at + m], bits[i + 1, at : at + m], values[at : at + m], least, sums[:m])
            for j in range(STRIP):
                out[i] += f8(sums[j])
                sums[j] = 0


@compiled
def _add_squares(base: Any, stored: Any, values: Any, least: Any, sums: Any) -> None:
    for j in range(len(sums)):
        delta = load(stored, j) - load(base, j)  # before the choice, which then takes no branch
        delta = delta if values[j] >= least else f4(0)
        sums[j] += delta * delta


@compiled
def agree(bits: Any, values: Any, least: Any, weights: Any, floor: Any, out: Any) -> None:
    """The base and the weighted mean of the task vectors that have the sign of their sum, where value >= least."""
    n, count = len(out), len(bits) - 1
    deltas = np.empty((count, STRIP), f4)
    sums, mixed, own = np.empty(STRIP, f4), np.empty(STRIP, f4), np.empty(STRIP, f4)
    for at in range(0, n, STRIP):
        m = min(STRIP, n - at)
        base, acc, end = bits[0, at : at + m], sums[:m], out[at : at + m]
        acc[:], mixed[:], own[:] = 0, 0, 0
        for i in range(count):
            _take(base, bits[i + 1, at : at + m], values[at : at + m], least, deltas[i, :m], acc)
        for i in range(count):
            _add_weighted(deltas[i, :m], acc, weights[i], mixed[:m], own[:m])
        for j in range(m):
            sign = f4(1) if acc[j] >= 0 else f4(-1)
            share = own[j] if own[j] > floor else floor
            store(mixed[j] * sign / share + load(base, j), end, j)


@compiled
def _take(base: Any, stored: Any, values: Any, least: Any, delta: Any, acc: Any) -> None:
    for j in range(len(acc)):
        value = load(stored, j) - load(base, j)
        delta[j] = value if values[j] >= least else f4(0)
        acc[j] += delta[j]


@compiled
def _add_weighted(delta: Any, total: Any, weight: Any, mixed: Any, own: Any) -> None:
    for j in range(len(mixed)):
        value = delta[j] * (f4(1) if total[j] >= 0 else f4(-1))
        mixed[j] += f4(0) if value < 0 else value * weight
        own[j] += weight if value > 0 else f4(0)


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
