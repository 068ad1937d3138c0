"""How many bytes of text each token stands for, read from a `tokenizer.json`.

    lengths = byte_lengths(json.loads(data))                # [1, 1, 2, ...]; None if it cannot be told
    sum(lengths[i] for i in ids) == len(text.encode())

Special tokens stand for no text.  The blank that SentencePiece puts before a text counts as a byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from surgery.tokenizer.sentencepiece import SPACE
from surgery.tokenizer.tiktoken import BYTE

LARGEST = 1 << 24  # ids


def byte_lengths(document: Mapping[str, Any]) -> list[int] | None:
    """Bytes of each id, 0 for special tokens and gaps.  None for tokenizers whose pieces do not say (WordPiece)."""
    measure = _measure(document)
    model, added = document.get("model"), document.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if measure is None or not isinstance(vocab, (dict, list)):
        return None
    pieces = vocab.items() if isinstance(vocab, dict) else ((piece[0], i) for i, piece in enumerate(vocab))
    found = {index: measure(piece) for piece, index in pieces}
    found |= {token["id"]: 0 if token.get("special") else len(token["content"].encode()) for token in added}
    size = 1 + max(found, default=-1)
    return [found.get(i, 0) for i in range(size)] if 0 < size <= LARGEST else None


def _measure(document: Mapping[str, Any]) -> Callable[[str], int] | None:
    """Bytes of a piece of the vocabulary."""
    steps = set(_types(document.get("decoder"))) | set(_types(document.get("pre_tokenizer")))
    if "ByteLevel" in steps:
        return lambda piece: len(piece) if all(letter in BYTE for letter in piece) else len(piece.encode())
    if steps & {"ByteFallback", "Metaspace"}:
        return lambda piece: 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else len(piece.replace(SPACE, " ").encode())
    return None


def _types(step: Any) -> Iterator[str]:
    """The types of a step of a tokenizer.json, and of all within it."""
    if isinstance(step, dict):
        yield str(step.get("type"))
        for inner in (*(step.get("decoders") or ()), *(step.get("pretokenizers") or ())):
            yield from _types(inner)
