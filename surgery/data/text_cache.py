"""Sources of text in a mixture: tokenized once, into a cache whose folders are named by content and tokenizer.

    entries = tokenized(entries, source, root, vocabulary, cache)     # jsonl, txt, parquet -> .bin/.idx in the cache

Entries that are token files already pass through.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from surgery.data.mixture import Mixture, Source
from surgery.data.plan_file import Entry
from surgery.data.vocabulary import Vocabulary, load_vocabulary
from surgery.errors import ConfigError, some


def load_tokenizer(mixture: Mixture, root: Path) -> Vocabulary | None:
    """The tokenizer of a mixture: a path relative to it, or a name on the hub."""
    if mixture.tokenizer is None:
        return None
    beside = root / os.path.expanduser(mixture.tokenizer)
    return load_vocabulary(str(beside) if beside.exists() else mixture.tokenizer)


def tokenized(
    entries: Sequence[Entry], source: Source, root: Path, vocabulary: Vocabulary | None, cache: Path | None
) -> list[Entry]:
    """The entries with text replaced by what it became.  Raises ConfigError if there is text and no tokenizer."""
    texts = [e for e in entries if e.format == "text"]
    if texts and vocabulary is None:
        what = f"{source.name}: {some(Path(e.path).name for e in texts)} is text, and the mixture names no tokenizer"
        raise ConfigError(what, hint="add tokenizer: PATH, or tokenize first: surgery data tokenize")
    return list(entries)
