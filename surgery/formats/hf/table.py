"""A Hugging Face family's table.

table("qwen3_moe", names)          # `names` of stored tensors decide how they are spelled; `ignore`: more to leave out
table("qwen3_moe")                 # as its published checkpoints are
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from surgery.formats.hf.families import FAMILIES
from surgery.formats.hf.rows import IGNORED, Spellings
from surgery.formats.table import Row, Table

UNEQUAL = "the head of a tied model has other values than its embedding: -O tied=no keeps it, -O tied=yes leaves it out"


def table(model_type: str, names: Collection[str] = (), ignore: Sequence[tuple[str, str]] = ()) -> Table:
    """The rows of a family."""
    family = FAMILIES[model_type]
    rows = [row for spellings in family.spellings for row in _spelled(spellings, names)]
    return Table("hf", (*family.rows, *rows), (*IGNORED, *ignore), unequal=UNEQUAL)


def _spelled(spellings: Spellings, names: Collection[str]) -> tuple[Row, ...]:
    """The spelling that some name shows; the first if none does."""
    shown = (rows for pattern, rows in spellings if any(re.search(pattern, name) for name in names))
    return next(shown, spellings[0][1])
