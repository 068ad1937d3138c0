"""A file that appears whole or not at all: written beside its place, synced, renamed.

    with atomic_file("corpus.idx") as file:       # corpus.idx.partial until the block ends well
        file.write(b"...")

On an error the partial file is removed and nothing appears.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from surgery.errors import OutputError

SUFFIX = ".partial"


@contextmanager
def atomic_file(path: str | os.PathLike[str], force: bool = True) -> Iterator[BinaryIO]:
    """A new binary file, for writing and reading back.

    Raises OutputError if it cannot be written, or if `path` exists and not `force`.
    """
    path = Path(path)
    if not force and os.path.lexists(path):
        raise _exists(path)
    partial = path.with_name(path.name + SUFFIX)
    try:
        file = open(partial, "w+b")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", file=path) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path) if force else into_free(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError):
            raise OutputError(f"cannot be written: {error.strerror}", file=path) from None
        raise


def into_free(partial: Path, path: Path) -> None:
    """Give the file its name, which another program may have taken meanwhile.  Raises OutputError."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise _exists(path) from None
        os.rename(partial, path)
    else:
        os.unlink(partial)


def _exists(path: Path) -> OutputError:
    return OutputError("exists already", file=path, hint="choose another destination, or move it away")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """A file of JSON for programs and people.  Raises OutputError."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
