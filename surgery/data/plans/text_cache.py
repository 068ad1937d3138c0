"""Sources of text in a mixture: tokenized once, into a cache whose folders are named by content and tokenizer.

    entries, notes = tokenized(entries, source, root, vocabulary, cache)     # text -> .bin/.idx in the cache

Entries that are token files already pass through.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from surgery.containers.text import read_json
from surgery.data.plans.mixture import Mixture, Source
from surgery.data.plans.plan_file import Entry, relative
from surgery.data.plans.plan_sources import TEXT
from surgery.data.tokenizing.job import BAD_LINES, VERSION
from surgery.data.tokenizing.prepare import Choices, settings_for
from surgery.data.tokenizing.settings import Settings
from surgery.data.tokenizing.sources import Source as TextSource
from surgery.data.tokenizing.sources import find_sources, is_url
from surgery.data.tokenizing.tokenize import NOTE, tokenize
from surgery.data.tokenizing.vocabulary import Vocabulary, load_vocabulary
from surgery.errors import ConfigError, some
from surgery.storage.mirror import cache as copies

BLOCK = 1 << 20
Begin = Callable[[str, int | None], Callable[[int], None]]  # what is done, bytes -> to be told of bytes


def load_tokenizer(mixture: Mixture, root: Path) -> Vocabulary | None:
    """The tokenizer of a mixture: a path relative to it, or a name on the hub."""
    if mixture.tokenizer is None:
        return None
    beside = root / os.path.expanduser(mixture.tokenizer)
    return load_vocabulary(str(beside) if beside.exists() else mixture.tokenizer)


def tokenized(
    entries: Sequence[Entry],
    source: Source,
    root: Path,
    vocabulary: Vocabulary | None,
    cache: Path | None,
    begin: Begin = lambda what, total: lambda n: None,
    template: Path | None = None,
) -> tuple[list[Entry], list[str]]:
    """The entries with text replaced by the token files that it became, and what of it was left out.

    Raises ConfigError if there is text and no tokenizer, FileError if more than a thousandth of its lines are bad.
    """
    places = [e.path if is_url(e.path) else str(root / e.path) for e in entries if e.format == TEXT]
    if not places:
        if source.messages_key or source.prompt_key:
            key = "messages_key" if source.messages_key else "prompt_key"
            raise ConfigError(f"{source.name}: {key} is for text, and its files are tokens already")
        return list(entries), []
    if source.label_mask is not None:
        raise ConfigError(f"{source.name}: label_mask is for token files; text has its own", hint="use messages_key")
    if vocabulary is None:
        what = f"{source.name}: {some(os.path.basename(p) for p in places)} is text, and the mixture names no tokenizer"
        raise ConfigError(what, hint="add tokenizer: PATH, or tokenize it first: surgery data tokenize")
    sources, notes = find_sources(places)
    settings = settings_for(_choices(source, vocabulary, template), vocabulary)
    folder = (cache or copies() / "tokens") / f"{source.name}-{_digest(sources, vocabulary, settings)[:32]}"
    if not (folder / NOTE).is_file():
        advance = begin(f"tokenize {source.name}", sum(s.size for s in sources))
        tokenize(sources, folder, vocabulary, settings, progress=lambda read, documents, tokens: advance(read))
    files = sorted(str(p) for p in folder.glob("*.bin"))
    made = [Entry(path=relative(path, root), format="megatron") for path in files]
    said = [f"{source.name}: {note}" for note in [*notes, *_left_out(folder)]]
    return [e for e in entries if e.format != TEXT] + made, said


def _left_out(folder: Path) -> list[str]:
    """Lines without a document, also of an earlier run."""
    counts = read_json(folder / NOTE, NOTE)
    bad, blank = counts.get("bad"), counts.get("blank")
    return [
        *([f"bad lines left out: {bad:,}, listed in {folder / BAD_LINES}"] if bad else []),
        *([f"blank documents left out: {blank:,}"] if blank else []),
    ]


def _choices(source: Source, vocabulary: Vocabulary, template: Path | None) -> Choices:
    messages = source.messages_key
    if messages is None and source.eos is None and "eos" not in vocabulary.special:
        what = f"{source.name}: the tokenizer does not say which id ends a document"
        raise ConfigError(what, hint="add eos: ID to the source")
    eos = None if source.eos is None else str(source.eos)
    chat = messages or source.prompt_key
    return Choices(text=None if chat else source.text_key, messages=messages, prompt=source.prompt_key,
                   completion=source.completion_key, eos=eos, dtype=source.dtype,
                   template=str(template) if template and chat else None)  # fmt: skip


def _digest(sources: Sequence[TextSource], vocabulary: Vocabulary, settings: Settings) -> str:
    """Of the content of the files, the tokenizer and the settings; not of names."""
    digest = hashlib.sha256(json.dumps([VERSION, vocabulary.sha256, asdict(settings)], sort_keys=True).encode())
    for source in sources:
        content = hashlib.sha256()
        with source.open() as file:
            while block := file.read(BLOCK):
                content.update(block)
        digest.update(content.digest())
    return digest.hexdigest()
