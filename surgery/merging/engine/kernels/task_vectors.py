"""Loops over task vectors: magnitudes, lengths, what is left of them when they are thinned, and their sum."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.merging.engine.kernels.compiled import bits_of, compiled, float_of
from surgery.merging.engine.kernels.numbers import GROUP, MAGNITUDE, STRIP, f4, f8, load, store, u4, u8
from surgery.merging.engine.kernels.random_masks import choose_from

SIGN = u4(0x80000000)
NEVER = u4(0xFFFFFFFF)  # as `surgery.merging.engine.sparsity.NEVER`


@compiled
def thinned(base: Any, stored: Any, least: Any, most: Any, kept: Any, out: Any) -> None:
    """stored - base where it is kept or, if `kept` has no entries, where its magnitude's bits lie in [least, most)."""
    if len(kept):
        for j in range(len(out)):
            delta = load(stored, j) - load(base, j)
            out[j] = delta if kept[j] else f4(0)
    elif most == NEVER:
        for j in range(len(out)):
            delta = load(stored, j) - load(base, j)
            out[j] = delta if (bits_of(delta) & MAGNITUDE) >= least else f4(0)
    else:
        for j in range(len(out)):
            out[j] = _between(load(stored, j) - load(base, j), least, most)


@compiled
def lengths(bits: Any, kept: Any, chance: Any, least: Any, most: Any, out: Any) -> None:
    """out[i] += the l1 length of task vector i before, and after it was thinned.

    fp32 adds up to GROUP elements that lie STRIP apart, fp64 the rest.
    """
    n, count = bits.shape[1], len(bits) - 1
    value, sums = np.empty(STRIP, f4), np.zeros((2, STRIP), f4)
    flags, words = np.empty(STRIP, np.uint8), np.empty(STRIP // 4 + 2, u8)
    for i in range(count):
        for group in range(0, n, STRIP * GROUP):
            for at in range(group, min(group + STRIP * GROUP, n), STRIP):
                m = min(STRIP, n - at)
                base, stored = bits[0, at : at + m], bits[i + 1, at : at + m]
                own = _choice(kept, chance, i, at, words, flags[:m])
                if len(own):
                    _add_kept_lengths(base, stored, own, sums[0, :m], sums[1, :m])
                else:
                    thinned(base, stored, least[i], most[i], own, value[:m])
                    _add_lengths(base, stored, value[:m], sums[0, :m], sums[1, :m])
            for side in range(2):
                out[i, side] += _taken(sums[side])


@compiled
def _taken(sums: Any) -> Any:
    """The sum of numbers, which then are zero."""
    total = f8(0)
    for j in range(len(sums)):
        total += f8(sums[j])
        sums[j] = 0
    return total


@compiled
def _choice(kept: Any, chance: Any, i: int, at: int, words: Any, flags: Any) -> Any:
    """What stays of a strip of task vector i: chosen here by its `chance`, or as `kept` says (no entries: all)."""
    first, coarse, fine, whole, rest = chance
    if first < 0:
        return kept[i, at : at + len(flags)]
    choose_from(first + at, coarse[i], fine[i], whole[i], rest[i], words, flags)
    return flags


@compiled
def _add_kept_lengths(base: Any, stored: Any, kept: Any, before: Any, after: Any) -> None:
    for j in range(len(before)):
        length = abs(load(stored, j) - load(base, j))
        before[j] += length
        after[j] += length if kept[j] else f4(0)


@compiled
def _add_lengths(base: Any, stored: Any, value: Any, before: Any, after: Any) -> None:
    for j in range(len(value)):
        before[j] += abs(load(stored, j) - load(base, j))
        after[j] += abs(value[j])


@compiled
def mix(
    bits: Any, kept: Any, chance: Any, least: Any, most: Any, factors: Any, weights: Any, agree: bool,
    normalize: bool, total: Any, scale: Any, out: Any,
) -> None:  # fmt: skip
    """Task vectors thinned, times their factors and weights, added up and added to the base; see `tasks`."""
    n, count = len(out), len(bits) - 1
    deltas, sums = np.empty((count, STRIP), f4), np.empty(STRIP, f4)
    agreeing, shares = np.empty(STRIP, f4), np.empty(STRIP, f4)
    flags, words = np.empty((2, STRIP), np.uint8), np.empty(STRIP // 4 + 2, u8)
    for at in range(0, n, STRIP):
        m = min(STRIP, n - at)
        base, acc, end = bits[0, at : at + m], sums[:m], out[at : at + m]
        if agree and count == 2:
            one, two = bits[1, at : at + m], bits[2, at : at + m]
            first = _choice(kept, chance, 0, at, words, flags[0, :m])
            second = _choice(kept, chance, 1, at, words, flags[1, :m])
            _mix_two(base, one, two, first, second, least, most, factors, weights, normalize, scale, end)
            continue
        acc[:] = 0
        for i in range(count):
            delta, own = deltas[i, :m], _choice(kept, chance, i, at, words, flags[0, :m])
            thinned(base, bits[i + 1, at : at + m], least[i], most[i], own, delta)
            _scale_and_add(delta, factors[i], weights[i], acc)
        if agree:
            mixed, share = agreeing[:m], shares[:m]
            mixed[:] = 0
            share[:] = 0
            for i in range(count):
                _add_agreeing(deltas[i, :m], acc, weights[i], mixed, share)
            if normalize:
                for j in range(m):
                    mixed[j] /= f4(1) if share[j] == 0 else share[j]
            _add_turned(mixed, acc, scale, base, end)
        else:
            _add_base(acc, total if normalize else f4(1), scale, base, end)


@compiled
def _mix_two(
    base: Any, one: Any, two: Any, kept_one: Any, kept_two: Any, least: Any, most: Any, factors: Any, weights: Any,
    normalize: bool, scale: Any, out: Any,
) -> None:  # fmt: skip
    """Two that must agree: the steps of `mix` in one pass, with nothing in memory between them, is a quarter faster."""
    f, g, v, w = factors[0], factors[1], weights[0], weights[1]
    if len(kept_one):
        for j in range(len(out)):
            root = load(base, j)
            a, b = load(one, j) - root, load(two, j) - root
            a, b = (a if kept_one[j] else f4(0)) * f * v, (b if kept_two[j] else f4(0)) * g * w
            store(_agreed(a, b, v, w, normalize) * scale + root, out, j)
    else:
        low, lower, high, higher = least[0], least[1], most[0], most[1]
        for j in range(len(out)):
            root = load(base, j)
            a, b = load(one, j) - root, load(two, j) - root
            a, b = _between(a, low, high) * f * v, _between(b, lower, higher) * g * w
            store(_agreed(a, b, v, w, normalize) * scale + root, out, j)


@compiled
def _between(delta: Any, least: Any, most: Any) -> Any:
    magnitude = bits_of(delta) & MAGNITUDE
    return delta if (magnitude >= least) & (magnitude < most) else f4(0)


@compiled
def _agreed(a: Any, b: Any, v: Any, w: Any, normalize: bool) -> Any:
    """The sum of those of two numbers that have the sign of both, divided, if wanted, by their weights."""
    sign = u4(0) if f4(0) + a + b >= 0 else SIGN
    a, b = float_of(bits_of(a) ^ sign), float_of(bits_of(b) ^ sign)
    mixed = (f4(0) if a < 0 else a) + (f4(0) if b < 0 else b)
    if normalize:
        share = (v if a > 0 else f4(0)) + (w if b > 0 else f4(0))
        mixed /= f4(1) if share == 0 else share
    return float_of(bits_of(mixed) ^ sign)


@compiled
def _scale_and_add(delta: Any, factor: Any, weight: Any, acc: Any) -> None:
    for j in range(len(acc)):
        value = delta[j] * factor * weight
        delta[j] = value
        acc[j] += value


@compiled
def _add_agreeing(delta: Any, total: Any, weight: Any, mixed: Any, share: Any) -> None:
    """To `mixed` what has the sign of `total`, without its sign; to `share` the weights of these."""
    for j in range(len(mixed)):
        value = delta[j] * (f4(1) if total[j] >= 0 else f4(-1))
        mixed[j] += f4(0) if value < 0 else value
        share[j] += weight if value > 0 else f4(0)


@compiled
def _add_turned(mixed: Any, total: Any, scale: Any, base: Any, out: Any) -> None:
    """`mixed` with the sign of `total` again, times `scale`, and the base."""
    for j in range(len(out)):
        store(mixed[j] * (f4(1) if total[j] >= 0 else f4(-1)) * scale + load(base, j), out, j)


@compiled
def _add_base(acc: Any, divisor: Any, scale: Any, base: Any, out: Any) -> None:
    for j in range(len(out)):
        store(acc[j] / divisor * scale + load(base, j), out, j)
