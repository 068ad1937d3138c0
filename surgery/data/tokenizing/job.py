"""What identifies a run of `tokenize`, and how far it is: the state that its journal adds up to.

state.line()            # what is new since the line before, for the journal
state.apply(line)       # and back
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from importlib import metadata
from typing import Any

from surgery.data.tokenizing.settings import Settings
from surgery.data.tokenizing.sources import Source
from surgery.data.tokenizing.vocabulary import Vocabulary
from surgery.errors import OutputError
from surgery.writing.journal import Line, Sizes
from surgery.writing.sink import boot_id

VERSION = 1  # of the rules by which text becomes tokens
BAD_LINES = "bad_lines.jsonl"
RECORDS = ".records"  # of the documents in a token file, until its index is written


@dataclass(frozen=True)
class Cursor:
    """Where reading goes on in a file: at a byte (of the unpacked file) or row, whose line has this number.

    `skip`: documents of the block there that are written already; `read`: bytes of the stored file before it.
    """

    file: int
    at: int = 0
    line: int = 1
    skip: int = 0
    read: int = 0


@dataclass(frozen=True)
class Tally:
    """Of a file: lines, documents and tokens (those to be learnt, too), blank documents, bad lines."""

    lines: int = 0
    documents: int = 0
    tokens: int = 0
    learnt: int = 0
    blank: int = 0
    bad: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class State:
    """How far a run is.

    sizes    of all files of the output, in bytes: what is beyond them does not count
    shards   (documents, tokens) of each token file          tallies  by the number of the source
    opened   how many sources were begun                     cursors  of those that are not done, in their order
    batch    how many batches were shuffled                  indexed  whether the indexes are written
    total    of all tallies
    """

    job: str
    sizes: dict[str, int] = field(default_factory=dict)
    shards: list[tuple[int, int]] = field(default_factory=list)
    tallies: dict[int, Tally] = field(default_factory=dict)
    opened: int = 0
    cursors: list[Cursor] = field(default_factory=list)
    batch: int = 0
    indexed: bool = False
    total: Tally = field(default_factory=Tally)
    said: dict[str, Any] = field(default_factory=dict, repr=False)

    def add(self, file: int, tally: Tally) -> None:
        self.tallies[file] = self.tallies.get(file, Tally()) + tally
        self.total += tally

    def line(self) -> Line:
        """What has changed since the last line."""
        now: dict[str, dict[str, Any]] = {
            "sizes": dict(self.sizes),
            "shards": {str(i): list(shard) for i, shard in enumerate(self.shards)},
            "tallies": {str(i): list(astuple(tally)) for i, tally in self.tallies.items()},
        }
        news = {
            key: {name: value for name, value in held.items() if self.said.get(key, {}).get(name) != value}
            for key, held in now.items()
        }
        self.said = now
        cursors = [list(astuple(cursor)) for cursor in self.cursors]
        return {**news, "opened": self.opened, "cursors": cursors, "batch": self.batch, "indexed": self.indexed}

    def apply(self, line: Line) -> None:
        self.sizes |= {str(name): int(size) for name, size in line["sizes"].items()}
        for number, (documents, tokens) in sorted(line["shards"].items(), key=lambda item: int(item[0])):
            self.shards[int(number) : int(number) + 1] = [(int(documents), int(tokens))]
        self.tallies |= {int(file): Tally(*map(int, tally)) for file, tally in line["tallies"].items()}
        self.total = sum(self.tallies.values(), Tally())
        self.cursors = [Cursor(*map(int, cursor)) for cursor in line["cursors"]]
        self.opened, self.batch, self.indexed = int(line["opened"]), int(line["batch"]), bool(line["indexed"])

    def fits(self, size: Sizes) -> bool:
        needed = {n: held for n, held in self.sizes.items() if not (self.indexed and n.endswith(RECORDS))}
        return all((found := size(name)) is not None and found >= held for name, held in needed.items())


def identity(sources: Sequence[Source], vocabulary: Vocabulary, settings: Settings, durable: bool) -> str:
    """What must be equal for a killed run to be resumed, as JSON of digests.

    Not `durable`: what an earlier boot of the machine wrote may be lost, so it is another job's.
    """
    parts: dict[str, Any] = {
        "sources": [asdict(source) for source in sources],
        "tokenizer": [vocabulary.sha256, metadata.version("tokenizers")],
        "settings": [VERSION, asdict(settings)],
        "boot of the machine": None if durable else boot_id(),
    }
    texts = {name: json.dumps(part, sort_keys=True) for name, part in parts.items()}
    return json.dumps({name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()})


def refuse_other(mine: str, other: str, hidden: str) -> None:
    """Raise OutputError that says in which way the unfinished output is another job's."""
    try:
        theirs = json.loads(other)
        differing = [name for name, digest in json.loads(mine).items() if theirs[name] != digest]
    except (ValueError, KeyError, TypeError):
        differing = ["program"]
    what = f"holds the unfinished output of another job: its {' and '.join(differing)} differ"
    raise OutputError(what, file=hidden, hint="--force discards it and starts anew")
