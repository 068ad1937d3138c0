"""Weights of an output that leave the disk as soon as they are complete, where it is too small for all of them.

with leaving(Path("out"), leave):                   # leave(name, path) keeps a file elsewhere, and says where it is
    stream.write(files, Path("out"), ...)           # read back there; in its place lies a line that says so
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.tensors import elsewhere
from surgery.tensors.files import usable_path
from surgery.writing.replaceable import WEIGHTS

Leave = Callable[[str, Path], elsewhere.Remote]
_leaving: dict[Path, Leave] = {}


@contextmanager
def leaving(dst: Path, leave: Leave) -> Iterator[None]:
    """Within, what is written as `dst` may leave the disk."""
    dst, gone = usable_path(dst), list[str]()

    def moved(name: str, path: Path) -> elsewhere.Remote:
        remote = leave(name, path)
        gone.append(os.fspath(path))
        path.write_bytes(elsewhere.POINTER + remote.name.encode() + b"\n")
        elsewhere.stand_in(gone[-1], remote)
        return remote

    _leaving[dst] = moved
    try:
        yield
    finally:
        del _leaving[dst]
        for path in gone:
            elsewhere.forget(path)


def leave_of(dst: Path) -> Leave | None:
    """What takes the weights of an output; None if they stay."""
    return _leaving.get(dst)


def may_leave(name: str) -> bool:
    """Whether a file is one of weights, without which and the config nobody takes the rest for a checkpoint."""
    return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in WEIGHTS)
