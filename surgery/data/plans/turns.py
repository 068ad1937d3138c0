"""Conversations that are longer than a row: they end after the last answer that fits whole, or are left out.

ends = whole_turns(source, starts, ends, 2048)          # ends[i] == starts[i]: no answer of it fits
"""

from __future__ import annotations

import numpy as np

from surgery.data.files.mapped import Array
from surgery.data.files.tokens import TokenSource


def whole_turns(source: TokenSource, starts: Array, ends: Array, length: int) -> Array:
    """Where each document [documents] is to end, int64: by the label mask, whose runs of 1 are answers.

    A token that is none of an answer, such as the line's end after it, is not needed.  Documents without a mask are
    left out where they are too long.
    """
    ends = ends.copy()
    for i in np.flatnonzero(ends - starts > length):
        first = np.array([starts[i]])
        mask = source.label_mask(first, length + 1)  # one more, to see whether an answer goes on
        learnt = np.zeros(length + 1, bool) if mask is None else mask[0].astype(bool)
        over = np.flatnonzero(learnt[:-1] & ~learnt[1:])
        ends[i] = starts[i] + (over[-1] + 1 if len(over) else 0)
    return ends
