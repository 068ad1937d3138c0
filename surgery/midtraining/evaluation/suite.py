"""Tasks made ready once, to be run on a model any number of times: encoded, scored, summed up.

    suite = Suite.of(data.load(["arc_easy", "piqa"], limit=200), encoder, context=2048)
    suite.run(model)["arc_easy/rc_0shot"]
    # {"documents": 200, "acc": 0.45, "acc_stderr": 0.035, "acc_norm": 0.4, "acc_norm_stderr": 0.035, "bpb": 0.91}

acc        share of documents whose right answer has the largest log-likelihood
acc_norm   the same, log-likelihoods divided by the characters of the answer without its leading blank
bpb        bits per byte of the right answer, mean over documents: smooth where accuracy is still noise
exact      of tasks with a single answer: share of documents where greedy decoding gives it
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import UsageError
from surgery.midtraining.evaluation.likelihood import BATCH, Score, Span, score
from surgery.midtraining.evaluation.resting import ALONE, Advance, Ranks
from surgery.midtraining.evaluation.tasks import Document, Task
from surgery.midtraining.evaluation.texts import Encoder
from surgery.running.device import nobody

Scores = dict[str, float | int]
Told = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Tasks and the spans of all their answers, in order."""

    tasks: tuple[Task, ...]
    spans: tuple[Span, ...]
    context: int

    @classmethod
    def of(cls, tasks: Sequence[Task], encoder: Encoder, context: int) -> Suite:
        """Raises UsageError if an answer alone is longer than the context."""
        spans = []
        for task, document, answer in _answers(tasks):
            try:
                spans.append(encoder.answer(*answer).within(context))
            except UsageError as error:
                raise UsageError(f"{task.name}, document {document.number}: {error.what}") from None
        return cls(tuple(tasks), tuple(spans), context)

    def run(
        self, model: Any, *, batch: int = BATCH, ranks: Ranks = ALONE, advance: Advance = nobody
    ) -> dict[str, Scores]:
        """The scores of every task."""
        told = self.answers(model, batch=batch, ranks=ranks, advance=advance)
        return {task.name: summary([d for d in told if d["task"] == task.name]) for task in self.tasks}

    def answers(self, model: Any, *, batch: int = BATCH, ranks: Ranks = ALONE, advance: Advance = nobody) -> list[Told]:
        """What came out for every document: `log_likelihoods` and `greedy` of its answers, and its scores."""
        scores = iter(score(model, self.spans, context=self.context, batch=batch, ranks=ranks, advance=advance))
        return [
            {"task": task.name, "document": document.number, "gold": document.gold, **_told(document, scores)}
            for task in self.tasks
            for document in task.documents
        ]


def _answers(tasks: Sequence[Task]) -> Iterator[tuple[Task, Document, tuple[str, str]]]:
    return ((task, doc, answer) for task in tasks for doc in task.documents for answer in doc.answers)


def _told(document: Document, scores: Iterator[Score]) -> Told:
    found = [next(scores) for _ in document.answers]
    nats, greedy = [s.nats for s in found], [s.greedy for s in found]
    texts = [continuation for _, continuation in document.answers]
    gold = document.gold
    told: Told = {"log_likelihoods": nats, "greedy": greedy}
    told["bpb"] = -nats[gold] / math.log(2) / len(texts[gold].encode())
    if len(texts) == 1:
        return told | {"exact": float(greedy[0])}
    per_letter = [n / max(1, len(text.removeprefix(" "))) for n, text in zip(nats, texts, strict=True)]
    return told | {"acc": float(_best(nats) == gold), "acc_norm": float(_best(per_letter) == gold)}


def _best(values: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=lambda i: values[i])


def summary(told: Sequence[Told]) -> Scores:
    """The means over documents, with the standard errors of accuracies."""
    out: Scores = {"documents": len(told)}
    for name in ("acc", "acc_norm", "exact", "bpb"):
        values = [document[name] for document in told if name in document]
        if values:
            out[name] = sum(values) / len(values)
            if name != "bpb" and len(values) > 1:
                spread = sum((v - out[name]) ** 2 for v in values) / (len(values) - 1)
                out[f"{name}_stderr"] = math.sqrt(spread / len(values))
    return out
