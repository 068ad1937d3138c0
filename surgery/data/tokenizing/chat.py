"""Conversations as text, by a tokenizer's chat template, and which of its characters a model is to learn.

    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    text, spans = template.conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    spans                                       # [(9, 14)]: characters 9 to 13 are an answer

A template that marks the answers with `{% generation %}`, as trl wants, decides itself.  Else an answer is what its
message adds to the text of those before it with the generation prompt; a template of which that is not so is refused.

Templates are Jinja in a sandbox, with what transformers offers them (`utils/chat_template_utils.py`), but without the
date of today: the same documents give the same text every day.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from surgery.data.extra import needs
from surgery.errors import ConfigError, show

KEY = secrets.token_hex(16)  # so that no document can hold the marks, which are taken out again
BEGIN, END = f"\ufdd0{KEY}", f"\ufdd1{KEY}"  # what `{% generation %}` puts around its content
ANSWERING = "assistant"
NONE: Mapping[str, Any] = {}
Message = Mapping[str, Any]
Span = tuple[int, int]


class Refused(Exception):
    """The template cannot render these messages, or what it makes of them is ambiguous: why."""


class ChatTemplate:
    """A compiled template.  `special`: texts of special tokens as it names them; `stops`: those that end an answer.

    Raises ConfigError if it is no template, or if neither marks nor the generation prompt tell answers apart.
    """

    def __init__(self, source: str, special: Mapping[str, str], stops: Sequence[str] = ()) -> None:
        needs("jinja2", "rendering conversations")
        from jinja2 import TemplateError

        self.special, self.stops = dict(special), tuple(stops)
        environment = _environment()
        try:
            self.template = environment.from_string(source)
            tags = [token[2] for token in environment.lexer.tokeniter(source, "chat template") if token[1] == "name"]
        except TemplateError as error:
            raise ConfigError(f"the chat template is no template: {show(str(error), 200)}") from None
        self.marked = "generation" in tags
        if not self.marked:
            self._probe()

    def render(self, messages: Sequence[Message], more: Mapping[str, Any], prompt: bool = False) -> str:
        """Their text; `more`: other variables of the template; `prompt`: with the beginning of an answer.

        Raises Refused.
        """
        try:
            text: str = self.template.render(
                {**self.special, **more, "messages": messages, "add_generation_prompt": prompt}
            )
            text.encode()  # half a surrogate pair has no tokens
            return text
        except Exception as error:  # a template can raise anything
            raise Refused(show(str(error) or type(error).__name__, 200)) from None

    def conversation(self, messages: Sequence[Message], more: Mapping[str, Any] = NONE) -> tuple[str, list[Span]]:
        """The text and the spans of the assistant's answers in it, in characters.  Raises Refused."""
        if self.marked:
            return _unmarked(self.render(messages, more))
        text, spans = self.render(messages, more), []
        for i, message in enumerate(messages):
            if message.get("role") == ANSWERING:
                before = self.render(messages[:i], more, prompt=True)
                after = self.render(messages[: i + 1], more)
                spans.append(self._added(before, after, text))
        return text, spans

    def completion(
        self, asked: Sequence[Message], answered: Sequence[Message], more: Mapping[str, Any] = NONE
    ) -> tuple[str, list[Span]]:
        """The text of a prompt and its completion, and the span of the completion.  Raises Refused."""
        before, _ = _unmarked(self.render(asked, more, prompt=True))
        text, _ = _unmarked(self.render([*asked, *answered], more))
        return text, [self._added(before, text, text)]

    def _added(self, before: str, after: str, text: str) -> Span:
        """What an answer adds, up to the token that ends it.  Each text must begin with the one before."""
        if not after.startswith(before) or not text.startswith(after):
            raise Refused("it writes earlier messages anew when others follow, so answers cannot be told apart")
        added = after[len(before) :]
        bare = added.rstrip()
        return len(before), len(before) + len(bare if bare.endswith(self.stops) and self.stops else added)

    def _probe(self) -> None:
        """Raise ConfigError unless answers can be told apart in the simplest of conversations."""
        asked: list[Message] = [{"role": "user", "content": "a"}]
        hint = "give one that marks the answers with {% generation %}: --chat-template FILE"
        try:
            without, prompt = self.render(asked, NONE), self.render(asked, NONE, prompt=True)
            self.conversation([*asked, {"role": ANSWERING, "content": "b"}, *asked])
        except Refused as error:
            raise ConfigError(f"the chat template cannot show what is to be learnt: {error}", hint=hint) from None
        if without == prompt:
            what = "the chat template has neither {% generation %} marks nor a generation prompt"
            raise ConfigError(f"{what}: where an answer begins cannot be told", hint=hint)


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """The text without its marks, and what lay between them."""
    parts, spans, at = [], [], 0
    for i, part in enumerate(text.split(BEGIN)):
        inner, end, outer = part.partition(END)
        if (i > 0) != bool(end) or END in outer:
            raise Refused("its generation marks lie inside each other")
        if i:
            spans.append((at, at + len(inner)))
        parts += [inner, outer]
        at += len(inner) + len(outer)
    return "".join(parts), spans


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`, which puts marks around its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Callable[[], str]) -> str:
            return f"{BEGIN}{caller()}{END}"

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
