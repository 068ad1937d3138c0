"""A model of any format with its tokenizer, ready to be evaluated.

    opened = open_for_evaluation("llama-meta", device="cuda:0")
    opened.model, opened.encoder, opened.lengths, opened.context

The weights go from the files into a transformers model in memory; nothing is converted on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.data.tokenizing.vocabulary import Vocabulary, load_vocabulary
from surgery.errors import UsageError, shown
from surgery.formats.base import Checkpoint, Options
from surgery.formats.operations import to_vocab
from surgery.formats.registry import open_checkpoint
from surgery.midtraining.evaluation.texts import Encoder, encoder_of
from surgery.running.device import device as known_device
from surgery.running.layerwise import with_family
from surgery.tokenizer.bytes import byte_lengths

if TYPE_CHECKING:
    import torch

CONTEXT = 2048  # tokens, of models that do not say


@dataclass(frozen=True, eq=False)
class Opened:
    """A model in eval mode; `digest` of its weights, `context` in tokens.  Without a tokenizer only `--data` works."""

    source: Checkpoint
    model: Any
    digest: str
    context: int
    vocabulary: Vocabulary | None

    @cached_property
    def encoder(self) -> Encoder:
        """Raises UsageError if there is no tokenizer, or it makes ids that the model has no row for."""
        vocabulary = self.needed()
        return encoder_of(vocabulary.tokenizer, vocabulary.special.get("bos"), vocabulary.special.get("eos"))

    @cached_property
    def lengths(self) -> list[int] | None:
        """Bytes of each token; None without a tokenizer, or if its vocabulary does not tell."""
        return byte_lengths(json.loads(self.vocabulary.document)) if self.vocabulary else None

    def needed(self) -> Vocabulary:
        """The tokenizer.  Raises UsageError."""
        rows = self.source.spec.vocab
        if self.vocabulary is None:
            raise UsageError(f"{self.source.path} has no tokenizer", hint="name one with --tokenizer")
        if self.vocabulary.size > rows:
            what = f"the tokenizer {self.vocabulary.name} has {self.vocabulary.size:,} tokens, the model {rows:,} rows"
            raise UsageError(what, hint="name the model's own tokenizer with --tokenizer")
        return self.vocabulary

    def described(self) -> dict[str, Any]:
        """What was evaluated, and how."""
        weight = self.model.get_input_embeddings().weight
        return {
            "path": shown(self.source.path),
            "format": self.source.format,
            "family": self.source.spec.family,
            "digest": self.digest,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": str(weight.device),
            "context": self.context,
            "tokenizer": self.vocabulary.name if self.vocabulary else None,
        }


def open_for_evaluation(
    path: str | Path,
    *,
    format: str | None = None,
    options: Options | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    context: int | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Opened:
    """Open a checkpoint and fill a model.

    device      None: a GPU if there is one     dtype       "auto": fp32 on a CPU, else that of the source
    context     None: what the model was made for, as far as its files say, else 2,048
    vocab_size  rows of the vocabulary that are no padding; None: all that there are
    progress    is told bytes of the source
    Raises FileError, LayoutError, ConfigError or UsageError.
    """
    import torch

    from surgery.midtraining.model import load

    place = known_device(device or ("cuda" if torch.cuda.is_available() else "cpu")).name
    source = with_family(open_checkpoint(path, format=format, options=options or {}))
    if vocab_size is not None:
        if vocab_size > source.spec.vocab:
            raise UsageError(f"--vocab-size {vocab_size}: the model has {source.spec.vocab} rows")
        source = to_vocab(source, vocab_size)
    found = tokenizer or (str(path) if source.tokenizer else None)
    vocabulary = load_vocabulary(found) if found else None
    model, digest = load(source, torch_dtype(dtype, source.dtype, place), place, progress=progress)
    most = source.spec.context or CONTEXT
    if context is not None and source.spec.learned_positions and context > source.spec.learned_positions:
        raise UsageError(f"--context {context}: the model has {source.spec.learned_positions} positions")
    return Opened(source, model.eval(), digest, context or most, vocabulary)


def torch_dtype(name: str, stored: str, place: str) -> torch.dtype:
    """The dtype that `--dtype` means."""
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name != "auto":
        return named[name]
    held = getattr(torch, stored, torch.float32)
    return torch.float32 if place == "cpu" or held not in named.values() else held
