"""Padding rows of vocabularies: Megatron and NeoX store more rows than there are tokens, and how many depends on TP.

    opened, notes = trimmed(opened)         # every model has the rows of the one with the fewest

Rows are cut only where they are known to be padding: the files or the tokenizer say so, or all of them are zeros.
What has more tokens than another model is left alone, and the merge will ask for `tokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.formats.base import Checkpoint
from surgery.formats.operations import with_rows
from surgery.merging.reader import Reference
from surgery.model.spec import VOCABULARY
from surgery.tensors.lazy import Lazy, whole


def trimmed(opened: Mapping[Reference, Checkpoint]) -> tuple[dict[Reference, Checkpoint], list[str]]:
    """The models without padding rows that the smallest vocabulary lacks, and what was cut."""
    rows = min(c.spec.vocab for c in opened.values())
    out, notes = dict(opened), []
    for model, checkpoint in opened.items():
        if checkpoint.spec.vocab > rows and (why := _padding(checkpoint, rows)):
            out[model] = with_rows(checkpoint, rows)
            notes.append(
                f"{model}: {checkpoint.spec.vocab - rows} rows of the vocabulary are cut, they are padding ({why})"
            )
    return out, notes


def _padding(checkpoint: Checkpoint, rows: int) -> str:
    """Why everything from `rows` on is padding; "" if it may be tokens."""
    spec, found = checkpoint.spec, checkpoint.tokenizer
    if spec.true_vocab is not None:
        return f"{spec.true_vocab} are true" if spec.true_vocab <= rows else ""
    if found is not None and found.vocab_size is not None:
        return f"the tokenizer has {found.vocab_size} tokens" if found.vocab_size <= rows else ""
    tails = [checkpoint.parts[name] for name in VOCABULARY if name in checkpoint.parts]
    return "" if any(_nonzero(part, rows) for part in tails) else "zeros"


def _nonzero(part: Lazy, rows: int) -> bool:
    box = ((rows, part.shape[0]), *whole(part.shape)[1:])
    return bool(part.read(box).any())
