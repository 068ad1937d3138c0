"""Loops of SCE: the variance of the task vectors element by element, and their sum where it is large."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.merging.engine.kernels.compiled import bits_of, compiled, fma
from surgery.merging.engine.kernels.numbers import GROUP, STRIP, f4, f8, load, store, u4

NEAR, INFINITY = f4(2.0**-60), f4(np.inf)  # the square of what is nearer than NEAR may be zero
DIFFERS, UNCLEAR = u4(1), u4(2)


@compiled
def variances(bits: Any, out: Any) -> None:
    """The bits of the variance of the task vectors, element by element; see `consensus`."""
    mean, total = np.empty(STRIP, f8), np.empty(STRIP, f8)
    for at in range(0, len(out), STRIP):
        _strip_of_variances(bits, at, mean, total, out[at : at + STRIP])


@compiled
def _strip_of_variances(bits: Any, at: int, mean: Any, total: Any, out: Any) -> None:
    m = len(out)
    base, first, mean_, total_ = bits[0, at : at + m], bits[1, at : at + m], mean[:m], total[:m]
    if len(bits) == 3:
        _variances_of_two(base, first, bits[2, at : at + m], out)
        return
    for j in range(m):
        mean_[j] = f8(load(first, j) - load(base, j))
        total_[j] = mean_[j] - mean_[j]  # 0, but for what is infinite
    for i in range(2, len(bits)):
        _welford(base, bits[i, at : at + m], f8(i), mean_, total_)
    _divide(total_, f8(len(bits) - 1), out)


@compiled
def _variances_of_two(base: Any, a: Any, b: Any, out: Any) -> None:
    """The same steps, without what they keep in between."""
    for j in range(len(out)):
        first, value = f8(load(a, j) - load(base, j)), f8(load(b, j) - load(base, j))
        off = value - first
        mean = first + off * 0.5
        out[j] = bits_of(f4(fma(off, value - mean, first - first) * 0.5))


@compiled
def _welford(base: Any, stored: Any, count: Any, mean: Any, total: Any) -> None:
    share = f8(1) / count
    if _halves(count):
        for j in range(len(mean)):
            value = f8(load(stored, j) - load(base, j))
            off = value - mean[j]
            mean[j] += off * share
            total[j] = fma(off, value - mean[j], total[j])
    else:
        for j in range(len(mean)):
            value = f8(load(stored, j) - load(base, j))
            off = value - mean[j]
            mean[j] += off / count
            total[j] = fma(off, value - mean[j], total[j])


@compiled
def _halves(count: Any) -> bool:
    """Whether it is a power of two: then multiplying by its inverse, several times faster, is dividing by it."""
    return int(count) & (int(count) - 1) == 0


@compiled
def _divide(total: Any, count: Any, out: Any) -> None:
    share = f8(1) / count
    if _halves(count):
        for j in range(len(out)):
            out[j] = bits_of(f4(total[j] * share))
    else:
        for j in range(len(out)):
            out[j] = bits_of(f4(total[j] / count))


@compiled
def varied(bits: Any) -> int:
    """How many elements have a variance above zero in fp32; -1 if comparing the task vectors does not tell."""
    count, n, states = 0, bits.shape[1], np.empty(STRIP, u4)
    for at in range(0, n, STRIP):
        m = min(STRIP, n - at)
        base, first, state = bits[0, at : at + m], bits[1, at : at + m], states[:m]
        for j in range(m):
            state[j] = UNCLEAR if not abs(load(first, j) - load(base, j)) < INFINITY else u4(0)
        for i in range(2, len(bits)):
            _compare(base, first, bits[i, at : at + m], state)
        differing: Any = u4(0)
        all_: Any = u4(0)
        for j in range(m):
            differing = u4(differing + (state[j] & DIFFERS))
            all_ |= state[j]
        if all_ & UNCLEAR:
            return -1
        count += differing
    return count


@compiled
def _compare(base: Any, first: Any, stored: Any, state: Any) -> None:
    for j in range(len(state)):
        off = abs((load(stored, j) - load(base, j)) - (load(first, j) - load(base, j)))
        clear = (off == 0) | ((off > NEAR) & (off < INFINITY))
        state[j] |= (DIFFERS if off > 0 else u4(0)) | (u4(0) if clear else UNCLEAR)


@compiled
def squares(bits: Any, least: Any, out: Any) -> None:
    """out[i] += the squares of task vector i, of its elements whose variance has bits of at least `least`.

    fp32 adds up to GROUP elements that lie STRIP apart, fp64 the rest.
    """
    n, count = bits.shape[1], len(out)
    values, mean, total = np.zeros(STRIP, u4), np.empty(STRIP, f8), np.empty(STRIP, f8)
    sums = np.zeros((count, STRIP), f4)
    for group in range(0, n, STRIP * GROUP):
        for at in range(group, min(group + STRIP * GROUP, n), STRIP):
            m = min(STRIP, n - at)
            if least > 0:
                _strip_of_variances(bits, at, mean, total, values[:m])
            for i in range(count):
                _add_squares(bits[0, at : at + m], bits[i + 1, at : at + m], values[:m], least, sums[i, :m])
        for i in range(count):
            for j in range(STRIP):
                out[i] += f8(sums[i, j])
                sums[i, j] = 0


@compiled
def _add_squares(base: Any, stored: Any, values: Any, least: Any, sums: Any) -> None:
    for j in range(len(sums)):
        delta = load(stored, j) - load(base, j)  # before the choice, which then takes no branch
        delta = delta if values[j] >= least else f4(0)
        sums[j] += delta * delta


@compiled
def agree(bits: Any, least: Any, weights: Any, floor: Any, out: Any) -> None:
    """The base and the weighted mean of the task vectors with the sign of their sum, as far as `squares` takes them."""
    n, count = len(out), len(bits) - 1
    values, mean, total = np.zeros(STRIP, u4), np.empty(STRIP, f8), np.empty(STRIP, f8)
    deltas, sums = np.empty((count, STRIP), f4), np.empty(STRIP, f4)
    agreeing, shares = np.empty(STRIP, f4), np.empty(STRIP, f4)
    for at in range(0, n, STRIP):
        m = min(STRIP, n - at)
        base, acc, mixed, own, end = bits[0, at : at + m], sums[:m], agreeing[:m], shares[:m], out[at : at + m]
        if least > 0:
            _strip_of_variances(bits, at, mean, total, values[:m])
        acc[:], mixed[:], own[:] = 0, 0, 0
        for i in range(count):
            _take(base, bits[i + 1, at : at + m], values[:m], least, deltas[i, :m], acc)
        for i in range(count):
            _add_weighted(deltas[i, :m], acc, weights[i], mixed, own)
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
