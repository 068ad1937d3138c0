"""SentencePiece models (Llama 1 and 2, Code Llama): their protobuf, and the `tokenizer.json` that says the same.

    model = read("tokenizer.model")
    data, notes = tokenizer_json(model)      # data is None where tokenizer.json cannot say the same

The file is a protobuf `ModelProto` (sentencepiece's src/sentencepiece_model.proto); the few fields that matter are
read here, without the protobuf library.  Meta's programs put a space before every text, also before one that begins
with a space, and never look for control pieces in a text; transformers' own LlamaTokenizer adds that space only
where there is none.  Hence the normalizer below, and PreTrainedTokenizerFast as the class that keeps it.
"""

from __future__ import annotations

import base64
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import FileError, show
from surgery.tensors.files import read_small
from surgery.tokenizer import bpe

LARGEST = 64 << 20  # bytes; the largest known model (256k pieces) has 4.3 MB
PIECES = 1_000_000
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2  # TrainerSpec.model_type
SPACE = "\u2581"

# field number: (attribute, default) of the parts of the messages that change what a text is encoded to
TRAINER = {
    3: ("model_type", 1),
    24: ("space_after", 0),
    35: ("byte_fallback", 0),
    45: ("unk", b"<unk>"),
    46: ("bos", b"<s>"),
    47: ("eos", b"</s>"),
    48: ("pad", b"<pad>"),
}
NORMALIZER = {
    2: ("charsmap", b""),
    3: ("space_before", 1),
    4: ("squeeze_spaces", 1),
    5: ("escape_spaces", 1),
}
PIECE: dict[int, tuple[str, Any]] = {1: ("text", b""), 2: ("score", 0.0), 3: ("type", NORMAL)}


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its place is its id.  `type` as in SentencePiece.Type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Model:
    """What a ModelProto says about encoding.  The settings are named after what they do to a text."""

    pieces: tuple[Piece, ...]
    trainer: dict[str, Any]
    normalizer: dict[str, Any]

    def control(self, role: str) -> tuple[str, int] | None:
        """Text and id of the control piece in the role "bos", "eos" or "pad", or of the unknown piece, "unk"."""
        want = UNKNOWN if role == "unk" else CONTROL
        for index, piece in enumerate(self.pieces):
            if piece.type == want and piece.text == self.trainer[role]:
                return piece.text, index
        return None


def read(path: str | os.PathLike[str]) -> Model:
    """The model in a file.  Raises FileError if it is no well-formed SentencePiece model."""
    data = read_small(path, LARGEST, "a SentencePiece model")
    try:
        return parse(data)
    except (IndexError, ValueError, struct.error) as error:
        raise FileError(
            f"is not a SentencePiece model: {ascii(str(error))[1:-1]}",
            file=path,
            hint="the file is truncated or damaged; copy or download it again",
        ) from None


def parse(data: bytes) -> Model:
    """The model in the bytes of a file.  Raises ValueError, IndexError or struct.error if there is none."""
    pieces: list[Piece] = []
    trainer, normalizer = _message(b"", TRAINER), _message(b"", NORMALIZER)
    for number, value in _fields(data):
        if number not in (1, 2, 3):
            continue
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is no message")
        if number == 1:
            pieces.append(Piece(**_message(value, PIECE)))
        elif number == 2:
            trainer = _message(value, TRAINER)
        else:
            normalizer = _message(value, NORMALIZER)
        if len(pieces) > PIECES:
            raise ValueError(f"more than {PIECES} pieces")
    _check(pieces, trainer)
    return Model(tuple(pieces), trainer, normalizer)


def _check(pieces: list[Piece], trainer: dict[str, Any]) -> None:
    texts = [piece.text for piece in pieces]
    if sum(piece.type == UNKNOWN for piece in pieces) != 1:
        raise ValueError("there must be one unknown piece")
    if len(set(texts)) != len(texts):
        raise ValueError("two pieces are equal")
    if not all(texts) or max(map(len, texts)) > bpe.LONGEST:
        raise ValueError(f"a piece is empty or longer than {bpe.LONGEST} characters")
    if not all(math.isfinite(piece.score) and NORMAL <= piece.type <= BYTE for piece in pieces):
        raise ValueError("a piece has no finite score or an unknown type")
    found = {piece.text for piece in pieces if piece.type == BYTE}
    if found - {f"<0x{i:02X}>" for i in range(256)} or (trainer["byte_fallback"] and len(found) != 256):
        raise ValueError("byte fallback needs the pieces <0x00> to <0xFF>, and no other byte pieces")


