"""Files of torch.save since 1.6: a zip archive of one described pickle and one member per storage.

    pt = TorchZip(File("model.pt"))
    pt.root["model"]["embed.weight"]        # a lazy Extent; nothing has been read or executed yet
    pt.tensors["model.embed.weight"].full()

Source of the layout: torch/serialization.py and caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.containers.pickles.describe import describe
from surgery.containers.pickles.machine import Limits
from surgery.containers.pickles.records import Storage, flatten
from surgery.containers.zip_directory import ZipDirectory
from surgery.errors import FileError, show
from surgery.tensors.extent import Extent
from surgery.tensors.files import File
from surgery.tensors.lazy import ITEMSIZE, Lazy


class Tree:
    """What both kinds of torch files have in common: `root`, `globals`, `storages`, and `tensors` by dotted path."""

    file: File
    root: Any
    globals: list[str]
    storages: dict[str, Storage]

    @property
    def paths(self) -> list[Path]:
        return [Path(self.file.path)]

    @property
    def entries(self) -> Any:
        return self.root

    @cached_property
    def leaves(self) -> dict[str, Any]:
        """Every leaf below dicts, lists and tuples, by dotted path.  Raises FileError if two share a path."""
        out: dict[str, Any] = {}
        try:
            for path, leaf in flatten(self.root):
                if path in out:
                    raise ValueError(f"two entries have the path {show(path)}")
                out[path] = leaf
        except ValueError as error:
            raise FileError(str(error), file=self.file.path) from None
        return out

    @cached_property
    def tensors(self) -> dict[str, Lazy]:
        """The plain tensors by dotted path; a tensor under two names is listed twice, as one object."""
        return {path: leaf for path, leaf in self.leaves.items() if isinstance(leaf, Extent)}


class TorchZip(Tree):
    """The archive in bytes [base, base + length) of `file`.  Raises FileError."""

    def __init__(self, file: File, base: int = 0, length: int | None = None, limits: Limits | None = None) -> None:
        self.file = file
        self.zip = ZipDirectory(file, base, length)
        self.prefix, member = self._pickle_member()
        self.swap = self._big_endian()
        offset, size = self.zip.span(member)
        limits = limits or Limits()
        if size > limits.pickle_bytes:
            raise FileError(f"a pickle of {size} bytes is over the limit", file=file.path, member=member, byte=offset)
        found = describe(file.read(offset, size, "data.pkl"), file=file.path, member=member, base=offset, limits=limits)
        if found.end != size:
            what = f"{size - found.end} unexplained bytes after the pickle"
            raise FileError(what, file=file.path, member=member, byte=offset + found.end)
        self.root, self.globals, self.storages = found.root, found.globals, found.storages
        places = {key: self._place(storage) for key, storage in self.storages.items()}
        for tensor in found.tensors:
            tensor.place(file, places[tensor.storage.key], self.swap)

    def _pickle_member(self) -> tuple[str, str]:
        """(prefix of all members, name of the pickle)"""
        found = [m for m in self.zip.members if m == "data.pkl" or (m.endswith("/data.pkl") and m.count("/") == 1)]
        if len(found) != 1:
            hint = "this archive is not from torch.save" if not found else "the file is ambiguous"
            raise FileError(
                f"the zip archive has {len(found)} members data.pkl, expected one", file=self.file.path, hint=hint
            )
        prefix = found[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in self.zip.members:
            hint = "save its state_dict() with torch.save, in an environment where you trust the program"
            raise FileError("is a TorchScript program, not a checkpoint", file=self.file.path, hint=hint)
        return prefix, found[0]

    def _big_endian(self) -> bool:
        name = f"{self.prefix}byteorder"
        if name not in self.zip.members:
            return False
        offset, size = self.zip.span(name)
        order = self.file.read(offset, min(size, 16), "byte order")
        if order not in (b"little", b"big"):
            raise FileError(f"unknown byte order {show(order)}", file=self.file.path, member=name, byte=offset)
        return order == b"big"

    def _place(self, storage: Storage) -> int:
        """Where the first byte of a storage lies, after checking that its member has the storage's size."""
        name = f"{self.prefix}data/{storage.key}"
        member = self.zip.members.get(name)
        if member is None:
            raise FileError(
                f"storage {show(storage.key)} is named in the pickle but there is no member {show(name)}",
                file=self.file.path,
                hint="the file was saved without its data (skip_data), or is damaged",
            )
        offset, size = self.zip.span(name)
        if not 0 <= size - storage.nbytes < ITEMSIZE[storage.dtype]:
            raise FileError(
                f"storage {show(storage.key)} is declared as {storage.numel} elements of {storage.dtype}, "
                f"{storage.nbytes} bytes, but its member has {size} bytes",
                file=self.file.path,
                member=name,
                byte=offset,
            )
        return offset
