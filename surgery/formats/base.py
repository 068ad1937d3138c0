"""What a format is to the rest of the program: a name, its options, and how to recognise, open and plan it.

    meta = Format("meta", "Meta Llama (consolidated.NN.pth)", flags=("tp",), ...)
    checkpoint = meta.open(Path("Llama-2-7b"), options={})
    output = meta.plan(checkpoint, Topology(tp=2), options={})

The formats themselves are in folders beside this file; `registry.FORMATS` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import UsageError, show
from surgery.formats.table import ONE_RANK, Topology
from surgery.model.spec import Spec
from surgery.tensors.lazy import Lazy

if TYPE_CHECKING:
    from surgery.containers.output import OutputFile
    from surgery.tokenizer import Tokenizer

Options = Mapping[str, str]
PROVENANCE = "surgery.json"  # what surgery wrote beside a checkpoint: where it comes from
RUN = ("iteration", "step", "consumed_train_samples", "consumed_valid_samples")


@dataclass(frozen=True)
class Option:
    """A choice that a format offers as `-O name=value`; `side` says when it applies: read, write or both."""

    name: str
    meaning: str
    default: str
    choices: tuple[str, ...] = ()
    side: str = "both"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: nothing of its weights has been read.

    `facts` are what a config says besides the anatomy (token ids, training settings), under Hugging Face's names;
    `notes` name everything that was guessed, dropped or left out; `details` are for people (iteration, versions).
    """

    format: str
    path: Path
    spec: Spec
    parts: Mapping[str, Lazy]
    topology: Topology = ONE_RANK
    config: Mapping[str, object] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    globals: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    @property
    def dtype(self) -> str:
        """The dtype that most bytes of the weights have."""
        sizes: dict[str, int] = {}
        for part in self.parts.values():
            sizes[part.dtype] = sizes.get(part.dtype, 0) + part.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])


@dataclass(frozen=True)
class Output:
    """Files to be written, and what has to be said about them.  `spec` is what a reader of the files will see."""

    files: tuple[OutputFile, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A checkpoint format.  `flags` are the parallel sizes that it has: of tp, pp, vpp, ep; `zero`: which may be 0."""

    name: str
    title: str
    flags: tuple[str, ...]
    options: tuple[Option, ...]
    recognise: Callable[[Path], bool]
    open: Callable[[Path, Options], Checkpoint]
    plan: Callable[[Checkpoint, Topology, Options], Output]
    zero: tuple[str, ...] = ()

    def option_names(self, side: str) -> set[str]:
        return {o.name for o in self.options if o.side in (side, "both")}

    def with_defaults(self, given: Options, side: str) -> dict[str, str]:
        """All options of one side, `given` over the defaults.  Raises UsageError on a value that is no choice."""
        values = {o.name: o.default for o in self.options if o.side in (side, "both")}
        for o in self.options:
            if o.name in given and o.name in values:
                if o.choices and given[o.name] not in o.choices:
                    raise UsageError(
                        f"-O {o.name}={given[o.name]}: {self.name} takes {', '.join(o.choices)}",
                        hint=f"`surgery formats {self.name}` explains every option",
                    )
                values[o.name] = given[o.name]
        return values


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


def joined(notes: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Several lists of notes as one, each note once."""
    return tuple(dict.fromkeys(note for group in notes for note in group))


def run_of(details: Mapping[str, object]) -> dict[str, int]:
    """How far a run had come, of a checkpoint's details: what a format may keep through another that does not."""
    return {k: v for k, v in details.items() if k in RUN and type(v) is int and 0 <= v < 1 << 62}
