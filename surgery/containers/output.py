"""What a file that is to be written will hold: known bytes, and tensors at known offsets.  Nothing is written here.

    text_file("config.json", b"{}")                       # a small file
    copied_file("tokenizer.model", source / "tokenizer.model")
    safetensors_file("model.safetensors", {"w": lazy})    # see safetensors.py, torch_writer.py

Every size is known beforehand, so that free space is checked before anything is written and a killed run can go on
in the middle of a file.  `surgery.writing.stream.write` turns these plans into files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import LayoutError, show
from surgery.tensors.extent import Extent
from surgery.tensors.files import File, check_inside
from surgery.tensors.lazy import Lazy

SMALL = 32 << 20  # bytes: copied files up to here are known content
Literal = tuple[int, bytes]  # an offset in a file, and the bytes that begin there


@dataclass(frozen=True, eq=False)
class Region:
    """A tensor's bytes, row-major and little-endian, at an offset of a file.

    `copy`: a replica whose original is written elsewhere; reading it counts nothing in a ledger.
    """

    name: str
    tensor: Lazy
    offset: int
    copy: bool = False

    @property
    def stop(self) -> int:
        return self.offset + self.tensor.nbytes


@dataclass(frozen=True, eq=False)
class OutputFile:
    """A file of `size` bytes: `head` at 0, `regions` in ascending order, zeros between them, then what `tail` says.

    `tail` is given the CRC-32 of every region and returns bytes and the offsets they belong at: a zip archive's
    headers and directory.  Without it no CRC is computed.
    """

    name: str
    size: int
    head: bytes = b""
    regions: tuple[Region, ...] = ()
    tail: Callable[[Sequence[int]], Iterable[Literal]] | None = None

    def __post_init__(self) -> None:
        at = len(self.head)
        for region in self.regions:
            assert region.offset >= at, f"{region.name} overlaps what lies before it in {self.name}"
            at = region.stop
        assert at <= self.size, f"{self.name} is planned too small"


def text_file(name: str, data: bytes) -> OutputFile:
    """A file of known content."""
    return OutputFile(relative(name), len(data), data)


def copied_file(name: str, path: str | os.PathLike[str]) -> OutputFile:
    """A byte-for-byte copy of a file, whatever is in it.

    If `path` ends with `name`, it lies in the folder before that, else in its own.  A small file is read now.  Raises
    FileError if it is no readable file, or a link that leads out of that folder: an output may be shown to others.
    """
    parts = Path(name).parts
    nested = len(parts) if Path(path).parts[-len(parts) :] == parts else 1
    check_inside(path, Path(os.path.abspath(path)).parents[nested - 1])
    file = File(path)
    if file.size <= SMALL:
        return text_file(name, file.read(0, file.size))
    return OutputFile(relative(name), file.size, regions=(Region(name, Extent(file, 0, (file.size,), "uint8"), 0),))


def relative(name: str) -> str:
    """`name` if it is a path below the output folder: plain parts joined by "/".  Raises LayoutError if not."""
    plain = all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in name.split("/"))
    if not plain or "\0" in name or "\\" in name:
        raise LayoutError(f"{show(name)} cannot be the name of an output file")
    return name
