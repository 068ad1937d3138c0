"""What a format is to the rest of the program: the steps that it fills in, and the core that calls them in order.

    meta = Format("meta", "Meta's format", "Meta Llama (consolidated.NN.pth)", locate, read, spec, table, draft)
    checkpoint = meta.open(Path("Llama-2-7b"), options={})
    output = meta.plan(checkpoint, Topology(tp=2), options={})

Reading: `locate` (names only), `read` (files, opened), `spec` (what the config means), `table` (how tensors lie), then
`gather`, and the account of everything else that lies there.  Writing: `draft`; its config is read back by `spec` and
has to mean the same model; then `spread`, and the draft's `files`.  The core does what no format may forget.  The
formats are in folders beside this file; `registry.FORMATS` lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery import tokenizer
from surgery.containers.output import copied_file
from surgery.errors import ConfigError, FileError, UsageError, show, shown, some
from surgery.formats.account import OPTIMIZER, Rule, beside, inside, summed_up
from surgery.formats.optimizer import ALONE, Optimizer, States, Written, gather_states, spread_states, with_masters
from surgery.formats.parts import Parts, rows_html
from surgery.formats.table import Table
from surgery.formats.topology import ONE_RANK, Rank, Topology
from surgery.formats.unknown import dtypes_in_words, settle
from surgery.formats.weave import Shards, Stored, gather, spread
from surgery.model.spec import Spec
from surgery.model.wording import check_held
from surgery.tensors.lazy import Lazy
from surgery.tensors.stamp import Stamp
from surgery.tokenizer import Carried, Tokenizer
from surgery.units import count
from surgery.writing.replaceable import PROVENANCE as PROVENANCE

if TYPE_CHECKING:
    from surgery.containers import Container
    from surgery.containers.output import OutputFile

Options = Mapping[str, str]
Config = Mapping[str, Any]
Ranks = Mapping[Rank, Mapping[str, Stored]]
PARTS_LIMIT = 1_000_000
RUN = ("iteration", "step", "consumed_train_samples", "consumed_valid_samples")


@dataclass(frozen=True)
class Option:
    """A choice that a format offers as `-O name=value`; `side` says when it applies: read, write or both.

    `of_optimizer`: only to what --optimizer carries, and refused without it.
    """

    name: str
    meaning: str
    default: str
    choices: tuple[str, ...] = ()
    side: str = "both"
    of_optimizer: bool = False


ALLOW_UNKNOWN = Option("allow_unknown", "what is not understood and is to be passed over: names with commas between, "
                       "* for all (same as --allow-unknown)", "", (), "read")  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: nothing of its weights has been read.

    `files` hold the weights, `configs` were read too, `beside` are small files that are carried along.  `facts` are
    what a config says besides the anatomy (token ids, training settings), under Hugging Face's names; `ignored` maps
    what is left out to the reason; `notes` name everything that was guessed; `details` are for people (iteration ...).
    `stamps` are all files that were opened, as they were then.  `optimizer` is its state, if that was asked for.
    `padding` says to what the rows of the vocabulary were padded, where they may have been.
    """

    format: str
    path: Path
    spec: Spec
    parts: Mapping[str, Lazy]
    topology: Topology = ONE_RANK
    config: Config = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    configs: tuple[Path, ...] = ()
    globals: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    beside: Mapping[str, Path] = field(default_factory=dict)
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    optimizer: Optimizer | None = None
    padding: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", Parts(self.parts))

    def __repr__(self) -> str:
        return f"Checkpoint({', '.join(f'{name} {text}' for name, text in self._about())})"

    def _repr_html_(self) -> str:
        parts: str = self.parts._repr_html_()  # type: ignore[attr-defined]
        return rows_html(("checkpoint", str(self.path)), self._about()[1:]) + parts

    def _about(self) -> list[tuple[str, str]]:
        parallel = "".join(f", {name} {n}" for name, n in asdict(self.topology).items() if type(n) is int and n > 1)
        size = f"{count(self.spec.parameters())} in {len(self.parts)} parts, {self.dtype}"
        return [("path", ascii(shown(self.path))), ("format", self.format + parallel), ("family", self.spec.family),
                ("parameters", size)]  # fmt: skip

    @property
    def dtype(self) -> str:
        """The dtype that most bytes of the weights have."""
        return main_dtype(self.parts.values())


