"""The loss of a model on a text: mean nats per token, by transformers, in windows of its context.

loss_of(Path("model-hf"), Path("held-out.txt"), tokens=8192, device=None)       # 2.41
"""

from __future__ import annotations

from pathlib import Path

from surgery.errors import ConfigError, FileError, UsageError
from surgery.running.loading import explained, load, load_tokenizer, quiet

WINDOW = 1024  # tokens that are seen at once, if the model's context is not shorter
BYTES = 16  # of text that are read per token wanted


def loss_of(folder: Path, text: Path, tokens: int, device: str | None) -> float:
    """The mean loss of every token but each window's first, in fp32 on a CPU, else in the model's dtype.

    Raises FileError, ConfigError if the model or tokenizer cannot be loaded, UsageError for a text without tokens.
    """
    ids = encoded_by(folder, _prose(text, tokens * BYTES), tokens)
    return _run(folder, ids, device)


def encoded_by(folder: Path, text: str, limit: int) -> list[int]:
    """The first ids of a text by the folder's tokenizer.  Raises ConfigError, and UsageError for less than 8."""
    with explained("the tokenizer cannot encode the text", folder), quiet():
        ids = [int(i) for i in load_tokenizer(folder).encode(text)[:limit]]
    if len(ids) < 8:
        raise UsageError(f"the text makes {len(ids)} tokens; at least 8 are needed")
    return ids


def _prose(text: Path, size: int) -> str:
    if not text.is_file():
        raise FileError("is no file", file=text, hint="plain text that none of the models was trained on")
    with text.open("rb") as file:
        return file.read(size).decode("utf-8", errors="replace")


def _run(folder: Path, ids: list[int], device: str | None) -> float:
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(folder)
    rows = model.config.get_text_config().vocab_size
    if max(ids) >= rows:
        raise ConfigError(f"the tokenizer makes token {max(ids)}, the model has {rows} rows", file=folder)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    width = min(WINDOW, context)
    with explained(f"transformers cannot run the model on {place}", folder), torch.inference_mode():
        model = model.to(place)
        total, count = 0.0, 0
        for window in torch.tensor(ids).split(width):
            if len(window) < 2:
                continue
            batch = window[None].to(place)
            logits = model(input_ids=batch, use_cache=False).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="none")
            total, count = total + float(losses.double().sum()), count + losses.numel()
    return total / count
