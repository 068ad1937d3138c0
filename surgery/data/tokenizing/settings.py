"""How documents are read and encoded: equal settings give equal tokens.

Settings(dtype="uint16", eos=0)             # texts under "text", EOS after each, Megatron's .bin and .idx
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.data.tokenizing.output_formats import FORMATS, OutputFormat


@dataclass(frozen=True)
class Shuffle:
    """dolma's order: `ring` files at once, a document from each in turn; every `batch` documents are shuffled."""

    seed: int
    ring: int = 8
    batch: int = 10_000


@dataclass(frozen=True)
class Settings:
    """All that decides the tokens, but for the tokenizer and the text.

    dtype       of the ids as they are written                  format    a name of `output_formats.FORMATS`
    documents   "text"; "messages", a conversation; or "prompt", a prompt and its completion
    keys        the fields that hold them: one, or two for "prompt"
    id_key      the field that holds a document's name, for formats that keep it
    txt         what is a document of a .txt file: "file" or "line"
    bos, eos    ids put before and after each document; pad is only noted down
    wraps       bos and eos are put around conversations as well, which have what their template gives them
    max_size    a file of output holds fewer tokens than this; None: one file
    shuffle     None: the order of the input
    template    the chat template; `special` and `stops` as `ChatTemplate` takes them
    """

    dtype: str
    format: str = "megatron"
    documents: str = "text"
    keys: tuple[str, ...] = ("text",)
    id_key: str = "id"
    txt: str = "file"
    bos: int | None = None
    eos: int | None = None
    wraps: bool = False
    pad: int | None = None
    max_size: int | None = None
    shuffle: Shuffle | None = None
    template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    stops: tuple[str, ...] = ()

    @property
    def output(self) -> OutputFormat:
        return FORMATS[self.format]

    @property
    def masked(self) -> bool:
        """Is there a label mask?"""
        return self.documents != "text"

    @property
    def columns(self) -> tuple[str, ...]:
        """All fields that are read; the first one must be there."""
        more = ("tools", "chat_template_kwargs") if self.masked else ()
        return (*self.keys, *([self.id_key] if self.output.names else []), *more)
