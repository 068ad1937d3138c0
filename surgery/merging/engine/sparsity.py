"""Sparsity masks for the compiled loops: a magnitude range per source, or explicit bytes.

    for mask in between(block, [(found, NEVER), (0, NEVER)], first_wins=True): ...

A limit is a magnitude's bits (0 keeps all, NEVER none), or the element of a rank.  Of the elements that equal this
one, those on one side of it rank higher: a block that it lies in is cut in two there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from surgery.merging.engine.inputs import Block
from surgery.merging.engine.order_statistics import Found

NEVER = 0xFFFFFFFF  # above the bits of any magnitude
Bound = Found | int


@dataclass(frozen=True)
class Mask:
    """Of the next `count` elements of a block, and of each source i but the base, these stay:

    those with kept[i] or, if that has no entries, with bits of magnitude in [least[i], most[i]).  What is kept can be
    left to the loops: chance says (the first element's place, or -1; then for each source, as arrays: the keys of its
    random numbers, and the probability in 65536ths: how many, and what is left).
    """

    count: int
    least: Any
    most: Any
    kept: Any
    chance: Any

    @property
    def limits(self) -> tuple[Any, Any, Any, Any]:
        """As the loops take it."""
        return self.kept, self.chance, self.least, self.most


def everything(block: Block, kept: Any = None, chance: Any = None) -> Mask:
    """All of a block; with `kept` [sources, elements] what that says, or what `chance` says."""
    least, most, none = _no_limits(len(block.bits) - 1)
    return Mask(block.numel, least, most, none if kept is None else kept, chance or _no_chance())


@functools.cache
def _no_chance() -> tuple[int, Any, Any, Any, Any]:
    import numpy as np

    return -1, np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0)


@functools.cache
def _no_limits(sources: int) -> tuple[Any, Any, Any]:
    import numpy as np

    return np.zeros(sources, np.uint32), np.full(sources, NEVER, np.uint32), np.empty((sources, 0), np.uint8)


def between(block: Block, bounds: Sequence[tuple[Bound, Bound]], first_wins: bool) -> list[Mask]:
    """What lies between two bounds, for each source; ties as in `order_statistics.at_least`."""
    import numpy as np

    cuts = {0, block.numel}
    cuts |= {_place(block, f, first_wins) for pair in bounds for f in pair if isinstance(f, Found)}
    none = np.empty((len(bounds), 0), np.uint8)

    def bits(bound: Bound, at: int) -> int:
        if not isinstance(bound, Found):
            return bound
        return bound.bits + (first_wins if at >= _place(block, bound, first_wins) else not first_wins)

    masks = []
    for a, b in pairwise(sorted(cuts)):
        low, high = (np.array([bits(pair[side], a) for pair in bounds], np.uint32) for side in (0, 1))
        masks.append(Mask(b - a, low, high, none, _no_chance()))
    return masks


def parts(block: Block, masks: Sequence[Mask]) -> Iterator[tuple[Any, Mask]]:
    """The bits of the elements of every mask, in order: nearly always the whole block for its only one."""
    import numpy as np

    at = 0
    for mask in masks:
        yield block.bits if len(masks) == 1 else np.ascontiguousarray(block.bits[:, at : at + mask.count]), mask
        at += mask.count


def _place(block: Block, found: Found, first_wins: bool) -> int:
    """How many of the block's elements lie before the one that was found, itself among them if the first wins."""
    end = found.index + first_wins
    return sum(min(max(end - start, 0), count) for start, count in block.runs())