def _message(data: bytes, known: dict[int, tuple[str, Any]]) -> dict[str, Any]:
    """The known fields of a message; bytes that are text are decoded, except for the charsmap."""
    out = dict(known.values())
    for number, value in _fields(data):
        if number not in known:
            continue
        name, default = known[number]
        if type(value) is not type(default):
            raise ValueError(f"field {number} has another type")
        out[name] = value
    return {
        name: value.decode() if isinstance(value, bytes) and name != "charsmap" else value
        for name, value in out.items()
    }


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Numbers and values of a message's fields: varints, 4-byte floats, byte strings; 8-byte fields are skipped."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 2:
            size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError(f"a field of {show(size)} bytes at byte {at} ends outside its message")
            yield number, data[at : at + size]
            at += size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            if wire == 5:
                yield number, struct.unpack_from("<f", data, at)[0]
            at += size
            if at > len(data):
                raise ValueError("a field ends outside its message")
        else:
            raise ValueError(f"a field at byte {at} has the unknown wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"a number at byte {at} has more than 10 bytes")


def obstacle(model: Model) -> str | None:
    """Why no tokenizer.json can say the same as the model, or None."""
    if model.trainer["model_type"] != BPE:
        return "its model is not BPE"
    if any(piece.type == UNUSED for piece in model.pieces):
        return "it has unused pieces"
    if model.trainer["space_after"] or not model.normalizer["escape_spaces"]:
        return "it treats spaces in another way than Llama"
    return None


def tokenizer_json(model: Model) -> tuple[bytes | None, list[str]]:
    """The tokenizer.json that encodes as `model` does with Meta's settings (bos first), and what is inexact."""
    if reason := obstacle(model):
        return None, [f"no tokenizer.json was made from tokenizer.model: {reason}"]
    joined = {p.text: i for i, p in enumerate(model.pieces) if p.type in (NORMAL, USER)}
    # the best score first; of equal ones the library joins the leftmost first, which tokenizer.json cannot say
    order = sorted(joined, key=lambda text: (-model.pieces[joined[text]].score, joined[text]))
    unk, bos = model.control("unk"), model.control("bos")
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    pairs = bpe.merges(joined, order)
    core = bpe.bpe(
        vocab,
        pairs,
        unk_token=unk[0] if unk else None,
        fuse_unk=True,
        byte_fallback=bool(model.trainer["byte_fallback"]),
    )
    user = [piece.text for piece in model.pieces if piece.type == USER]
    data = bpe.document(
        core,
        added=[
            bpe.added_token(i, p.text, special=p.type != USER, normalized=p.type == USER)
            for i, p in enumerate(model.pieces)
            if p.type in (UNKNOWN, CONTROL, USER)
        ],
        normalizer=_normalizer(model, user),
        pre_tokenizer=None,
        post_processor=bpe.template(*bos) if bos else None,
        decoder=_decoder(model),
    )
    return data, _inexact(model, joined, pairs)


def _normalizer(model: Model, user: list[str]) -> dict[str, Any]:
    """What is done to a text before its symbols are joined: squeeze spaces, put one before, write them as U+2581."""
    steps: list[dict[str, Any]] = []
    if charsmap := model.normalizer["charsmap"]:
        text = base64.b64encode(charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": text})
    if model.normalizer["squeeze_spaces"]:
        ends = rf"\A +|[ {SPACE}]+\z"  # the library drops spaces at the end after it has written them as U+2581
        steps.append({"type": "Replace", "pattern": {"Regex": ends}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not model.normalizer["space_before"]:
        return {"type": "Sequence", "normalizers": [*steps, escape]}
    if not user:
        steps += [{"type": "Prepend", "prepend": SPACE}, escape]
    else:
        # the library normalizes the user-defined symbols too, and they must come out as they are
        either = "|".join(re.escape(text) for text in user)
        first = {"type": "Replace", "pattern": {"Regex": rf"\A(?!(?:{either})\z)(?=[\s\S])"}, "content": SPACE}
        steps += [escape, first]
    return {"type": "Sequence", "normalizers": steps}


def _decoder(model: Model) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.normalizer["space_before"]:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _inexact(model: Model, joined: Mapping[str, int], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The cases in which the tokenizer.json may give other ids than the SentencePiece library."""
    notes, made = [], {left + right for left, right in pairs}
    if model.normalizer["charsmap"]:
        notes.append(
            "tokenizer.model normalizes characters; the tokenizers library does so by whole graphemes, so that "
            "letters with combining marks may get other ids"
        )
    user = {piece.text for piece in model.pieces if piece.type == USER}
    if user:
        notes.append(
            "tokenizer.model has user-defined symbols; a text that is one of them and nothing else gets no space "
            "before it"
        )
    lost = sum(len(text) > 1 and text not in user and any(c not in joined for c in text) for text in joined)
    if lost:
        notes.append(
            f"{lost} pieces of tokenizer.model hold characters that are no pieces; tokenizer.json never uses them"
        )
    # runs of one letter, such as spaces, share a score in the known models, and come out alike for every length
    ranked = [model.pieces[joined[text]].score for text in made if len(set(text)) > 1]
    if len(set(ranked)) != len(ranked):
        notes.append("some pieces of tokenizer.model have equal scores; tokenizer.json ranks those by id")
    return notes
