"""Operations on whole checkpoints: pure functions from checkpoint to checkpoint, lazy and composable.

to_dtype(to_vocab(open_checkpoint("gpt-neox-20b"), 50304), "bfloat16")
"""

from __future__ import annotations

import os
from dataclasses import replace

from surgery import tokenizer
from surgery.errors import FileError, LayoutError
from surgery.formats.base import Checkpoint
from surgery.formats.optimizer import MASTER
from surgery.formats.padding import tokens_of
from surgery.model.spec import VOCABULARY
from surgery.storage.mirror import place_of
from surgery.tensors.lazy import Concat, Fill, Lazy, Slice, cast

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def to_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Every floating-point part in another dtype, rounded once: from its master, if one was opened with it."""
    masters = checkpoint.optimizer.roles[MASTER] if checkpoint.optimizer else {}
    exact = {n: p if p.dtype == dtype else masters.get(n, p) for n, p in checkpoint.parts.items()}
    parts = {name: cast(part, dtype) if _is_float(part) else part for name, part in exact.items()}
    return replace(checkpoint, parts=parts)


def _is_float(part: Lazy) -> bool:
    return part.dtype.startswith(("float", "bfloat"))


def from_masters(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint whose weights are its fp32 masters, for formats that keep none beside them."""
    assert checkpoint.optimizer is not None
    parts = {**checkpoint.parts, **checkpoint.optimizer.roles[MASTER]}
    return replace(checkpoint, parts=parts, optimizer=replace(checkpoint.optimizer, kept=False))


def with_rows(checkpoint: Checkpoint, rows: int) -> Checkpoint:
    """The vocabulary cut, or padded with zeros, to `rows`, whatever they hold."""
    spec = checkpoint.spec

    def fit(part: Lazy) -> Lazy:
        if rows <= spec.vocab:
            return Slice(part, 0, 0, rows)
        return Concat([part, Fill((rows - spec.vocab, *part.shape[1:]), part.dtype)], 0)

    if rows == spec.vocab:
        return checkpoint
    parts = {name: fit(part) if name in VOCABULARY else part for name, part in checkpoint.parts.items()}
    state = checkpoint.optimizer and checkpoint.optimizer.mapped(lambda n, t: fit(t) if n in VOCABULARY else t, parts)
    known = spec.true_vocab if spec.true_vocab is not None and spec.true_vocab <= rows else None
    spec = spec.replace(vocab=rows, true_vocab=known)
    return replace(checkpoint, parts=parts, spec=spec, optimizer=state, padding="")


def to_vocab(checkpoint: Checkpoint, rows: int) -> Checkpoint:
    """As `with_rows`, for people: a note says it.  Raises LayoutError if tokens would be cut."""
    before = checkpoint.spec
    if rows == before.vocab:
        return replace(checkpoint, padding="")
    tokens = tokens_of(checkpoint)
    if tokens is not None and rows < tokens:
        raise LayoutError(f"--vocab-size {rows} would cut tokens: the tokenizer has {tokens}")
    resized = with_rows(checkpoint, rows)
    verb = "cut" if rows < before.vocab else "padded with zeros"
    note = f"the vocabulary of {before.vocab} rows is {verb} to {rows}"
    return replace(resized, spec=resized.spec.replace(true_vocab=tokens), notes=(*checkpoint.notes, note))


def with_tokenizer(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint with the tokenizer of another folder or file.  Raises FileError if there is none."""
    place = place_of(path)
    found = tokenizer.find(place, place)
    if found is None:
        raise FileError(
            "holds no tokenizer", file=path, hint="give a tokenizer.json, a tokenizer.model or their folder"
        )
    return replace(checkpoint, tokenizer=found)
