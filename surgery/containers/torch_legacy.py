"""Files of torch.save before 1.6 (and on request since): five pickles, then the storages one after the other.

    pt = TorchLegacy(File("consolidated.00.pth"))
    pt.root["tok_embeddings.weight"].full()

The pickles: a magic number, a protocol version, facts about the machine, the object, the storages' keys in order.
Per storage an int64 count of elements, then little-endian data.  Source: torch/serialization.py (_legacy_save).
"""

from __future__ import annotations

from surgery.containers.pickles.describe import Description, Truncated, describe
from surgery.containers.pickles.machine import Limits
from surgery.containers.torch_zip import Tree
from surgery.errors import FileError, show
from surgery.tensors.files import File

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_PARTS = ("magic", "protocol", "sys_info", "object", "keys")
_FIRST_WINDOW = 1 << 20
_GROWTH = 8


class TorchLegacy(Tree):
    """A whole file.  Raises FileError."""

    def __init__(self, file: File, limits: Limits | None = None) -> None:
        self.file = file
        found, keys, end = self._pickles(limits or Limits())
        self.root, self.globals, self.storages = found.root, found.globals, found.storages
        places = self._places(keys, end)
        for tensor in found.tensors:
            tensor.place(file, places[tensor.storage.key], False)

    def _pickles(self, limits: Limits) -> tuple[Description, object, int]:
        """The described object, the list of keys, and where the data begin."""
        window = _FIRST_WINDOW  # nothing says how long the pickles are
        while True:
            size = min(window, self.file.size, limits.pickle_bytes)
            data = self.file.read(0, size, "pickles")
            try:
                return self._parse(data, limits)
            except Truncated as error:
                if size == self.file.size:
                    raise
                if size == limits.pickle_bytes:
                    what = f"its pickles are longer than the limit of {size} bytes"
                    raise FileError(what, file=self.file.path, byte=error.byte) from None
                window *= _GROWTH

    def _parse(self, data: bytes, limits: Limits) -> tuple[Description, object, int]:
        at, found = 0, []
        for part in _PARTS:
            begin, objects = at, part == "object"
            found.append(describe(data, file=self.file.path, member=part, start=at, storages=objects, limits=limits))
            at, root = found[-1].end, found[-1].root
            if part == "magic" and (type(root) is not int or root != MAGIC):
                raise FileError("is no file of torch.save: the magic number is missing", file=self.file.path, byte=0)
            if part == "protocol" and (type(root) is not int or root != PROTOCOL):
                raise FileError(f"unknown legacy protocol {show(root)}", file=self.file.path, byte=begin)
        names = sorted({name for part in found for name in part.globals})
        body = found[3]
        described = Description(body.root, names, body.storages, body.tensors, body.end)
        return described, found[4].root, at

    def _error(self, what: str, at: int, hint: str | None = None) -> FileError:
        return FileError(what, file=self.file.path, byte=at, hint=hint)

    def _places(self, keys: object, at: int) -> dict[str, int]:
        """Storage key -> byte of its first element."""
        if not isinstance(keys, list) or any(type(k) not in (str, int) for k in keys):
            raise self._error("the list of storage keys is malformed", at)
        places: dict[str, int] = {}
        for raw in keys:
            key = raw if isinstance(raw, str) else show(raw)
            storage = self.storages.get(key)
            if storage is None or key in places:
                raise self._error(f"storage {show(key)} is listed twice or never used", at)
            elements = int.from_bytes(self.file.read(at, 8, f"size of storage {show(key)}"), "little", signed=True)
            if elements != storage.numel:
                what = f"storage {show(key)} has {elements} elements here but {storage.numel} in the pickle"
                raise self._error(what, at)
            self.file.check(at + 8, storage.nbytes, f"storage {show(key)}")
            places[key] = at + 8
            at += 8 + storage.nbytes
        if len(places) != len(self.storages):
            missing = next(key for key in self.storages if key not in places)
            raise self._error(f"storage {show(missing)} has no data", at)
        if at != self.file.size:
            raise self._error(f"{self.file.size - at} unexplained bytes after the last storage", at)
        return places