def main_dtype(tensors: Iterable[Lazy]) -> str:
    """The dtype of most bytes."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _check_counts(spec: Spec, opened: Opened) -> None:
    """Raise ConfigError if the config claims more than the tensors could hold, before any list of it is made.

    A tensor holds three parts, or a stack of layers, of experts or of both: two for each row or matrix of it.
    """
    tensors = [tensor.shape for shard in opened.shards.values() for tensor in shard.values()]
    rows = [max(shape[0], math.prod(shape[:-2])) if shape else 0 for shape in tensors]
    if spec.part_count() > min(PARTS_LIMIT, sum(max(3, 2 * n) for n in rows)):
        what = f"{spec.layers} layers" + (f" with {spec.experts} experts" if spec.experts else "")
        raise ConfigError(f"claims {what}, which {len(tensors)} tensors do not hold", file=opened.file)


# ------------------------------------------------------------------------- what the steps of a format hand over


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies: the folder that was given, and the one in it that is read.  `also`: where a tokenizer
    may be besides."""

    root: Path
    folder: Path
    also: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return tokenizer.find(self.folder, self.root, *self.also)


@dataclass(frozen=True)
class Opened:
    """The files of a checkpoint, opened.  `config` (which stands in `file`) and `seen`, what the tensors show, say what
    the model is; `shards` are the ranks' tensors by name, `containers` all files that were opened, `read` all others.
    `parallel` is what the run's sizes were, where files do not depend on them."""

    config: Config
    file: str
    shards: Shards
    containers: tuple[Container, ...]
    read: tuple[Path, ...] = ()
    seen: Any = None
    topology: Topology = ONE_RANK
    details: Mapping[str, object] = field(default_factory=dict)
    parallel: Topology | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a config means.  `variant` is how the tensors lie where their names do not tell, `tokenizer` the name of one
    that the config mentions, `padding` as of a Checkpoint."""

    spec: Spec
    notes: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    details: Mapping[str, object] = field(default_factory=dict)
    variant: Any = None
    tokenizer: str | None = None
    padding: str = ""


@dataclass(frozen=True)
class Draft:
    """What a format would write: a config, what the tensors would show (as `Opened.seen`), how they would lie on which
    ranks, and the files that hold all this.  `who` would read them, if not the format's usual program."""

    config: Config
    seen: Any
    table: Table
    topology: Topology
    files: Callable[[Ranks], Iterable[OutputFile]]
    notes: tuple[str, ...] = ()
    who: str = ""
    hint: str | None = None
    states: Callable[[Ranks, Written], Iterable[OutputFile]] | None = None  # the files, with an optimizer's state
    states_lie: tuple[Table, Topology] | None = None  # how that lies, if not as the weights


@dataclass(frozen=True)
class Output:
    """Files to be written, and what has to be said about them."""

    files: tuple[OutputFile, ...]
    notes: tuple[str, ...] = ()


# -------------------------------------------------------------------------------------------------- the format


