"""What can be read of files whatever they belong to: tensors with shapes and dtypes, and the names in pickles.

    contents([Path("pytorch_model.bin")]).tensors["lm_head.weight"]      # ("bfloat16", (32000, 4096))

No weights are read, nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from surgery.containers import open_tensors
from surgery.containers.torch_zip import Tree
from surgery.errors import show

MOST_FILES = 64  # opened; a folder of more is described by the first


@dataclass(frozen=True)
class Contents:
    """`tensors`: name -> (dtype, shape).  `globals` are what pickles name, `entries` what else lies at their top."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    globals: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    files: int = 1
    left: int = 0  # files that were not opened

    @property
    def elements(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors.values())

    def to_json(self, tensors: bool) -> dict[str, Any]:
        out: dict[str, Any] = {
            "tensor_count": len(self.tensors), "elements": self.elements, "entries": list(self.entries),
            "globals": list(self.globals),
        }  # fmt: skip
        if tensors:
            out["tensors"] = {n: {"dtype": d, "shape": list(s)} for n, (d, s) in self.tensors.items()}
        return out


def contents(paths: Sequence[Path]) -> Contents:
    """Of one file, or of several that hold pieces of one model.  Raises FileError if one of them cannot be read."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    names, entries = set[str](), list[str]()
    opened = paths[:MOST_FILES]
    for path in opened:
        table = open_tensors(path)
        tensors.update((name, (t.dtype, tuple(t.shape))) for name, t in table.items())
        names.update(table.globals)
        for container in table.containers:
            if isinstance(container, Tree):
                entries += _entries(container)
    return Contents(tensors, tuple(sorted(names)), tuple(dict.fromkeys(entries)), len(opened), len(paths) - len(opened))


def _entries(tree: Tree) -> list[str]:
    """What lies at the top of a torch file besides tensors: `args`, `optimizer`, `iteration: 5000`."""
    if not isinstance(tree.root, dict):
        return [f"a {type(tree.root).__name__}"] if not hasattr(tree.root, "shape") else []
    said = []
    for key, value in tree.root.items():
        name = show(key)[1:-1] if isinstance(key, str) else show(key)
        if isinstance(value, (bool, int, float, str)):
            said.append(f"{name}: {show(value, 40)}")
        elif not hasattr(value, "shape"):
            said.append(name)
    return said
