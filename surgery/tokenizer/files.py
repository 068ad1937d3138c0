"""Tokenizers on disk: which files belong to one, and what they tell about sizes and special ids.

    found = find(Path("checkpoint"), Path("configs/20B_tokenizer.json"))
    print(found.summary, found.ids())

Files are known by name and read only as far as needed; whatever is unusual in Hugging Face's files is left alone, as
they are carried, not interpreted.  What is no JSON, no protobuf and no rank file where it must be one, is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.containers import text
from surgery.errors import FileError, show, some
from surgery.storage.mirror import place_of
from surgery.tensors.files import File, check_inside
from surgery.tokenizer import sentencepiece, tiktoken

NATIVE = "tokenizer.model"
HIDDEN = "original/tokenizer.model"  # where releases for Hugging Face keep Meta's rank file
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
ENTRIES = 3_000_000  # of one JSON file; that of 260,000 tokens and their merges has 2 million
POINTER = b"version https://git-lfs"
ROLES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer in its files.

    `kind` is "hf", "sentencepiece" or "tiktoken".  `files` maps the names that the files have beside an HF model to
    where they are; `native` is Meta's tokenizer.model among them, of the kind `native_kind`.  What the files do not
    tell is None or absent.  `special` maps "bos", "eos", "pad" and "unk" to ids, `added` ids to the texts of added
    tokens.
    """

    kind: str
    files: Mapping[str, Path]
    native: Path | None = None
    native_kind: str | None = None
    vocab_size: int | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[int, str] = field(default_factory=dict)
    custom_code: bool = False

    @property
    def summary(self) -> str:
        """One line for `surgery inspect`."""
        ids = "".join(f", {role} {index}" for role, index in self.special.items())
        size = "unknown size" if self.vocab_size is None else f"{self.vocab_size} tokens"
        return f"{self.kind}, {size}{ids} ({some(self.files, 8)})"

    def check_inside(self) -> None:
        """Raise FileError if a file is a link out of its folder: such files are not carried into an output."""
        for path in self.files.values():
            check_inside(path, path.parent)

    def ids(self) -> dict[str, int]:
        """`bos_token_id` and so on for a config.json: those that are known."""
        return {f"{role}_token_id": index for role, index in self.special.items() if role != "unk"}


def find(folder: Path, *also: Path) -> Tokenizer | None:
    """The tokenizer beside the weights, or in one of the other folders or files that the caller knows of.

    Meta's Llama 1 and 2 keep one tokenizer.model in the folder above the models; it is looked for there if `folder`
    holds params.json.  Raises FileError for a broken tokenizer.
    """
    folder = place_of(folder)
    for place in (folder, *map(place_of, also)):
        files = {_name_of(place): Path(os.path.realpath(place))} if os.path.isfile(place) else listed(place)
        if found := describe(files):
            return found
    above = folder.resolve().parent / NATIVE
    return describe({NATIVE: above}) if os.path.exists(folder / "params.json") and os.path.isfile(above) else None


def listed(folder: Path) -> dict[str, Path]:
    """The tokenizer's files in a folder, by the names that they have beside an HF model."""
    files = {name: folder / name for name in (*VOCABULARIES, *COMPANIONS, NATIVE) if os.path.isfile(folder / name)}
    if NATIVE not in files and os.path.isfile(folder / HIDDEN):
        files[HIDDEN] = folder / HIDDEN
    foreign = sorted(folder.glob("*_tokenizer.json")) if os.path.isdir(folder) else []
    if "tokenizer.json" not in files and len(foreign) == 1:  # NeoX: 20B_tokenizer.json
        files["tokenizer.json"] = foreign[0]
    if NATIVE in files and os.path.exists(folder / "params.json") and native_kind(files[NATIVE]) == "tiktoken":
        files[HIDDEN] = files.pop(NATIVE)
    return files


def _name_of(path: Path) -> str:
    """The HF name of a tokenizer's only file: told by its content, as other formats' configs name it freely."""
    return "tokenizer.json" if _head(path).lstrip()[:1] == b"{" else NATIVE


