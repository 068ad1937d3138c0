"""Verify two folders: open both, whatever their formats, and compare.

verify("Llama-2-7b", "Llama-2-7b-hf").verdict        # "the same model"
"""

from __future__ import annotations

import os

from surgery.conversion.convert import default_memory
from surgery.errors import UsageError
from surgery.formats.base import Checkpoint, Options
from surgery.formats.registry import open_checkpoint, recognise
from surgery.verification.compare import Comparison, Progress, compare

Path = str | os.PathLike[str]


def verify(
    a: Path, b: Path, *, options: Options | None = None, max_memory: int | None = None, progress: Progress | None = None
) -> Comparison:
    """Are the checkpoints in two folders, in any formats and at any parallel sizes, the same model?

    `options` are reading options of either format, `max_memory` is in bytes, `progress` is told of bytes read.
    Raises SurgeryError if one cannot be read; a difference is a result, not an error.
    """
    left, right = open_both(a, b, options or {})
    return compare(left, right, max_memory=max_memory or default_memory(), progress=progress)


def open_both(a: Path, b: Path, options: Options) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints, each given the options that its format knows.  Raises UsageError if neither knows one."""
    left, right = ({k: v for k, v in options.items() if k in recognise(p).option_names("read")} for p in (a, b))
    if unused := options.keys() - left.keys() - right.keys():
        raise UsageError(f"reading neither has an option {', '.join(sorted(unused))}", hint="see `surgery formats`")
    return open_checkpoint(a, options=left), open_checkpoint(b, options=right)
