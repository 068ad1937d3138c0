"""Are two checkpoints the same model?  Weights and configs in little memory, then, if asked, the logits.

    verify("Llama-2-7b", "Llama-2-7b-hf").verdict        # "the same model"
    compare_logits("A", "B").causes

compare.py   part by part, then the configs      logits.py    both through transformers, and how far apart
values.py    how two tensors differ              causes.py    experiments that find out why
configs.py   specs, facts, tokenizers            trials.py    one change at a time, run again
findings.py  what was found, and the verdict     weights.py   a loaded model as parts that can be changed
ambiguity.py which reading of ambiguous files    report.py    what was found about the logits
             predicts a text                     streamed.py  logits in less memory than a model takes
"""

from __future__ import annotations

import os

from surgery.arguments import checked
from surgery.conversion.request import LEAST, default_memory
from surgery.formats.base import Checkpoint, Options
from surgery.formats.registry import by_side, lenient, open_checkpoint, recognise
from surgery.units import parse_size
from surgery.verification.compare import Progress, compare
from surgery.verification.findings import Comparison

__all__ = ["Comparison", "compare", "open_both", "verify"]

Path = str | os.PathLike[str]


@checked
def verify(
    a: Path,
    b: Path,
    *,
    options: Options | None = None,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Are the checkpoints in two folders, in any formats and at any parallel sizes, the same model?

    `options` are reading options of either format, `max_memory` is in bytes, or a text such as "1GB", `progress` is
    told of bytes read.  Raises SurgeryError if one cannot be read; a difference is a result, not an error.
    """
    left, right = open_both(a, b, options or {})
    memory = parse_size(max_memory, LEAST) if isinstance(max_memory, str) else max_memory
    return compare(left, right, max_memory=memory or default_memory(), progress=progress)


def open_both(a: Path, b: Path, options: Options) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints, each given the options that its format knows.  Raises UsageError if neither knows one."""
    by_side(options, map(recognise, (a, b)))
    return open_checkpoint(a, options=lenient(a, options)), open_checkpoint(b, options=lenient(b, options))