def _head(path: Path) -> bytes:
    file = File(path)
    return file.read(0, min(file.size, 2048), "a tokenizer")


def native_kind(path: Path) -> str | None:
    """Is this a "tiktoken" rank file, a "sentencepiece" model, or neither?"""
    head = _head(path)
    if tiktoken.looks_like(head):
        return "tiktoken"
    return "sentencepiece" if head[:1] == b"\n" else None


def describe(files: dict[str, Path]) -> Tokenizer | None:
    """The tokenizer that these files make, or None if they hold no vocabulary."""
    native = files.get(NATIVE, files.get(HIDDEN))
    kind = native_kind(native) if native else None
    if any(name in files for name in (*VOCABULARIES, "tokenizer_config.json")):
        return _hf(Tokenizer("hf", files, native if kind else None, kind))
    if native is None:
        return None
    if kind is None:
        hint = _hint(_head(native))
        raise FileError("is neither a SentencePiece model nor a tiktoken rank file", file=native, hint=hint)
    if kind == "tiktoken":
        size = len(tiktoken.read(native))
        count = size + tiktoken.specials(size)
        rest = {HIDDEN: native, **{name: path for name, path in files.items() if path != native}}
        return Tokenizer(kind, rest, native, kind, count, {"bos": size, "eos": size + 1})
    model = sentencepiece.read(native)
    ids = {role: token[1] for role in ROLES if (token := model.control(role))}
    return Tokenizer(kind, files, native, kind, len(model.pieces), ids)


def _hf(found: Tokenizer) -> Tokenizer:
    """With what Hugging Face's files tell: the number of tokens and the ids of special ones."""
    settings = read_json(found.files.get("tokenizer_config.json"))
    named = {**read_json(found.files.get("special_tokens_map.json")), **settings}
    vocab, added = vocabulary(found)
    special = {role: vocab.get(_text(named.get(f"{role}_token"))) for role in ROLES}
    return replace(
        found,
        vocab_size=max(vocab.values()) + 1 if vocab else None,
        added=added,
        custom_code="auto_map" in settings,
        special={role: index for role, index in special.items() if index is not None},
    )


def vocabulary(found: Tokenizer) -> tuple[dict[str, int], dict[int, str]]:
    """Token -> id of an HF tokenizer, and of these the added tokens, by id.  Empty where the files do not tell."""
    document = read_json(found.files.get("tokenizer.json"))
    model, entries = document.get("model"), document.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else read_json(found.files.get("vocab.json"))
    if not vocab and found.native and found.native_kind == "sentencepiece":
        vocab = [[piece.text] for piece in sentencepiece.read(found.native).pieces]
    if isinstance(vocab, list):  # Unigram: [token, score]
        vocab = {entry[0]: i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry and _text(entry[0])}
    known = {token: i for token, i in vocab.items() if _is_id(i)} if isinstance(vocab, dict) else {}
    items = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    added = {e["id"]: e["content"] for e in items if _is_id(e.get("id")) and isinstance(e.get("content"), str)}
    return {**known, **{content: index for index, content in added.items()}}, added


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _text(token: Any) -> str:
    """A special token of tokenizer_config.json: its text, or a mapping with the text as its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def read_json(path: Path | None) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one if there is no file.  Raises FileError for anything else."""
    if path is None:
        return {}
    if _head(path).startswith(POINTER):
        raise FileError("holds a git-lfs pointer, not the file", file=path, hint=_hint(POINTER))
    value = text.read_json(path, "a tokenizer's file", ENTRIES)
    if not isinstance(value, dict):
        raise FileError(f"holds {show(value)} where a mapping is expected", file=path)
    return value


def _hint(data: bytes) -> str:
    if data.startswith(POINTER):
        return "this is a git-lfs pointer: run `git lfs pull`"
    return "the file is truncated or damaged; copy or download it again"
