"""Loops over task vectors: their magnitudes, what is left of them when they are thinned, and their sum."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.compiled import bits_of, compiled
from surgery.soups.kernels.numbers import GROUP, MAGNITUDE, STRIP, f4, f8, load, store


@compiled
def magnitudes(base: Any, stored: Any, out: Any) -> None:
    """The bits of |stored - base|: integers of the same order."""
    for j in range(len(out)):
        out[j] = bits_of(load(stored, j) - load(base, j)) & MAGNITUDE


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
