"""A kind of file or folder: how it is recognised, what it is called, and what to do with it.

    Kind("gguf", "a GGUF file", magic=b"GGUF", next=("convert the original instead",))

Kinds are data; a new one is a line in `folders.FOLDERS`, `trainers.TRAINERS` or `files.FILES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.recognising.contents import Contents
from surgery.recognising.folder import Folder

Facts = Mapping[str, str]


@dataclass(frozen=True)
class Kind:
    """A kind; the first of a table that fits is taken.

    name     for scripts                               what     as it stands after "this is"
    has      patterns that all occur in the folder ("a|b": one of them); a folder's name ends in a slash
    lacks    patterns none of which occurs             when     whatever else must hold
    ends     how the name of a file ends               magic    how a file begins, at byte `at`
    weights  patterns of the files whose tensors are shown
    facts    lines about this one; with `path` and `parent` they fill in `what` and `next`
    next     what to do, one step a line; a command where there is one
    """

    name: str
    what: str
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    when: Callable[[Folder], bool] | None = None
    ends: tuple[str, ...] = ()
    magic: bytes = b""
    at: int = 0
    weights: tuple[str, ...] = ()
    facts: Callable[[Path], Facts] | None = None
    next: tuple[str, ...] = ()

    def fits_folder(self, folder: Folder) -> bool:
        """Whether a folder is of this kind."""
        if not self.has and self.when is None:
            return False
        found = all(any(folder.matching(p) for p in patterns.split("|")) for patterns in self.has)
        return (
            found and not any(folder.matching(p) for p in self.lacks) and (self.when is None or bool(self.when(folder)))
        )

    def fits_file(self, path: Path, head: bytes) -> bool:
        """Whether a file that begins like this is of this kind."""
        begins = head[self.at : self.at + len(self.magic)] == self.magic
        return begins and (not self.ends or path.name.lower().endswith(self.ends)) and bool(self.ends or self.magic)


@dataclass(frozen=True)
class Answer:
    """What lies at a path.  `problem`: why it could not be looked into any further, if it could not."""

    path: str
    kind: str
    what: str
    facts: Facts = field(default_factory=dict)
    next: tuple[str, ...] = ()
    contents: Contents | None = None
    problem: str | None = None

    def to_json(self, tensors: bool = False) -> dict[str, Any]:
        """Plain data; every tensor on demand, else only how many there are."""
        out: dict[str, Any] = {"path": self.path, "kind": self.kind, "what": self.what, "facts": dict(self.facts),
                               "problem": self.problem, "next": list(self.next)}  # fmt: skip
        return out | (self.contents.to_json(tensors) if self.contents else {})
