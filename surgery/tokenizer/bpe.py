"""Merges of a byte-pair vocabulary, and the `tokenizer.json` document that holds them.

    merges({b"a": 0, b"b": 1, b"ab": 2})          # [(b"a", b"b")]

SentencePiece and tiktoken store no merges: they join any two neighbours whose concatenation is a piece, the best
piece first.  `tokenizer.json` lists pairs instead, so every split of a piece into two pieces becomes a merge, in
the order of the pieces.  Among the splits of one piece the order is by the ranks of the two halves: the order that
Llama 3's published `tokenizer.json` has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T", bytes, str)
LONGEST = 512  # bytes or characters of one piece: work grows with the square; the longest known piece has 128


def merges(rank: Mapping[T, int], order: Iterable[T] | None = None) -> list[tuple[T, T]]:
    """All splits of the pieces into two pieces, in the order of the pieces (default: of their ranks)."""
    out: list[tuple[T, T]] = []
    for piece in sorted(rank, key=rank.__getitem__) if order is None else order:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [pair for pair in splits if pair[0] in rank and pair[1] in rank]
        out += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return out


def added_token(index: int, content: str, *, special: bool, normalized: bool = False) -> dict[str, Any]:
    """An entry of `added_tokens`: a text that is cut out before anything else is looked at."""
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": normalized,
        "special": special,
    }


def template(first: str | None, index: int | None) -> dict[str, Any] | None:
    """The post-processor that puts the token `first` with id `index` before a text; None if there is none."""
    if first is None:
        return None
    head = {"SpecialToken": {"id": first, "type_id": 0}}
    single = [head, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": first, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": {first: {"id": first, "ids": [index], "tokens": [first]}},
    }


def bpe(vocab: Mapping[str, int], pairs: Sequence[tuple[str, str]], **options: Any) -> dict[str, Any]:
    """The `model` of a tokenizer.json.  Merges are "a b" strings, which every version of `tokenizers` reads."""
    spaced = any(" " in piece for piece in vocab)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": dict(vocab),
        "merges": [list(pair) for pair in pairs] if spaced else [f"{a} {b}" for a, b in pairs],
    }


def document(
    model: dict[str, Any],
    *,
    added: Sequence[dict[str, Any]],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    post_processor: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> bytes:
    """A tokenizer.json with its keys in the order in which `tokenizers` writes them."""
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }
    return dump(whole)


def dump(value: Any) -> bytes:
    """JSON as the Hugging Face libraries write it: two spaces, no escapes, a newline at the end."""
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"
