"""The tokenizer that text is encoded with: a folder, a file, or a repository in the hub's cache.

    vocabulary = load_vocabulary("SmolLM2-135M")
    vocabulary.size, vocabulary.special["eos"]          # 49152 (the largest id + 1), 0
    vocabulary.tokenizer.encode("Hello").ids            # a `tokenizers.Tokenizer` that neither cuts nor pads

A SentencePiece model or a tiktoken rank file becomes a `tokenizer.json` as in a conversion.  No code in a tokenizer is
executed; the chat template is only kept as text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from surgery.containers import hub
from surgery.data.tokenizing.tokenizer_json import NAME, open_document
from surgery.errors import ConfigError, FileError, UsageError, show, some
from surgery.storage.copies import here
from surgery.storage.mirror import place_of
from surgery.tensors.files import read_small
from surgery.tokenizer import find, for_hf
from surgery.tokenizer.files import Tokenizer as Files
from surgery.tokenizer.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LARGEST = 256 << 20  # bytes of a tokenizer.json; Gemma's has 33 MB
TEMPLATE_LIMIT = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, as it is handed to the processes that encode.

    name      as it was named          document  the bytes of its tokenizer.json
    special   "bos", "eos", "pad", "unk" -> ids, as far as they are known
    chat_template  or None             notes     what was guessed
    """

    name: str
    document: bytes = field(repr=False)
    special: Mapping[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.document).hexdigest()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError if the tokenizers library does not take it."""
        return open_document(self.document, self.name)

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def token(self, role: str, given: str | None) -> int | None:
        """The id of a special token: `given` as an id or a text, else what the tokenizer says of its role.

        Raises UsageError if `given` is no token.
        """
        if given is None:
            return self.special.get(role)
        number = int(given) if given.isascii() and given.isdigit() and len(given) < 12 else None
        found = self.tokenizer.token_to_id(given) if number is None else number
        if found is None or found >= self.size:
            what = f"--{role} {show(given)} is no token of {self.name}"
            raise UsageError(what, hint=f"give an id below {self.size}, or the text of a token")
        return found

    def text(self, role: str) -> str | None:
        """The text of a special token."""
        return self.tokenizer.id_to_token(self.special[role]) if role in self.special else None


def load_vocabulary(place: str) -> Vocabulary:
    """A tokenizer by its folder, file or name on the hub.  Raises FileError or ConfigError."""
    path = hub.cached(place) if hub.is_name(place) else place_of(os.path.expanduser(place))
    if not path.exists():
        raise FileError("there is no such file or folder", file=place, hint="name a tokenizer's folder or file")
    found = find(path.parent if path.name == NAME else path)
    if found is None:
        hint = f"a {NAME}, a SentencePiece model or a tiktoken rank file is needed"
        raise FileError("holds no tokenizer", file=place, hint=hint)
    document, notes = _document(found, place)
    vocabulary = Vocabulary(place, document, found.special, _chat_template(found), notes)
    assert vocabulary.tokenizer is not None  # or it has raised
    return vocabulary


def _document(found: Files, place: str) -> tuple[bytes, tuple[str, ...]]:
    """The tokenizer.json that is there, or one made of Meta's file."""
    if NAME in found.files:
        return read_small(found.files[NAME], LARGEST, NAME), ()
    if found.native is None:
        hint = "save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise FileError(f"has no {NAME}, only {some(sorted(found.files))}", file=place, hint=hint)
    carried = for_hf(found, vocab_size=found.vocab_size or 0, max_length=1)
    made = next((file.head for file in carried.files if file.name == NAME), None)
    if made is None:
        raise ConfigError(f"no {NAME} can be made of it: {'; '.join(carried.notes)}", file=place)
    return made, carried.notes


def _chat_template(found: Files) -> str | None:
    """The default chat template, from whichever file holds it."""
    if path := found.files.get("chat_template.jinja"):
        return read_template(path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        held: Any = read_json(found.files.get(name)).get("chat_template")
        if isinstance(held, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in held if isinstance(entry, dict)}
            held = named.get("default")
        if isinstance(held, str):
            return held
    return None


def read_template(path: str | os.PathLike[str]) -> str:
    """A chat template from a file of its own.  Raises FileError."""
    data = read_small(here(path), TEMPLATE_LIMIT, "chat template")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FileError("is not UTF-8", file=path, byte=error.start) from None