@dataclass(frozen=True)
class Format:
    """A checkpoint format: its steps, as the module's docstring tells, and what it offers.

    `flags` are the parallel sizes that it has: of tp, pp, vpp, ep; `zero`: which may be 0.  `tokens` writes a
    tokenizer, None if checkpoints have none.  `files` and `entries` are what is known of other files in the folder and
    of other entries in pickles.  `states` reads an optimizer's state (None: there is none); `masters`: whether fp32
    masters are kept beside weights of fewer bits.
    """

    name: str
    who: str
    title: str
    locate: Callable[[Path], Place | None]
    read: Callable[[Place, Options], Opened]
    spec: Callable[[Config, str, Any, Options], Reading]
    table: Callable[[Opened, Reading, Options], Table]
    draft: Callable[[Checkpoint, Topology, Options], Draft]
    tokens: Callable[[Tokenizer, Checkpoint], Carried] | None = None
    flags: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    files: tuple[Rule, ...] = ()
    entries: tuple[Rule, ...] = ()
    states: Callable[[Place, Opened, Reading, Mapping[str, Lazy], Options], States | None] | None = None
    masters: bool = False

    def recognise(self, folder: Path) -> bool:
        return self.locate(folder) is not None

    @property
    def choices(self) -> tuple[Option, ...]:
        """Its own options, and those that every format has."""
        return (*self.options, ALLOW_UNKNOWN)

    def open(self, folder: Path, options: Options, optimizer: bool = False) -> Checkpoint:
        """A checkpoint of this format, with the state of its `optimizer` if that is asked for and there is one.

        `options` are complete.  Raises SurgeryError naming all that does not fit.
        """
        place = self.locate(folder)
        if place is None:
            raise FileError(f"holds no checkpoint of the format {self.name}", file=folder, hint=self.title)
        opened = self.read(place, options)
        reading = self.spec(opened.config, opened.file, opened.seen, options)
        _check_counts(reading.spec, opened)
        table = self.table(opened, reading, options)
        gathered = gather(table, opened.shards, reading.spec, opened.topology)
        states = self.states(place, opened, reading, gathered.parts, options) if optimizer and self.states else None
        found = gather_states(states, table, opened.shards, reading.spec, opened.topology) if states else None
        strange = dtypes_in_words(tensor.dtype for tensor in gathered.parts.values())
        said = settle((*reading.notes, *strange), options.get(ALLOW_UNKNOWN.name, ""), opened.file)
        tokens, notes = place.tokenizer, [*place.notes, *said, *opened.notes]
        if tokens is None and reading.tokenizer:
            file = Path(opened.file).name
            notes.append(f"{file} names the tokenizer {show(reading.tokenizer)}, which is not in the folder")
        ignored, carried = self._account(place, opened, gathered.ignored)
        if found:
            ignored = {name: why for name, why in ignored.items() if why != OPTIMIZER}
        paths = [path for c in opened.containers for path in c.paths]
        return Checkpoint(
            format=self.name, path=folder, spec=reading.spec, parts=gathered.parts,
            topology=opened.parallel or opened.topology, config=opened.config, facts=reading.facts,
            files=tuple(paths), configs=opened.read,
            globals=tuple(sorted({name for c in opened.containers for name in c.globals})), ignored=ignored,
            notes=tuple(dict.fromkeys(notes)), details={**place.details, **opened.details, **reading.details},
            tokenizer=tokens, beside=carried, optimizer=with_masters(found, gathered.parts) if found else None,
            padding=reading.padding,
        )  # fmt: skip

    def _account(
        self, place: Place, opened: Opened, tensors: Mapping[str, str]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        """Everything that is left out, each with the reason, and the small files that are carried along."""
        claimed = {id(tensor) for shard in opened.shards.values() for tensor in shard.values()}
        entries = [pair for c in opened.containers for pair in inside(c, claimed, self.entries)]
        files = {*opened.read, *(path for c in opened.containers for path in c.paths)}
        if place.tokenizer:
            files |= set(place.tokenizer.files.values())
        found = beside(place.root, files, self.files)
        return {**summed_up((*tensors.items(), *entries)), **found.left}, found.carried

    def plan(self, checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
        """The files that hold a checkpoint of any format.  `options` are complete.

        Raises ConfigError naming everything about the model that this format cannot say, LayoutError for tensors that
        have no place in it.
        """
        found = checkpoint.tokenizer
        checkpoint = _as_its_tokenizer_says(checkpoint)
        draft = self.draft(checkpoint, topology, options)
        who, spec = draft.who or self.who, checkpoint.spec
        try:
            back = self.spec(draft.config, "its config", draft.seen, self.reading(options)).spec
        except ConfigError as error:
            raise ConfigError(f"{who} cannot hold this {spec.family}: {error.what}", hint=draft.hint) from None
        check_held(who, spec, back, draft.hint)
        ranks = spread(draft.table, checkpoint.parts, spec, draft.topology)
        tokens = Carried((), ())
        if self.tokens:
            note = "no tokenizer was found, none is written (--tokenizer PATH adds one)"
            tokens = self.tokens(found, checkpoint) if found else Carried((), (note,))
        files = [*self._files(draft, ranks, checkpoint), *tokens.files]
        names, notes = {file.name for file in files}, [*draft.notes, *tokens.notes]
        if self.tokens:
            files += [copied_file(name, path) for name, path in checkpoint.beside.items() if name not in names]
        elif checkpoint.beside:
            notes.append(f"{self.name} has no place for {some(checkpoint.beside)}")
        return Output(tuple(files), tuple(notes))

    def _files(self, draft: Draft, ranks: Ranks, checkpoint: Checkpoint) -> Iterable[OutputFile]:
        """The files with the tensors.  Raises ConfigError for an optimizer's state that the format has no place for."""
        if checkpoint.optimizer is None:
            return draft.files(ranks)
        if draft.states is None:
            raise ConfigError(f"{self.name} checkpoints are written without an optimizer's state",
                              hint=ALONE)  # fmt: skip
        table, topology = draft.states_lie or (draft.table, draft.topology)
        found = spread_states(checkpoint.optimizer, table, checkpoint.spec, topology, ranks)
        return draft.states(ranks, found)

    # --------------------------------------------------------------------------------------------- options

    def option_names(self, side: str) -> set[str]:
        return {o.name for o in self.choices if o.side in (side, "both")}

    def with_defaults(self, given: Options, side: str) -> dict[str, str]:
        """All options of one side, `given` over the defaults.  Raises UsageError on a value that is no choice."""
        values = {o.name: o.default for o in self.choices if o.side in (side, "both")}
        for o in self.choices:
            if o.name in given and o.name in values:
                if o.choices and given[o.name] not in o.choices:
                    raise UsageError(
                        f"-O {o.name}={given[o.name]}: {self.name} takes {', '.join(o.choices)}",
                        hint=f"`surgery formats {self.name}` explains every option",
                    )
                values[o.name] = given[o.name]
        return values

    def reading(self, options: Options) -> dict[str, str]:
        """The options with which is read what was written with these."""
        return self.with_defaults({k: v for k, v in options.items() if k in self.option_names("read")}, "read")


def _as_its_tokenizer_says(checkpoint: Checkpoint) -> Checkpoint:
    """With the ids of special tokens, and how many rows of the vocabulary are no padding, if nothing else says it."""
    found, spec = checkpoint.tokenizer, checkpoint.spec
    if found is None:
        return checkpoint
    if spec.true_vocab is None and found.vocab_size and found.vocab_size <= spec.vocab:
        spec = spec.replace(true_vocab=found.vocab_size)
    return replace(checkpoint, spec=spec, facts={**found.ids(), **checkpoint.facts})


def mapping(file: Path, read: Callable[[Path, str], object]) -> dict[str, Any]:
    """What a config's file holds, read by `read_json` or `read_yaml`.  Raises ConfigError if it is no mapping."""
    value = read(file, file.name)
    if not isinstance(value, dict):
        raise ConfigError("holds no mapping of keys to values", file=file)
    return value


def number(options: Options, name: str) -> float | None:
    """A positive number from an option, None where it is empty or `auto`."""
    text = options.get(name, "")
    if text in ("", "auto"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e15:
        raise UsageError(f"-O {name}={show(text)} is no positive number")
    return value


def run_of(details: Mapping[str, object]) -> dict[str, int]:
    """How far a run had come, of a checkpoint's details: what a format may keep through another that does not."""
    return {k: v for k, v in details.items() if k in RUN and type(v) is int and 0 <= v < 1 << 62}
