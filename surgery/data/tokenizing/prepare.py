"""What a user chooses for `tokenize`, made into settings that leave nothing open.

settings = settings_for(Choices(format="dolma", eos="0"), vocabulary)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.data.tokenizing.chat import ChatTemplate
from surgery.data.tokenizing.output_formats import FORMATS
from surgery.data.tokenizing.settings import Settings, Shuffle
from surgery.data.tokenizing.sources import Source
from surgery.data.tokenizing.vocabulary import Vocabulary, read_template
from surgery.errors import UsageError
from surgery.tokenizer.files import ROLES

DOLMA_SEED, DOLMA_SIZE = 3920, 1 << 30  # what `dolma tokens` takes if nothing is said


@dataclass(frozen=True)
class Choices:
    """None: as the format, the tokenizer or the kind of documents has it.

    eos, bos, pad   an id, or the text of a token           append_eos   None: after texts, not after conversations
    messages, prompt, completion   fields of conversations, or of prompts and completions, in place of `text`
    seed            of the shuffling; `in_order`: none      template     a file that holds the chat template
    """

    format: str = "megatron"
    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    id: str = "id"
    txt: str = "file"
    eos: str | None = None
    bos: str | None = None
    pad: str | None = None
    append_eos: bool | None = None
    append_bos: bool = False
    dtype: str | None = None
    max_size: int | None = None
    seed: int | None = None
    in_order: bool = False
    ring: int = 8
    batch: int = 10_000
    template: str | None = None


def settings_for(choices: Choices, vocabulary: Vocabulary) -> Settings:
    """Raises UsageError if choices contradict each other or lack something, ConfigError for a useless template."""
    output, dolma = FORMATS[choices.format], choices.format == "dolma"
    documents, keys = _documents(choices)
    append = documents != "messages" if choices.append_eos is None else choices.append_eos
    eos = vocabulary.token("eos", choices.eos)
    template, special, stops = (None, {}, ()) if documents == "text" else _template(choices, vocabulary)
    settings = Settings(
        dtype=output.dtype(vocabulary.size, choices.dtype),
        format=choices.format,
        documents=documents,
        keys=keys,
        id_key=choices.id,
        txt=choices.txt,
        bos=_needed("bos", vocabulary.token("bos", choices.bos)) if choices.append_bos else None,
        eos=_needed("eos", eos) if append else None,
        wraps=choices.append_eos is True or documents == "messages",
        pad=vocabulary.token("pad", choices.pad) if choices.pad or not dolma else eos,
        max_size=choices.max_size or (DOLMA_SIZE if dolma else None),
        shuffle=_shuffle(choices, dolma),
        template=template,
        special=special,
        stops=stops,
    )
    if template is not None:
        ChatTemplate(template, special, stops)
    elif documents == "messages":
        raise UsageError(f"{vocabulary.name} has no chat template", hint="give one: --chat-template FILE")
    return settings


def check_sources(sources: Sequence[Source], settings: Settings) -> None:
    """Raise UsageError if there are files that cannot hold such documents."""
    bare = next((source for source in sources if source.format == "txt"), None)
    if bare and settings.masked:
        raise UsageError(f"{bare.path} holds text alone, no {settings.documents}")


def _documents(choices: Choices) -> tuple[str, tuple[str, ...]]:
    """The kind of documents, and the fields that hold them."""
    if (choices.prompt is None) != (choices.completion is None):
        raise UsageError("--prompt-key and --completion-key go together")
    kinds = {
        "text": (choices.text,),
        "messages": (choices.messages,),
        "prompt": (choices.prompt, choices.completion),
    }
    given = {kind: tuple(filter(None, keys)) for kind, keys in kinds.items() if any(keys)}
    if len(given) > 1:
        raise UsageError("--text-key, --messages-key and --prompt-key exclude each other")
    if choices.template and not given.keys() & {"messages", "prompt"}:
        raise UsageError("--chat-template goes with --messages-key or --prompt-key")
    return next(iter(given.items())) if given else ("text", ("text",))


def _needed(role: str, token: int | None) -> int:
    if token is None:
        hint = f"give it as --{role} ID" + (", or append none: --no-append-eos" if role == "eos" else "")
        raise UsageError(f"the tokenizer does not say which token is its {role}", hint=hint)
    return token


def _shuffle(choices: Choices, dolma: bool) -> Shuffle | None:
    if choices.in_order and choices.seed is not None:
        raise UsageError("--seed shuffles, so it does not go with --in-order")
    if choices.in_order or (choices.seed is None and not dolma):
        return None
    return Shuffle(DOLMA_SEED if choices.seed is None else choices.seed, choices.ring, choices.batch)


def _template(choices: Choices, vocabulary: Vocabulary) -> tuple[str | None, dict[str, str], tuple[str, ...]]:
    """The chat template, texts of special tokens by the names it has for them, and those that may end an answer."""
    added = vocabulary.tokenizer.get_added_tokens_decoder().values()
    texts = {f"{role}_token": text for role in ROLES if (text := vocabulary.text(role)) is not None}
    stops = tuple(token.content for token in added if token.special)
    return read_template(choices.template) if choices.template else vocabulary.chat_template, texts, stops
