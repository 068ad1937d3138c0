"""Rows to evaluate on: what a data plan holds out, or the first of a token file.

rows_of("plan", 200, length=2048, vocabulary=50304)            # {"web": Rows, "math": Rows}
rows_of("tokens.bin", 200, length=2048, vocabulary=50304)      # {"tokens": Rows}
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from surgery.data.files.readers import found_at, open_tokens
from surgery.data.files.tokens import TokenSource
from surgery.data.plans.batches import Batches
from surgery.data.plans.plan import open_plan
from surgery.data.plans.plan_file import NAME
from surgery.data.rows import Rows, isolated, restarting, shifted
from surgery.errors import UsageError
from surgery.storage.mirror import place_of


def rows_of(path: str | os.PathLike[str], limit: int | None, length: int, vocabulary: int) -> dict[str, Rows]:
    """By domain: the held-out rows of each source of a plan, or windows of `length` of a token file.

    At most `limit` rows of each.  Raises UsageError if there is none, FileError if an id is beyond the vocabulary.
    """
    if (place_of(path) / NAME).is_file():
        found = _planned(path, limit)
    else:
        file = found_at(path)
        found = {file.stem: _windows(file, limit, length, vocabulary)}
    if not any(len(rows) for rows in found.values()):
        raise UsageError(f"{path} holds no row", hint="a plan holds rows out if its mixture says `holdout`")
    return {name: rows for name, rows in found.items() if len(rows)}


def _planned(path: str | os.PathLike[str], limit: int | None) -> dict[str, Rows]:
    batches = Batches(open_plan(path), rows_per_step=1)
    return {name: batches.heldout(name, stop=limit) for name in batches.sources}


def _windows(path: Path, limit: int | None, length: int, vocabulary: int) -> Rows:
    """Windows that follow one another; documents do not see each other, where the file tells them."""
    source = TokenSource(path.stem, tuple(open_tokens(path, vocab_size=vocabulary)), vocabulary)
    length = min(length, source.tokens)
    count = source.tokens // length if length else 0
    starts = np.arange(count if limit is None else min(count, limit), dtype=np.int64) * length
    tokens = source.windows(starts, length)
    labels = shifted(tokens, source.label_mask(starts, length))
    where, offsets = source.starts_within(starts, length)
    inside = offsets > 0
    where, offsets = where[inside], offsets[inside]
    positions = restarting((len(starts), length), where, offsets)
    return Rows(tokens, isolated(labels, where, offsets), positions, np.zeros_like(starts), starts // max(1, length))
