"""Preferences as token ids: prompts with a chosen and a rejected completion become the batches of a run, in one file.

    write_pairs(Path("pairs.npz"), [PairFile(("a.jsonl",))], vocabulary, None, length=1024, batch=8, epochs=1, seed=0)

The file is what `RecordedBatches` reads.  A line holds `prompt`, `chosen` and `rejected`: texts, or lists of messages;
of lists the prompt may be missing, or be a text that they repeat: it then is what both begin with.  They are encoded
as prompts with completions are (`tokenizing/encoder.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.data.files.mapped import Array
from surgery.data.tokenizing.bad_lines import Limit
from surgery.data.tokenizing.encoder import Encoder
from surgery.data.tokenizing.prepare import Choices, settings_for
from surgery.data.tokenizing.sources import Source, find_sources
from surgery.data.tokenizing.text import Block, blocks
from surgery.data.tokenizing.vocabulary import Vocabulary
from surgery.errors import ConfigError, FileError
from surgery.writing.atomic import atomic_file

PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"
BORNE = Limit.parse("0.1%")


@dataclass(frozen=True)
class PairFile:
    """Files by path, folder or pattern, and the columns that hold the three."""

    paths: tuple[str, ...]
    prompt: str = PROMPT
    chosen: str = CHOSEN
    rejected: str = REJECTED


@dataclass(frozen=True, eq=False)
class Completion:
    """ids of a prompt and its completion, and which of them are the completion's: [tokens]."""

    ids: Array
    mask: Array


Pair = tuple[Completion, Completion]


def write_pairs(
    path: Path, files: Sequence[PairFile], vocabulary: Vocabulary, template: str | None, *, length: int, batch: int,
    epochs: int, seed: int, pad: int = 0,
) -> list[str]:  # fmt: skip
    """Write the batches, and say what was left out.

    length   tokens of a row, which the longest pair may fall short of      batch   pairs of a step
    template a file that holds the chat template, in place of the tokenizer's
    Raises FileError if too many lines hold no pair, ConfigError if there is no whole batch.
    """
    pairs = [pair for file in files for pair in _read(file, vocabulary, template)]
    fitting = [pair for pair in pairs if max(len(c.ids) for c in pair) <= length]
    if len(fitting) * epochs < batch:
        raise ConfigError(f"{len(fitting):,} pairs in {epochs} epochs are fewer than a batch of {batch}")
    rng = np.random.Generator(np.random.PCG64(seed))
    order = np.concatenate([rng.permutation(len(fitting)) for _ in range(epochs)])
    steps = order[: len(order) // batch * batch].reshape(-1, batch)
    longest = max(len(c.ids) for pair in fitting for c in pair)
    arrays = _arrays(fitting, steps, longest, pad)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    lost, unused = len(pairs) - len(fitting), len(order) - steps.size
    notes = [f"{len(fitting):,} pairs, {len(steps):,} steps of {batch}"]
    notes += [f"{lost:,} of {len(pairs):,} pairs are longer than {length:,} tokens and left out"] if lost else []
    return notes + ([f"{unused:,} pairs at the end make no whole batch and are not used"] if unused else [])


def _arrays(pairs: Sequence[Pair], steps: Array, longest: int, pad: int) -> dict[str, Array]:
    """[step, row, token]: of every step the chosen ones, then the rejected ones."""
    shape = (len(steps), 2 * steps.shape[1], longest)
    ids, seen, mask = np.full(shape, pad, np.int32), np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for step, numbers in enumerate(steps):
        for row, (which, number) in enumerate((w, n) for w in (0, 1) for n in numbers):
            one = pairs[number][which]
            n = len(one.ids)
            ids[step, row, :n], seen[step, row, :n], mask[step, row, :n] = one.ids, 1, one.mask
    index = np.concatenate([2 * steps, 2 * steps + 1], axis=1)
    return {"input_ids": ids, "attention_mask": seen, "completion_mask": mask, "index": index}


# ------------------------------------------------------------------------------------------------------------- reading


def _read(file: PairFile, vocabulary: Vocabulary, template: str | None) -> Iterator[Pair]:
    """Raises FileError if more than a thousandth of the lines hold no pair."""
    found, _ = find_sources(file.paths)
    encoders = [
        Encoder(
            vocabulary.document, settings_for(Choices(prompt=PROMPT, completion=key, template=template), vocabulary)
        )
        for key in (CHOSEN, REJECTED)
    ]
    for number, source in enumerate(found):
        if source.format != "jsonl":
            raise FileError("pairs are read from lines of JSON alone", file=source.path, hint="save it as .jsonl")
        yield from _of_source(source, number, file, encoders)


def _of_source(source: Source, number: int, file: PairFile, encoders: Sequence[Encoder]) -> Iterator[Pair]:
    bad, lines = dict[int, str](), 0
    for block in blocks(source, number, ()):
        block = replace(block, payload=_renamed(block, file))
        results = [encoder.encode(block) for encoder in encoders]
        bad |= {b.line: f"{b.kind}: {b.detail}" for r in results for b in r.bad}
        lines += results[0].lines
        good, poor = ({int(n): _completion(r.documents, i) for i, n in enumerate(r.documents.lines)} for r in results)
        yield from ((good[line], poor[line]) for line in good if line in poor)
    if not BORNE.allows(len(bad), lines):
        line, why = min(bad.items())
        raise FileError(f"{len(bad):,} of {lines:,} lines hold no pair; line {line}: {why}", file=source.path,
                        hint="name the columns: prompt, chosen, rejected")  # fmt: skip


def _completion(documents: Any, i: int) -> Completion:
    one = documents.cut(i, i + 1)
    return Completion(one.ids.astype(np.int32), one.mask)


def _renamed(block: Block, file: PairFile) -> bytes:
    """The block's lines with the columns under their usual names; what is no object stays, to be told of."""
    lines = block.payload.removesuffix(b"\n").split(b"\n")
    return b"\n".join(_line(line, file) for line in lines)


def _line(line: bytes, file: PairFile) -> bytes:
    try:
        held = json.loads(line)
        usual = {**held, PROMPT: held.get(file.prompt), CHOSEN: held[file.chosen], REJECTED: held[file.rejected]}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return line
    return json.dumps({**usual, **_split(usual)}).encode()


def _split(held: dict[str, Any]) -> dict[str, Any]:
    """Of two lists of messages without a prompt of messages: what both begin with, and what each adds."""
    chosen, rejected = held[CHOSEN], held[REJECTED]
    if not (isinstance(chosen, list) and isinstance(rejected, list)) or isinstance(held[PROMPT], list):
        return {}
    most = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))
    return {PROMPT: chosen[:same], CHOSEN: chosen[same:], REJECTED: rejected[same:]}
