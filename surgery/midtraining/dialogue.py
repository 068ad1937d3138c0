"""Data of fine-tuning as a run's YAML names them: conversations become a plan, preferences a file of batches.

data:
  kind: sft
  sequence_length: 2048
  sources:
    - {name: hermes, paths: openhermes.json}                          # its columns are told by its first line
    - {name: alpaca, paths: alpaca.jsonl, prompt: instruction, completion: output, epochs: 2}

A plan is one of `surgery data plan`, so it is inspected, resumed and divided among processes as any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.containers.text import read_json
from surgery.data.plans.fingerprint import check_same, differences
from surgery.data.plans.mixture import Mixture
from surgery.data.strict import validated
from surgery.data.tokenizing.pairs import PairFile, write_pairs
from surgery.data.tokenizing.sources import Source, find_sources
from surgery.data.tokenizing.text import blocks
from surgery.data.tokenizing.vocabulary import Vocabulary, load_vocabulary
from surgery.errors import ConfigError, show, some
from surgery.midtraining.checkpoint import FOLDER, steps
from surgery.midtraining.settings import Run
from surgery.midtraining.settings_data import Dialogue
from surgery.writing.atomic import atomic_file, write_json

LARGEST = 4 << 30  # bytes of an array of JSON
MESSAGES = ("messages", "conversations")  # columns that are taken unasked
COLUMNS = ("prompt", "chosen", "rejected")
PAIRS, NOTES = "pairs.npz", "pairs.json"  # in the run's folder


def mixture_of(run: Run) -> Mixture:
    """The mixture of `data.kind: sft`.  Raises ConfigError for columns that are not there."""
    data = run.data
    vocabulary = vocabulary_of(run)
    special = vocabulary.special
    mixture = {
        "sequence_length": data.sequence_length,
        "sources": [_source(s, lines_of(s, Path(run.output))) for s in data.sources],
        "tokenizer": data.tokenizer or run.model.path,
        "chat_template": data.chat_template,
        "packing": data.packing,
        "long": "turn",
        "pad_id": special.get("pad", special.get("eos", 0)),
        "rows_per_step": data.batch,
        "seed": data.seed or 0,
    }
    return validated(mixture, Mixture)


def _source(source: Dialogue, paths: list[str]) -> dict[str, Any]:
    """A source as a mixture says it."""
    held = {"holdout": source.holdout} if source.holdout else {}
    return {"name": source.name, "paths": paths, "multiplier": source.epochs, **_keys(source, paths), **held}


def lines_of(source: Dialogue, folder: Path) -> list[str]:
    """The files of a source; one that is an array of JSON is written into the run's folder as lines."""
    found, _ = find_sources(source.paths)
    return [_as_lines(file, folder / f"{source.name}-{i}.jsonl") for i, file in enumerate(found)]


def _as_lines(file: Source, path: Path) -> str:
    if file.format != "jsonl" or file.packing or not _begins_array(file):
        return file.path
    if not path.is_file():
        try:
            with file.open() as raw:
                held = json.loads(raw.read(LARGEST))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"is no JSON: {show(str(error), 100)}", file=file.path) from None
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as out:
            out.writelines(json.dumps(entry).encode() + b"\n" for entry in held)
    return str(path)


def _begins_array(file: Source) -> bool:
    with file.open() as raw:
        return raw.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _keys(source: Dialogue, paths: Sequence[str]) -> dict[str, Any]:
    """The columns of a source, by its first line where the settings do not say them."""
    if source.messages:
        return {"messages_key": source.messages}
    if source.prompt and source.completion:
        return {"prompt_key": source.prompt, "completion_key": source.completion}
    columns = _columns(paths)
    if found := [name for name in MESSAGES if name in columns]:
        return {"messages_key": found[0]}
    if {"prompt", "completion"} <= set(columns):
        return {"prompt_key": "prompt", "completion_key": "completion"}
    hint = "say which: messages: COLUMN, or prompt: COLUMN and completion: COLUMN"
    raise ConfigError(f"data.sources: {source.name} has the columns {some(columns)}, none of which is known", hint=hint)


def _columns(paths: Sequence[str]) -> list[str]:
    [first, *_], _ = find_sources(paths)
    return _parquet(first) if first.format == "parquet" else _json(first)


def _parquet(file: Source) -> list[str]:
    import pyarrow.parquet as pq

    with file.open() as raw:
        return list(pq.read_schema(raw).names)


def _json(file: Source) -> list[str]:
    block = next(blocks(file, 0, ()), None)
    try:
        held = json.loads(block.payload.split(b"\n", 1)[0]) if block else {}
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise ConfigError("its first line holds no columns", file=file.path, hint="lines of JSON objects are needed")
    return list(held)


def vocabulary_of(run: Run) -> Vocabulary:
    """The tokenizer that the data are encoded with: the model's, unless the run names one."""
    return load_vocabulary(run.data.tokenizer or run.model.path)


def pairs_of(run: Run) -> Path:
    """The file of batches of `data.kind: dpo`, made the first time; what it was made of, and without, lies beside it.

    Raises ConfigError if a run that has checkpoints is told other data.
    """
    data, path = run.data, Path(run.output) / PAIRS
    told, notes = data.model_dump(mode="json"), path.with_name(NOTES)
    known = read_json(notes) if path.is_file() and notes.is_file() else None
    if isinstance(known, dict) and still_holds(run, known["data"], told, "data"):
        return path
    if data.batch is None:
        raise ConfigError("data.batch is missing: how many pairs has a step?")
    vocabulary = vocabulary_of(run)
    usual = PairFile(())
    files = [
        PairFile(tuple(lines_of(s, Path(run.output))), *(getattr(s, n) or getattr(usual, n) for n in COLUMNS))
        for s in data.sources
    ]
    epochs = {s.epochs for s in data.sources}
    if len(epochs) > 1 or not float(next(iter(epochs))).is_integer():
        raise ConfigError("data.sources: pairs are seen in whole epochs, the same of every source")
    pad = vocabulary.special.get("pad", vocabulary.special.get("eos", 0))
    notes.unlink(missing_ok=True)  # they come last: where there are none, the file may be of other data
    found = write_pairs(path, files, vocabulary, data.chat_template, length=data.sequence_length, batch=data.batch,
                        epochs=int(next(iter(epochs))), seed=data.seed or 0, pad=pad)  # fmt: skip
    write_json(notes, {"data": told, "notes": found})
    return path


def still_holds(run: Run, before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> bool:
    """Whether what a run's folder holds was made of the settings `now`; what was not yet trained on may be made anew.

    Raises ConfigError, naming what changed, if there are checkpoints.
    """
    if steps(Path(run.output) / FOLDER):
        check_same(before, now, what)
    return not differences(before, now)
