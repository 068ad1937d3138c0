"""Loops of Model Stock: products of task vectors, and a mean between them and the base."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.merging.engine.kernels.compiled import compiled
from surgery.merging.engine.kernels.numbers import GROUP, STRIP, f4, f8, load, store


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
