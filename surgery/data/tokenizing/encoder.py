"""Blocks of text become encoded documents: what each worker process does.

    encoder = Encoder(document, settings)               # the bytes of a tokenizer.json
    result = encoder.encode(block)
    result.documents.ids, result.bad, result.blank      # array of uint16, lines without a document, documents dropped

Special tokens are put around documents here, never by the tokenizer, whose own rules for them are left aside.  A text
that spells a special token, such as <|endoftext|>, has that token inside, as with dolma, datatrove and Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from surgery.data.files.mapped import Array
from surgery.data.tokenizing import bad_lines
from surgery.data.tokenizing.bad_lines import Bad
from surgery.data.tokenizing.chat import ANSWERING, ChatTemplate, Refused, Span
from surgery.data.tokenizing.encoded import Encoded
from surgery.data.tokenizing.parsing import Document, parse
from surgery.data.tokenizing.settings import Settings
from surgery.data.tokenizing.text import Block
from surgery.data.tokenizing.tokenizer_json import NAME, open_document
from surgery.errors import show

TOGETHER = 1 << 18  # characters encoded at once: their encodings take some hundred times as much memory


@dataclass(frozen=True, eq=False)
class Result:
    """What became of a block; a line is a document, blank, or bad.  `read`: as in the block."""

    documents: Encoded
    bad: tuple[Bad, ...]
    blank: int
    lines: int
    read: int


class Rendered(NamedTuple):
    """A text to encode, and which of its characters are to be learnt.

    `ends`: whether an eos after it is to be learnt, too; `bare`: a text of its own, not what a chat template made.
    """

    document: Document
    text: str
    spans: list[Span]
    ends: bool = True
    bare: bool = False


class Encoder:
    """A tokenizer with settings."""

    def __init__(self, document: bytes, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = open_document(document, NAME)
        self.template = None
        if settings.masked:
            self.tokenizer.post_processor = None  # it may cut white space off the offsets
            if settings.template is not None:
                self.template = ChatTemplate(settings.template, settings.special, settings.stops)

    def encode(self, block: Block) -> Result:
        parsed = parse(block, self.settings)
        rendered = list(self._rendered(parsed.documents, parsed.bad))
        kept, ids, masks, blank = [], [], [], parsed.blank
        for group in _groups(rendered):
            for one, encoding in self._encoded(group, parsed.bad):
                tokens = encoding.ids
                if not tokens:
                    blank += 1
                    continue
                kept.append(one.document)
                masks.append(self._framed(tokens, one, encoding))
                ids.append(tokens)
        documents = self._gathered(block, kept, ids, masks)
        parsed.bad.sort(key=lambda bad: bad.line)
        return Result(documents, tuple(parsed.bad), blank, parsed.lines, block.read)

    def _rendered(self, documents: Sequence[Document], bad: list[Bad]) -> Iterator[Rendered]:
        for document in documents:
            try:
                yield self._render(document)
            except Refused as refused:
                bad.append(Bad(document.line, bad_lines.TEMPLATE, str(refused)))

    def _render(self, document: Document) -> Rendered:
        value = document.value
        if self.settings.documents == "text":
            return Rendered(document, value, [], bare=True)
        if self.settings.documents == "messages":
            text, spans = self._chat().conversation(value, document.more)
            return Rendered(document, text, spans, value[-1]["role"] == ANSWERING)
        asked, answered = value
        if isinstance(asked, str):
            return Rendered(document, asked + answered, [(len(asked), len(asked) + len(answered))], bare=True)
        return Rendered(document, *self._chat().completion(asked, answered, document.more))

    def _chat(self) -> ChatTemplate:
        if self.template is None:
            raise Refused("the tokenizer has none")
        return self.template

    def _encoded(self, group: Sequence[Rendered], bad: list[Bad]) -> Iterator[tuple[Rendered, Any]]:
        """Each text with its encoding; what the tokenizer refuses is told apart one by one."""
        encode = self.tokenizer.encode_batch if self.settings.masked else self.tokenizer.encode_batch_fast
        try:
            encodings = encode([one.text for one in group], add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exceptions, and panics, which are none
            if len(group) == 1:
                bad.append(Bad(group[0].document.line, bad_lines.TOKENIZER, show(str(error), 200)))
            else:
                for one in group:
                    yield from self._encoded([one], bad)
            return
        yield from zip(group, encodings, strict=True)

    def _framed(self, tokens: list[int], one: Rendered, encoding: Any) -> Array | None:
        """Put bos and eos around the tokens; their label mask, if there is one."""
        learnt = learnt_tokens(encoding.offsets, one.spans) if self.settings.masked else None
        wraps, once = one.bare or self.settings.wraps, self.settings.output.once
        bos, eos = (self.settings.bos, self.settings.eos) if wraps else (None, None)
        before = [] if bos is None or (once and tokens[0] == bos) else [bos]
        after = [] if eos is None or (once and tokens[-1] == eos) else [eos]
        tokens[:0] = before
        tokens += after
        if learnt is None:
            return None
        return np.concatenate([np.zeros(len(before), np.uint8), learnt, np.full(len(after), one.ends, np.uint8)])

    def _gathered(
        self, block: Block, kept: Sequence[Document], ids: Sequence[list[int]], masks: Sequence[Array | None]
    ) -> Encoded:
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.dtype(self.settings.dtype).newbyteorder("<"), lengths.sum())
        return Encoded(
            flat,
            lengths,
            np.full(len(ids), block.file, np.int32),
            np.fromiter((document.line for document in kept), np.int64, len(ids)),
            tuple(document.name for document in kept) if self.settings.output.names else None,
            np.concatenate([np.zeros(0, np.uint8), *masks]) if self.settings.masked else None,
        )


def _groups(rendered: Sequence[Rendered]) -> Iterator[list[Rendered]]:
    """Texts of some characters together, or a long one alone."""
    group, size = list[Rendered](), 0
    for one in rendered:
        if group and size + len(one.text) > TOGETHER:
            yield group
            group, size = [], 0
        group.append(one)
        size += len(one.text)
    if group:
        yield group


def learnt_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> Array:
    """uint8 [tokens], 1 for each token that shares a character with a span; one without any belongs where it stands."""
    places = np.asarray(offsets, np.int64).reshape(-1, 2)
    starts, ends = places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)
    learnt = np.zeros(len(places), bool)
    for first, stop in spans:
        learnt |= (starts < stop) & (ends > first)
    return learnt.astype(np.uint8)
