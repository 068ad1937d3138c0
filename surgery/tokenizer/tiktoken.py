"""tiktoken rank files (Llama 3 and later), the `tokenizer.json` that says the same, and the way back.

    ranks = read("tokenizer.model")                     # {b"!": 0, ...}: lines of `base64 rank`
    data = tokenizer_json(ranks, NAMES["reference"])    # HF's file
    ranks, reason = ranks_of(json.loads(data))          # and back, or None and why not

The file holds neither the pattern that cuts a text into words nor the special tokens: both are constants of the
program that reads it (llama-models, models/llama3/tokenizer.py).  256 special tokens follow the ranks.  Their names
differ between releases, though no token that a release gives a meaning ever has another place.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import FileError, show
from surgery.tensors.files import read_small
from surgery.tokenizer import bpe

LARGEST = 64 << 20  # bytes; Llama 4's file of 200k ranks has 3.6 MB
RANKS = 1_000_000
SPECIALS = 256
LLAMA_4 = 200_000  # ranks of Llama 4, whose words and 2048 special tokens are others
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2})[ \t]+([0-9]{1,8})\s*")


def _names(first: str) -> tuple[str, ...]:
    """256 names: those in `first`, where `_` stands for the next reserved one, then reserved ones."""
    known, out, reserved = first.split(), [], 0
    for name in known + ["_"] * (SPECIALS - len(known)):
        out.append(f"<|{name}|>" if name != "_" else f"<|reserved_special_token_{reserved}|>")
        reserved += name == "_"
    return tuple(out)


# "3" and "3.1" as in the tokenizer.json of those releases on the hub; "reference" as in llama-models 0.3
NAMES = {
    "3": _names("begin_of_text end_of_text _ _ _ _ start_header_id end_header_id _ eot_id"),
    "3.1": _names(
        "begin_of_text end_of_text _ _ finetune_right_pad_id _ start_header_id end_header_id eom_id eot_id python_tag"
    ),
    "reference": _names(
        "begin_of_text end_of_text _ _ finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id "
        "python_tag image"
    ),
}
NAMES |= {"3.2": NAMES["3.1"], "3.3": NAMES["3.1"]}

SPLIT: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


def _letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: itself where it is visible Latin-1, else the next from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


LETTER = _letters()
BYTE = {letter: byte for byte, letter in LETTER.items()}


def specials(size: int) -> int:
    """How many special tokens Meta's programs append to `size` ranks."""
    return 2048 if size == LLAMA_4 else SPECIALS


def looks_like(head: bytes) -> bool:
    """Are these the first bytes of a rank file?"""
    return LINE.fullmatch(head.lstrip()[:2048].split(b"\n", 1)[0]) is not None


def read(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """The ranks in a file, in order.  Raises FileError for anything but complete, contiguous, unique ranks."""
    data, out = read_small(path, LARGEST, "a tiktoken rank file"), {}
    if data.count(b"\n") > RANKS:
        raise _broken(path, None, f"more than {RANKS} ranks")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line)
        if not found:
            raise _broken(path, number, f"{show(line)} is not `base64 rank`")
        try:
            token = base64.b64decode(found[1], validate=True)
        except binascii.Error:
            raise _broken(path, number, f"{show(found[1])} is not base64") from None
        if token in out or not 0 < len(token) <= bpe.LONGEST:
            raise _broken(path, number, f"the token {show(token)} is empty, too long, or there twice")
        out[token] = int(found[2])
    ranks = dict(sorted(out.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise _broken(path, None, "the ranks are not 0, 1, 2 and so on without gaps and repeats")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _broken(path, None, f"{len(missing)} of the 256 single bytes have no rank, such as {missing[0]}")
    return ranks


def _broken(path: str | os.PathLike[str], line: int | None, what: str) -> FileError:
    where = "" if line is None else f"line {line}: "
    hint = "the file is truncated or damaged; copy or download it again"
    return FileError(f"tiktoken rank file: {where}{what}", file=path, hint=hint)


def write(ranks: Mapping[bytes, int]) -> bytes:
    """The rank file, as Meta's are written: one `base64 rank` a line."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


def _text(token: bytes) -> str:
    return "".join(LETTER[byte] for byte in token)


def _pairs(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    return [(_text(left), _text(right)) for left, right in bpe.merges(ranks)]


def tokenizer_json(ranks: Mapping[bytes, int], specials: Sequence[str]) -> bytes:
    """The tokenizer.json of Llama 3's releases for these ranks, the special tokens following them."""
    size, bos = len(ranks), specials[0]
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return bpe.document(
        bpe.bpe({_text(token): rank for token, rank in ranks.items()}, _pairs(ranks), ignore_merges=True),
        added=[bpe.added_token(size + i, name, special=True) for i, name in enumerate(specials)],
        normalizer=None,
        pre_tokenizer=SPLIT,
        post_processor={"type": "Sequence", "processors": [level, bpe.template(bos, size)]},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )


def ranks_of(document: Any) -> tuple[dict[bytes, int] | None, str]:
    """The ranks that a tokenizer.json holds, or None and why no rank file gives the same ids.

    Proved, not believed: ids are 0, 1, 2 and so on, and the merges that follow from them are the merges in the file,
    one by one; words are cut by the pattern that is built into Meta's program.
    """
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        return None, "its model is not BPE"
    if model.get("ignore_merges") is not True or model.get("byte_fallback") or model.get("dropout"):
        return None, "its BPE model has other settings than Llama 3's"
    if document.get("normalizer") is not None or not _splits_alike(document.get("pre_tokenizer")):
        return None, "it cuts texts into words by another pattern than Llama 3's"
    vocab = model["vocab"]
    if not all(type(rank) is int for rank in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
        return None, "its ids are not 0, 1, 2 and so on"
    if any(letter not in BYTE for text in vocab for letter in text) or any(len(t) > bpe.LONGEST for t in vocab):
        return None, "its tokens are not bytes"
    ranks = {bytes(BYTE[letter] for letter in text): rank for text, rank in vocab.items()}
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if any(bytes([byte]) not in ranks for byte in range(256)):
        return None, "it lacks some of the 256 single bytes"
    merges = model.get("merges")
    if not isinstance(merges, list) or [_pair(merge) for merge in merges] != _pairs(ranks):
        return None, "its merges do not follow from the order of its tokens"
    return ranks, ""


def _pair(merge: Any) -> tuple[Any, ...]:
    """A merge as a pair: older files write "a b", newer ones ["a", "b"]."""
    if isinstance(merge, str):
        return tuple(merge.split(" "))
    return tuple(merge) if isinstance(merge, list) else ()


def _splits_alike(pre_tokenizer: Any) -> bool:
    """Is this Llama 3's pre-tokenizer?  `trim_offsets` changes no ids."""
    steps = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return False
    return [{**step, "trim_offsets": None} for step in steps] == [
        {**step, "trim_offsets": None} for step in SPLIT["pretokenizers"]
    ]
