"""Loops of weighted sums: linear merges, and the last step of slerp."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.merging.engine.kernels.compiled import compiled, fma
from surgery.merging.engine.kernels.numbers import STRIP, f4, load, store


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
