"""The documents in a block of text, and the lines that hold none.

    parsed = parse(block, settings)
    parsed.documents[0].value, parsed.documents[0].line         # "Four score ...", 7
    parsed.bad, parsed.blank, parsed.lines

JSON is read by the standard library: next to encoding its time is nothing (0.8 % measured).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.data.tokenizing import bad_lines
from surgery.data.tokenizing.bad_lines import Bad
from surgery.data.tokenizing.settings import Settings
from surgery.data.tokenizing.text import Block
from surgery.errors import show

BOM = b"\xef\xbb\xbf"
LONGEST_NAME = 1000
ROLES = {"human": "user", "gpt": "assistant"}  # what ShareGPT calls them


@dataclass(frozen=True)
class Document:
    """`value`: a text, messages, or (prompt, completion); `more`: what else its template is given."""

    line: int
    name: str
    value: Any
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Parsed:
    """Of a block: its documents; its bad lines; how many documents are blank; how many lines there are."""

    documents: list[Document] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    blank: int = 0
    lines: int = 0


class _Wrong(Exception):
    """Kind of a bad line, and details."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


def parse(block: Block, settings: Settings) -> Parsed:
    """Take a block apart.  A line is a document, blank, or bad: nothing gets lost."""
    parsed = Parsed()
    for line, read in enumerate(_READERS[block.kind](block, settings), block.line):
        parsed.lines += 1
        try:
            document = _document(line, read(), settings)
        except _Wrong as wrong:
            parsed.bad.append(Bad(line, wrong.kind, wrong.detail))
            continue
        if document.value == "":
            parsed.blank += 1
        else:
            parsed.documents.append(document)
    return parsed


class _Line:
    """A line of JSON, read when it is called."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __call__(self) -> Mapping[str, Any]:
        if not self.data.strip():
            raise _Wrong(bad_lines.BLANK)
        text = _decoded(self.data)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise _Wrong(bad_lines.NOT_JSON, f"{error.msg} at character {error.pos}") from None
        except (ValueError, RecursionError):
            raise _Wrong(bad_lines.NOT_JSON, "nested too deeply, or an endless number") from None
        if not isinstance(value, dict):
            raise _Wrong(bad_lines.NOT_OBJECT, show(value))
        return value


class _Text:
    """A text as it is, as the only field of a document."""

    def __init__(self, data: bytes, key: str) -> None:
        self.data, self.key = data, key

    def __call__(self) -> Mapping[str, Any]:
        return {self.key: _decoded(self.data)}


class _Row:
    """A row of an Arrow table."""

    def __init__(self, columns: Mapping[str, Any], row: int) -> None:
        self.columns, self.row = columns, row

    def __call__(self) -> Mapping[str, Any]:
        try:
            held = {name: column[self.row].as_py() for name, column in self.columns.items()}
        except UnicodeDecodeError:
            raise _Wrong(bad_lines.NOT_UTF8) from None
        return {name: _without_none(value) for name, value in held.items() if value is not None}


def _json_lines(block: Block, settings: Settings) -> Iterator[_Line]:
    return map(_Line, _split(block))


def _text_lines(block: Block, settings: Settings) -> Iterator[_Text]:
    return (_Text(line.removesuffix(b"\r"), settings.keys[0]) for line in _split(block))


def _whole_text(block: Block, settings: Settings) -> Iterator[_Text]:
    yield _Text(block.payload.removeprefix(BOM), settings.keys[0])


def _rows(block: Block, settings: Settings) -> Iterator[_Row]:
    import pyarrow as pa

    for batch in pa.ipc.open_stream(block.payload):
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        yield from (_Row(columns, row) for row in range(batch.num_rows))


Reader = Callable[[Block, Settings], Iterator[Callable[[], Mapping[str, Any]]]]
_READERS: Mapping[str, Reader] = {"jsonl": _json_lines, "lines": _text_lines, "text": _whole_text, "arrow": _rows}


def _split(block: Block) -> list[bytes]:
    data = block.payload.removeprefix(BOM) if block.line == 1 else block.payload
    return data.removesuffix(b"\n").split(b"\n")


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _Wrong(bad_lines.NOT_UTF8, f"byte {error.start} of the line") from None


def _without_none(value: Any) -> Any:
    """Arrow gives every message all fields that any has; those that it lacks are None."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None or k == "content"}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _document(line: int, held: Mapping[str, Any], settings: Settings) -> Document:
    name = _name(held.get(settings.id_key)) if settings.output.names else ""
    values = [_field(held, key) for key in settings.keys]
    if settings.documents == "text":
        text = _text(values[0])
        return Document(line, name, text.strip() if settings.output.strips else text)
    if settings.documents == "messages":
        return Document(line, name, _messages(values[0]), _more(held))
    if all(isinstance(value, str) for value in values):
        return Document(line, name, tuple(map(_text, values)))
    return Document(line, name, tuple(map(_messages, values)), _more(held))


def _field(held: Mapping[str, Any], key: str) -> Any:
    if held.get(key) is None:
        raise _Wrong(bad_lines.NO_TEXT, f"{show(key)} is {'null' if key in held else 'missing'}")
    return held[key]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong(bad_lines.WRONG_TYPE, show(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Wrong(bad_lines.SURROGATE, f"character {error.start}") from None
    return value


def _name(value: Any) -> str:
    """A document's name: a text or a number; empty if there is none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or len(str(value)) > LONGEST_NAME:
        raise _Wrong(bad_lines.WRONG_NAME, show(value))
    return _text(str(value))


def _messages(value: Any) -> list[dict[str, Any]]:
    """A conversation: at least one message, each with a role."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise _Wrong(bad_lines.CHAT, f"{show(value)}, no list of messages")
    messages = [_message(message) for message in value]
    if any(not isinstance(message.get("role"), str) for message in messages):
        raise _Wrong(bad_lines.CHAT, "a message without a role")
    return messages


def _message(said: dict[str, Any]) -> dict[str, Any]:
    """A message with a role and its content, also where it is spelt as ShareGPT and OpenHermes do."""
    if "role" in said or not {"from", "value"} <= said.keys():
        return said
    rest = {k: v for k, v in said.items() if k not in ("from", "value")}
    return {"role": ROLES.get(said["from"], said["from"]), "content": said["value"], **rest}


def _more(held: Mapping[str, Any]) -> dict[str, Any]:
    """What a template is told besides the messages: tools, and settings of its own."""
    tools, settings = held.get("tools"), held.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise _Wrong(bad_lines.CHAT, "`tools` is no JSON") from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise _Wrong(bad_lines.CHAT, "`chat_template_kwargs` is no mapping")
    return {**settings, **({"tools": tools} if tools else {})}
