"""Text becomes token files, by many processes, in bounded memory, resumable, whole or not at all.

    vocabulary = load_vocabulary("SmolLM2-135M")
    sources, notes = find_sources(["docs/*.jsonl.gz"])
    settings = Settings(dtype="uint16", eos=vocabulary.special["eos"])
    report = tokenize(sources, Path("tokens"), vocabulary, settings)        # tokens/{tokens.bin,tokens.idx,tokens.json}

What is written depends on the sources, the tokenizer and the settings alone, not on the number of processes.  A run
that was killed goes on when it is repeated, from a few seconds before, and ends in the same bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from surgery.data.tokenizing import shards
from surgery.data.tokenizing.arrange import Lines, order_of, portions
from surgery.data.tokenizing.bad_lines import SHOWN, BadLine, Limit, summary
from surgery.data.tokenizing.feed import Feed
from surgery.data.tokenizing.job import BAD_LINES, State, Tally, identity, refuse_other
from surgery.data.tokenizing.settings import Settings
from surgery.data.tokenizing.shards import Shards
from surgery.data.tokenizing.sources import Source
from surgery.data.tokenizing.vocabulary import Vocabulary
from surgery.data.tokenizing.workers import Workers
from surgery.errors import FileError, some
from surgery.writing.ahead import cores
from surgery.writing.interrupt import Interrupted, signals
from surgery.writing.journal import Journal
from surgery.writing.sink import os_errors
from surgery.writing.staging import Staging

NOTE = "tokens.json"
CHECKPOINT = 1.0  # seconds between two lines of the journal
PATIENCE = 20  # ... and at least so many times as long as the last one took
LEAST = 4 << 20  # bytes of input that are worth another process
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Report:
    """What a run did.

    files     (documents, tokens) of each token file       bad       bad lines by kind, and the first of them
    resumed   tokens that an earlier run had written       seconds   wall time of this run
    """

    dst: Path
    format: str
    dtype: str
    total: Tally
    files: dict[str, tuple[int, int]]
    kinds: Counter[str]
    first: tuple[BadLine, ...]
    notes: tuple[str, ...]
    resumed: int
    seconds: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        total = asdict(self.total)
        rate = (self.total.tokens - self.resumed) / max(self.seconds, 1e-9)
        return {
            "output": str(self.dst),
            "format": self.format,
            "dtype": self.dtype,
            **total,
            "files": {name: {"documents": d, "tokens": t} for name, (d, t) in self.files.items()},
            "bad_lines": {"kinds": dict(self.kinds), "first": [asdict(line) for line in self.first]},
            "notes": list(self.notes),
            "resumed_tokens": self.resumed,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(rate),
            "bytes_read": self.bytes,
        }


def tokenize(
    sources: Sequence[Source],
    dst: Path,
    vocabulary: Vocabulary,
    settings: Settings,
    *,
    workers: int | None = None,
    max_bad: Limit | None = None,
    force: bool = False,
    durable: bool = True,
    progress: Progress = lambda read, documents, tokens: None,
    checkpoint: float = CHECKPOINT,
) -> Report:
    """Write the folder `dst`, which appears when all of it is on disk.

    workers   processes that encode; None: one for each core, fewer for little text
    max_bad   how many bad lines are borne; None: 0.1 %
    durable   False: do not wait for the disk.  Survives kills, not a power cut
    progress  is told the bytes read, documents and tokens that are new since it was called last

    Raises OutputError if `dst` exists or holds another job's unfinished output, and not `force`; FileError if there are
    more bad lines than `max_bad`, or a source cannot be read; Interrupted on SIGINT and SIGTERM.  What was written is
    kept for the next run.
    """
    begun, limit = time.monotonic(), max_bad or Limit.parse("0.1%")
    job = identity(sources, vocabulary, settings, durable)
    count = workers or workers_for(sum(source.size for source in sources))
    with os_errors(dst), Staging.open(dst, force, durable) as stage:
        other = (lambda theirs: None) if force else lambda theirs: refuse_other(job, theirs, str(stage.hidden))
        journal, state, notes = stage.begin(job, State, other)
        run = _Run(sources, vocabulary, settings, stage, journal, state, limit, checkpoint)
        resumed = state.total.tokens
        try:
            run.tidy()
            if not state.indexed:
                run.encode(count, progress)
                run.index()
            return run.publish(begun, resumed, tuple(notes))
        finally:
            journal.close()


def workers_for(size: int) -> int:
    """Processes for so many bytes of input."""
    return max(1, min(cores(), size // LEAST))


class _Run:
    """A run, from the place that its state names."""

    def __init__(
        self,
        sources: Sequence[Source],
        vocabulary: Vocabulary,
        settings: Settings,
        stage: Staging,
        journal: Journal,
        state: State,
        limit: Limit,
        checkpoint: float,
    ) -> None:
        self.sources, self.vocabulary, self.settings, self.limit = sources, vocabulary, settings, limit
        self.stage, self.journal, self.state = stage, journal, state
        self.least = self.every = checkpoint
        self.last = time.monotonic()
        self.folder = stage.hidden / "data"

    def tidy(self) -> None:
        """Remove what a killed run left half done."""
        for name in set(os.listdir(self.stage.data)) - set(self.state.sizes):
            os.unlink(name, dir_fd=self.stage.data)

    def encode(self, workers: int, progress: Progress) -> None:
        """Write all token files."""
        state, settings = self.state, self.settings
        order = order_of(len(self.sources), settings.shuffle)[state.opened :]
        ring = 1 if settings.shuffle is None else settings.shuffle.ring
        self._say_resumed(progress)
        with (
            signals() as came,
            Workers(workers, self.vocabulary.document, settings) as pool,
            Shards(self.stage, settings, [source.path for source in self.sources], state) as out,
        ):
            feed = Feed(self.sources, order, settings, pool, ring)
            for portion in portions(feed, state, settings.shuffle):
                if portion.documents is not None:
                    out.write(portion.documents)
                self._note(portion.bad, out)
                documents = portion.documents
                progress(portion.read, *((len(documents), len(documents.ids)) if documents else (0, 0)))
                if came or time.monotonic() - self.last > self.every:
                    self._checkpoint(out)
                if came:
                    raise Interrupted(came[0], self.stage.dst)
            self._checkpoint(out)
        self._check_limit(ended=True)

    def _say_resumed(self, progress: Progress) -> None:
        """Tell of what an earlier run did."""
        done, total = {cursor.file: cursor.read for cursor in self.state.cursors}, self.state.total
        read = sum(done.get(file, self.sources[file].size) for file in self.state.tallies.keys() | done.keys())
        progress(read, total.documents, total.tokens)

    def _note(self, bad: Lines, out: Shards) -> None:
        if bad:
            out.report([BadLine(self.sources[f].path, b.line, b.kind, b.detail).report() for f, b in bad])
            self._check_limit(ended=False)

    def _checkpoint(self, out: Shards) -> None:
        """Have the journal say how far the run is, as soon as that is true on disk."""
        began = time.monotonic()
        out.sync()
        self.journal.append([self.state.line()])
        self.last = time.monotonic()
        self.every = max(self.least, PATIENCE * (self.last - began))

    def _check_limit(self, ended: bool) -> None:
        total = self.state.total
        if not self.limit.allows(total.bad, total.lines, ended):
            kinds, first = self._bad_lines()
            what = f"{summary(total.bad, total.lines, kinds)}; such as {some(first, SHOWN)}"
            hint = f"all are listed in {self.folder / BAD_LINES}; mend them, or tokenize with a larger --max-bad"
            raise FileError(f"more than {self.limit} are bad: {what}", hint=hint)

    def _bad_lines(self) -> tuple[Counter[str], list[BadLine]]:
        """How many of each kind, and the first ones."""
        kinds, first = Counter[str](), list[BadLine]()
        if BAD_LINES in self.state.sizes:
            with open(self.folder / BAD_LINES, "rb") as file:
                for line in file.read(self.state.sizes[BAD_LINES]).splitlines():
                    bad = BadLine(**json.loads(line))
                    kinds[bad.kind] += 1
                    first += [bad] * (len(first) < SHOWN)
        return kinds, first

    def index(self) -> None:
        """Make the indexes of the records."""
        settings = self.settings
        files = [shards.names(settings, number) for number in range(len(self.state.shards))]
        made = [Path(name["tokens"]).with_suffix(settings.output.index).name for name in files]

        def finish(records: str, index: str) -> None:
            settings.output.finish(self.folder / records, self.folder / index, settings.dtype)

        with ThreadPoolExecutor(min(cores(), len(files)), "surgery-index") as pool:
            list(pool.map(finish, [name["records"] for name in files], made))
        self._write(NOTE, (json.dumps(self._note_data(), indent=2) + "\n").encode())
        self.state.sizes |= {name: (self.folder / name).stat().st_size for name in made}
        self.state.indexed = True
        self.journal.append([self.state.line()])

    def _write(self, name: str, data: bytes) -> None:
        fd = self.stage.create(name, 0)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        self.state.sizes[name] = len(data)

    def _note_data(self) -> dict[str, Any]:
        """tokens.json: where the tokens come from.  Nothing in it depends on when or how fast they were made."""
        settings, vocabulary = self.settings, self.vocabulary
        tallies = [self.state.tallies.get(number, Tally()) for number in range(len(self.sources))]
        return {
            "format": settings.format,
            "dtype": settings.dtype,
            "tokenizer": {"name": vocabulary.name, "sha256": vocabulary.sha256, "vocab_size": vocabulary.size},
            "settings": asdict(settings),
            **asdict(self.state.total),
            "files": {name: {"documents": d, "tokens": t} for name, (d, t) in self._files().items()},
            "sources": [
                {"path": source.path, "bytes": source.size, **asdict(tally)}
                for source, tally in zip(self.sources, tallies, strict=True)
            ],
            "versions": {name: metadata.version(name) for name in ("checkpoint-surgery", "tokenizers")},
        }

    def _files(self) -> dict[str, tuple[int, int]]:
        return {shards.names(self.settings, i)["tokens"]: shard for i, shard in enumerate(self.state.shards)}

    def publish(self, begun: float, resumed: int, notes: tuple[str, ...]) -> Report:
        """Let the folder appear."""
        state, dst = self.state, self.stage.dst
        kinds, first = self._bad_lines()
        records = {shards.names(self.settings, number)["records"] for number in range(len(state.shards))}
        for name in records & set(os.listdir(self.stage.data)):
            os.unlink(name, dir_fd=self.stage.data)
        self.stage.publish(set(state.sizes) - records)
        notes += () if state.total.documents else ("there is no document in any of the sources",)
        return Report(
            dst, self.settings.format, self.settings.dtype, state.total, self._files(), kinds, tuple(first), notes,
            resumed, time.monotonic() - begun, sum(source.size for source in self.sources),
        )  # fmt: skip
