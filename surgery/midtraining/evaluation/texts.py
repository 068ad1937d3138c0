"""From text to token ids that are scored, as lm-eval cuts them (lm_eval/api/model.py, utils.py).

encoder = encoder_of(tokenizer, bos=1, eos=2)                       # a tokenizers.Tokenizer
encoder.answer("Question: 2 + 2?\\nAnswer:", " 4")                   # Span(ids=[...], start=9)
encoder.windows("A long text ...", context=1024)                    # spans that score every token once
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import ConfigError
from surgery.midtraining.evaluation.likelihood import Span

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """How a model's tokenizer makes ids.

    whole   a text by itself, with the special tokens that the tokenizer puts around it
    bare    without them             prefix   the id that stands for "nothing before": bos, else eos
    opening the text of that id
    """

    whole: Callable[[str], list[int]]
    bare: Callable[[str], list[int]]
    prefix: int
    opening: str

    def answer(self, context: str, continuation: str) -> Span:
        """The context's ids, and those that both together have behind as many; blanks between go to the continuation.

        If there are no more of them, the last one is scored.
        """
        if not context:
            ids = self.bare(continuation)
            return Span(ids if ids[0] == self.prefix else [self.prefix, *ids], 1)
        blanks = len(context) - len(context.rstrip())
        encode = self.bare if self.opening and context.startswith(self.opening) else self.whole
        before, both = encode(context[: len(context) - blanks]), encode(context + continuation)
        behind = both[len(before) :] or both[-1:]
        before = before or [self.prefix]
        return Span([*before, *behind], len(before))

    def windows(self, text: str, context: int) -> list[Span]:
        """Windows of `context` ids that follow one another; the last reaches back over ids already scored.

        The text is encoded without special tokens: what a tokenizer puts before it is no text to be predicted.
        """
        ids = [self.prefix, *self.bare(text)]
        ends = range(1 + context, len(ids) + context, context)
        return [_window(ids, min(end, len(ids)), end - context, context) for end in ends]


def _window(ids: list[int], end: int, start: int, context: int) -> Span:
    first = max(0, end - context - 1)
    return Span(ids[first:end], start - first)


def encoder_of(tokenizer: Tokenizer, bos: int | None, eos: int | None) -> Encoder:
    """Raises ConfigError if the tokenizer has neither of these special tokens."""
    prefix = eos if bos is None else bos
    if prefix is None:
        raise ConfigError("the tokenizer has neither bos nor eos, so nothing can stand before a text")
    return Encoder(
        lambda text: tokenizer.encode(text).ids,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        prefix,
        tokenizer.id_to_token(prefix) or "",
    )
