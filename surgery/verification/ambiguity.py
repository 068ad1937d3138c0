"""A checkpoint that can be read in several ways: which of them predicts a text?

    found = try_readings("run", "prose.txt")
    found.best.flags, found.best.loss              # "-O release=2024-11", 2.13
    print(found.verdict)

Where files leave several readings open (`AmbiguousError.readings`), each is converted into a temporary Hugging Face
folder and run by transformers in fp32 on the text.  The wrong one predicts no better than guessing; one wins only
if it beats every other by far more than the tokens' own scatter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.conversion.convert import convert
from surgery.errors import AmbiguousError, FileError, SurgeryError, UsageError
from surgery.formats.base import Options
from surgery.formats.registry import open_checkpoint
from surgery.model.spec import Spec
from surgery.running.loading import check_memory, explained, load
from surgery.running.loss import encoded_by
from surgery.storage.copies import here
from surgery.tensors.files import File
from surgery.writing.scratch import scratch

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 2048  # of the text; a few hundred tell nonsense from sense
WINDOW = 512  # tokens that are seen at once, if the model's context is not shorter
MAX_TEXT = 1 << 20  # bytes of the text that are looked at
FAR = 4.0  # standard errors of the mean difference between two readings
SENSIBLE = 0.85  # of the loss of guessing blindly: a model that does no better has learnt nothing of this text


@dataclass(frozen=True)
class Reading:
    """One way to read the files.  `loss` is in nats per token, `right` the share of tokens that it ranks first."""

    options: dict[str, str]
    loss: float | None = None
    right: float | None = None
    error: str | None = None

    @property
    def flags(self) -> str:
        return " ".join(f"-O {name}={value}" for name, value in self.options.items())


@dataclass(frozen=True)
class Readings:
    """All readings on one text.  `guess` is the loss of guessing blindly; `best` the reading that wins, if one does."""

    path: str
    text: str
    tokens: int
    guess: float
    readings: tuple[Reading, ...]
    best: Reading | None
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Plain data; `option` is what to give to read the checkpoint so."""
        return {**asdict(self), "option": self.best.flags if self.best else None}


def try_readings(
    path: str | Path,
    text: str | Path,
    *,
    format: str | None = None,
    options: Options | None = None,
    tokenizer: str | Path | None = None,
    max_memory: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Readings:
    """The loss on a text of every way in which the files can be read.

    Needs 4 bytes of memory per parameter, a temporary copy on disk, and a tokenizer: the checkpoint's or `tokenizer`.
    Raises SurgeryError if the text cannot be read, there is no tokenizer, or no reading can be run.
    """
    prose = _prose(here(text))
    tried: list[Reading] = []
    losses: dict[int, torch.Tensor] = {}
    tokens, width = 0, 0
    for i, choice in enumerate(_choices(path, format, dict(options or {}))):
        try:
            with scratch("reading") as temporary:
                folder = temporary / "hf"
                spec = _convert(path, folder, format, choice, tokenizer, max_memory)
                width, window = spec.vocab, min(WINDOW, spec.context or WINDOW)
                loss, right = _run(folder, _tokens(folder, prose, width, max_tokens), window)
        except SurgeryError as error:
            tried.append(Reading(choice, error=str(error)))
            continue
        tokens, losses[i] = loss.numel(), loss
        mean = float(loss.mean())
        tried.append(Reading(choice, mean if math.isfinite(mean) else None, right))
    if not losses:
        raise SurgeryError(f"no reading can be run: {tried[0].error}", file=path)
    guess = math.log(width)
    best, verdict = _judge(tried, losses, guess)
    return Readings(str(path), str(text), tokens, guess, tuple(tried), best, verdict)


def _choices(path: str | Path, format: str | None, given: dict[str, str]) -> Iterator[dict[str, str]]:
    """Every set of options with which the files can be read in one way only."""
    try:
        open_checkpoint(path, format=format, options=given)
    except AmbiguousError as error:
        for reading in error.readings:
            if reading.keys() & given.keys():
                raise
            yield from _choices(path, format, {**given, **reading})
    else:
        yield given


def _prose(file: Path) -> str:
    if not file.is_file():
        raise FileError("is no file", file=file, hint="--try-text wants a file of plain text in the model's language")
    opened = File(file)
    prose = opened.read(0, min(opened.size, MAX_TEXT), "text").decode("utf-8", errors="replace")
    if not prose.strip():
        raise FileError("holds no text", file=file)
    return prose


def _convert(
    path: str | Path,
    folder: Path,
    format: str | None,
    options: Options,
    tokenizer: str | Path | None,
    max_memory: int | None,
) -> Spec:
    """Write one reading as a Hugging Face folder."""
    checkpoint = open_checkpoint(path, format=format, options=options)
    check_memory(checkpoint.spec.parameters(), checkpoint.path)
    if checkpoint.tokenizer is None and tokenizer is None:
        raise UsageError(f"{path} has no tokenizer, and a text has to be made tokens", hint="--tokenizer PATH")
    convert(path, folder, to="hf", from_=format or checkpoint.format, options=options, tokenizer=tokenizer,
            max_memory=max_memory, verify=False)  # fmt: skip
    return checkpoint.spec


def _tokens(folder: Path, prose: str, width: int, limit: int) -> list[int]:
    ids = encoded_by(folder, prose, limit)
    if max(ids) >= width:
        raise UsageError(
            f"the tokenizer makes token {max(ids)}, the vocabulary has {width} rows: it is another model's"
        )
    return ids


def _run(folder: Path, ids: list[int], width: int) -> tuple[torch.Tensor, float]:
    """The loss of every token but each window's first, and the share that was ranked first."""
    import torch

    model = load(folder)
    losses, right = [], 0
    with explained("transformers cannot run the model", folder), torch.inference_mode():
        for at in range(0, len(ids) - 1, width):
            window = torch.tensor([ids[at : at + width + 1]])
            logits = model(input_ids=window[:, :-1], use_cache=False).logits[0].float()
            wanted = window[0, 1:]
            losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double())
            right += int((logits.argmax(-1) == wanted).sum())
    every = torch.cat(losses)
    return every, right / every.numel()


def _judge(tried: list[Reading], losses: dict[int, torch.Tensor], guess: float) -> tuple[Reading | None, str]:
    """The reading that wins, and the verdict in words."""
    ranked = sorted(losses, key=lambda i: math.inf if (loss := tried[i].loss) is None else loss)
    first, rest = tried[ranked[0]], ranked[1:]
    if first.loss is None or first.loss > SENSIBLE * guess:
        best = "not finite" if first.loss is None else f"{first.loss:.3f}"
        return None, (f"no reading predicts this text: the best loss is {best}, that of guessing blindly {guess:.3f}; "
                      "is it the right tokenizer and language?")  # fmt: skip
    if len(tried) == 1:
        return first, f"the files can be read in one way, which predicts the text (loss {first.loss:.3f})"
    for other in rest:
        apart = losses[other] - losses[ranked[0]]
        noise = float(apart.std()) / math.sqrt(apart.numel())
        if not float(apart.mean()) > FAR * noise and tried[other].loss is not None:
            return None, (f"{first.flags} (loss {first.loss:.3f}) and {tried[other].flags} ({tried[other].loss:.3f}) "
                          "cannot be told apart on this text; try a longer one")  # fmt: skip
    return first, f"read it with {first.flags}: its loss is {first.loss:.3f}, of guessing blindly {guess:.3f}"
