"""Token ids to run a model on: prose that comes along, a text file, or random ones without a tokenizer.

ids, what = prose_tokens(checkpoint, 256)       # [2, 128], "English prose"
ids = tokens_of(checkpoint, "code.txt", 4096)   # [16, 256]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import FileError, UsageError
from surgery.formats.base import Checkpoint
from surgery.running.whole import fixed_tokens

if TYPE_CHECKING:
    import torch

PROOF_LENGTH = 128  # tokens per sequence
LENGTH = 256
LIMIT = 64 << 20  # bytes of a calibration text


def prose() -> str:
    """English prose in the public domain (Lincoln 1863, Carroll 1865): the same for everybody."""
    return (Path(__file__).parent / "prose.txt").read_text()


def prose_tokens(source: Checkpoint, count: int) -> tuple[torch.Tensor, str]:
    """Ids [batch, length] of prose, or random ones without a tokenizer, and which of both they are."""
    ids = encoded(source, prose())
    if ids is None or len(set(ids)) < 2:
        return _random(source, PROOF_LENGTH, count), "random tokens"
    return _filled(ids, PROOF_LENGTH, count), "English prose"


def tokens_of(source: Checkpoint, path: str | None, count: int) -> torch.Tensor:
    """Ids [batch, length] of a text file (by default some prose), repeated if it is short; random without a tokenizer.

    Raises UsageError for a text that the checkpoint has no tokenizer for, FileError if it cannot be read.
    """
    ids = encoded(source, prose() if path is None else read_text(path))
    if ids is not None:
        return _filled(ids, LENGTH, count)
    if path is not None:
        raise UsageError(f"{path}: the checkpoint has no tokenizer that can read a text")
    return _random(source, LENGTH, count)


def encoded(source: Checkpoint, text: str, least: int = 2) -> list[int] | None:
    """The text's ids by the checkpoint's tokenizer.json; None if it has none that can be used, or they are
    fewer than `least`."""
    path = source.tokenizer.files.get("tokenizer.json") if source.tokenizer else None
    if path is None:
        return None
    try:
        from transformers import PreTrainedTokenizerFast

        ids = [int(i) for i in PreTrainedTokenizerFast(tokenizer_file=str(path)).encode(text)]
    except Exception:  # whatever it raises on a strange file: other tokens serve as well
        return None
    return ids if len(ids) >= least and max(ids) < source.spec.vocab else None


def read_text(path: str) -> str:
    """A text file.  Raises FileError."""
    try:
        with open(path, "rb") as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise FileError("is larger than 64 MiB: a few thousand tokens are enough to calibrate", file=path)
        text = data.decode()
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", file=path) from None
    except UnicodeDecodeError as error:
        raise FileError("is no UTF-8 text", file=path, byte=error.start) from None
    if not text.strip():
        raise FileError("is empty", file=path)
    return text


def _random(source: Checkpoint, length: int, count: int) -> torch.Tensor:
    return fixed_tokens(source.spec.true_vocab or source.spec.vocab, *_shape(length, count))


def _filled(ids: list[int], length: int, count: int) -> torch.Tensor:
    import torch

    batch, length = _shape(length, count)
    while len(ids) < batch * length:
        ids = ids + ids
    return torch.tensor(ids[: batch * length]).reshape(batch, length)


def _shape(length: int, count: int) -> tuple[int, int]:
    length = min(length, count)
    return max(1, count // length), length
