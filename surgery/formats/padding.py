"""Padding rows of the vocabulary: how many a checkpoint has, as far as anybody knows, and what is said of them.

    padding_rows(checkpoint)          # 50; None if nothing says how many tokens there are
    padding_notes(checkpoint)         # ["50 of the 50304 rows of the vocabulary, padded to ..."]

Megatron, GPT-NeoX, OLMo and OLMo-core store more rows than there are tokens.  They are bits like any others and are
kept; which of them are tokens, the tokenizer says, and few configs.
"""

from __future__ import annotations

from surgery.formats.base import Checkpoint


def multiple_of(rows: int, multiple: object, tp: int = 1) -> str:
    """To what so many rows may have been padded, in words; "" if they are no multiple, or of 1 alone."""
    step = multiple * tp if type(multiple) is int and multiple > 0 else 1
    ranks = f" x tp {tp}" if tp > 1 else ""
    return f"padded to a multiple of {multiple}{ranks}" if step > 1 and rows % step == 0 else ""


def padding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the vocabulary that no token uses; None if nothing says it."""
    tokens = tokens_of(checkpoint)
    return None if tokens is None else max(0, checkpoint.spec.vocab - tokens)


def padding_notes(checkpoint: Checkpoint) -> list[str]:
    """What a reader of a checkpoint should know of its padding; nothing where no format has padded."""
    rows, tokens, padding = checkpoint.spec.vocab, tokens_of(checkpoint), checkpoint.padding
    if not padding or (tokens is not None and tokens >= rows):
        return []
    if tokens is None:
        return [f"the {rows} rows of the vocabulary are {padding}: how many are tokens is not known, and all are kept; "
                "--tokenizer PATH says it, surgery convert --vocab-size N keeps N of them"]  # fmt: skip
    return [f"{rows - tokens} of the {rows} rows of the vocabulary, {padding}, are no tokens and are kept; "
            f"surgery convert --vocab-size {tokens} leaves them out"]  # fmt: skip


def tokens_of(checkpoint: Checkpoint) -> int | None:
    """How many tokens the vocabulary has, as its config or its tokenizer says; None if neither does."""
    found = checkpoint.tokenizer
    return checkpoint.spec.true_vocab or (found.vocab_size if found else None)
