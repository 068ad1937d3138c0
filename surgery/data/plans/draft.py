"""A plan before it is written: the sources of a mixture opened, divided into instances, and apportioned.

draft = draft_plan("mix.yaml")              # what `surgery data plan` shows
for source in draft.sources:
    print(source.name, source.have, source.take)
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.data.files.tokens import TokenSource
from surgery.data.plans.amounts import Amount, amounts
from surgery.data.plans.mixture import Mixture, read_mixture
from surgery.data.plans.packing import Instances
from surgery.data.plans.plan_file import Entry, PlannedSource
from surgery.data.plans.plan_sources import (
    check_bounds,
    check_pad,
    divide,
    find_entries,
    held,
    identity,
    located,
    open_entries,
    stored_size,
)
from surgery.data.plans.text_cache import Begin, load_tokenizer, tokenized

FULL = 0.9  # of an instance; more padding than that is told


@dataclass(frozen=True, eq=False)
class Opened:
    """A source that is open and divided."""

    entries: tuple[Entry, ...]
    tokens: TokenSource
    instances: Instances


@dataclass(frozen=True, eq=False)
class Draft:
    """A plan that is not written yet: all but the order."""

    root: Path
    mixture: Mixture
    vocab_size: int | None
    tokenizer: str | None  # its SHA-256
    opened: tuple[Opened, ...]
    sources: tuple[PlannedSource, ...]
    notes: tuple[str, ...]

    @property
    def instances(self) -> int:
        return sum(s.take for s in self.sources)


def draft_plan(
    path: str | os.PathLike[str],
    *,
    seed: int | None = None,
    rows_per_step: int | None = None,
    strict: bool = False,
    cache: Path | None = None,
    begin: Begin = lambda what, total: lambda n: None,
) -> Draft:
    """Open the sources of a mixture and apportion.

    seed, rows_per_step, strict  in place of what the file says
    cache                        where text is tokenized to
    begin                        makes a progress bar
    Raises ConfigError if the mixture cannot be, FileError if a file is broken.
    """
    given = {"seed": seed, "rows_per_step": rows_per_step, "strict": strict or None}
    mixture = read_mixture(path).model_copy(update={k: v for k, v in given.items() if v is not None})
    return draft_of(mixture, Path(os.path.abspath(path)).parent, cache, begin)


def draft_of(
    mixture: Mixture, root: Path, cache: Path | None = None, begin: Begin = lambda what, total: lambda n: None
) -> Draft:
    """The same of a mixture whose paths are relative to `root`."""
    vocabulary = load_tokenizer(mixture, root)
    size = mixture.vocab_size or (vocabulary.size if vocabulary else None)
    check_pad(mixture, size)
    template = located(mixture.chat_template, root) if mixture.chat_template else None
    opened, left_out = list[Opened](), list[str]()
    for source in mixture.sources:
        found = find_entries(source, root)
        entries, without = tokenized(found, source, root, vocabulary, cache, begin, template)
        left_out += without
        advance = begin(f"open {source.name}", sum(stored_size(e, root) for e in entries))
        tokens = open_entries(source.name, entries, root, size, progress=advance)
        check_bounds(tokens, mixture)
        opened.append(Opened(tuple(entries), tokens, divide(tokens, mixture)))
    given_amounts, notes = amounts(mixture, {o.tokens.name: len(o.instances) for o in opened})
    sources = tuple(_planned(o, a, mixture) for o, a in zip(opened, given_amounts, strict=True))
    notes += [*left_out, *_shared_files(opened), *(note for o in opened for note in _source_notes(o, mixture))]
    sha = vocabulary.sha256 if vocabulary else None
    return Draft(root, mixture, size, sha, tuple(opened), sources, tuple(notes))


def _planned(opened: Opened, amount: Amount, mixture: Mixture) -> PlannedSource:
    return PlannedSource(
        name=amount.name,
        entries=opened.entries,
        tokens=opened.tokens.tokens,
        documents=opened.tokens.documents,
        masked=opened.tokens.masked,
        heldout=amount.heldout,
        have=amount.have,
        take=amount.take,
        asked=amount.asked,
        filled=_filled(opened, mixture),
    )


def _shared_files(opened: Sequence[Opened]) -> list[str]:
    owners: dict[Hashable, dict[str, str]] = {}
    for o in opened:
        for file in o.tokens.files:
            owners.setdefault(identity(str(file.path)), {})[o.tokens.name] = file.path.name
    shared = [names for names in owners.values() if len(names) > 1]
    return [
        f"{next(iter(names.values()))} is in {', '.join(names)}: what one holds out the others may train on"
        for names in shared
    ]


def _filled(opened: Opened, mixture: Mixture) -> float:
    """The share of a mean instance that is tokens and not padding."""
    room = len(opened.instances) * mixture.sequence_length
    return held(opened.instances, mixture.sequence_length) / room if room else 1.0


def _source_notes(opened: Opened, mixture: Mixture) -> list[str]:
    name, length, notes = opened.tokens.name, mixture.sequence_length, []
    if opened.tokens.masked:
        notes.append(f"{name}: a label mask says what is learnt")
    lost = opened.tokens.tokens - held(opened.instances, length) if mixture.packing != "concatenate" else 0
    if lost and mixture.long == "turn":
        notes.append(f"{name}: conversations longer than {length:,} tokens end after the last answer that fits, or are "
                     f"left out if none does; {lost:,} tokens are lost")  # fmt: skip
    elif lost:
        notes.append(f"{name}: documents longer than {length:,} tokens are cut off; {lost:,} tokens are lost")
    if (share := _filled(opened, mixture)) < FULL:
        notes.append(f"{name}: {1 - share:.0%} of its instances is padding, which counts towards the budget")
    return notes
