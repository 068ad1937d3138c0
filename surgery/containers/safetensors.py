"""safetensors files: a JSON header and tensors without holes.

    st = Safetensors(File("model.safetensors"))
    st.tensors["model.embed_tokens.weight"].shape
    safetensors_file("model.safetensors", {"lm_head.weight": lazy})      # plans one

Own header parsing, stricter than the library's: duplicate names, holes, overlaps and trailing bytes are errors.
Source of the format: github.com/huggingface/safetensors, README "Format"; the header's length is a little-endian
uint64, its text is padded with blanks.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.containers.output import OutputFile, Region, relative
from surgery.containers.text import ENTRIES, parse_json
from surgery.errors import FileError, LayoutError, show
from surgery.tensors.extent import Extent
from surgery.tensors.files import File
from surgery.tensors.lazy import ITEMSIZE, Lazy

HEADER_LIMIT = 100_000_000
TENSORS = 400_000  # of one file: the largest models have half as many in all of theirs
DIMENSIONS = 12  # entries of the header for a tensor of eight dimensions
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items() if not code.endswith("FNUZ")}  # those that are written
_FIELDS = {"dtype", "shape", "data_offsets"}
ALIGN = 64  # of the first tensor in a file that is written
METADATA = {"format": "pt"}  # without it transformers refuses the file


class Safetensors:
    """`tensors` in the order of their bytes, and `metadata`, the header's `__metadata__`.  Raises FileError."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.globals: list[str] = []
        header, self._data = self._header()
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(type(text) is not str for text in metadata.values()):
            raise self._error("__metadata__ is not a map of text to text")
        self.metadata: dict[str, str] = metadata
        self.tensors: dict[str, Extent] = {}
        entries = [(*self._entry(name, entry), name) for name, entry in header.items()]
        entries.sort(key=lambda entry: entry[:2])
        at = 0
        for start, stop, dtype, shape, name in entries:
            if start != at:
                what = f"tensor {show(name)} begins at {show(start)}, not at {show(at)}: a hole or an overlap"
                raise self._error(what, self._data + at)
            self.tensors[name] = Extent(file, self._data + start, shape, dtype)
            at = stop
        if self._data + at != file.size:
            raise self._error(f"the header describes {self._data + at} bytes, the file has {file.size}", file.size)

    def _error(self, what: str, at: int = 8, hint: str | None = None) -> FileError:
        return FileError(what, file=self.file.path, byte=at, hint=hint)

    @property
    def paths(self) -> list[Path]:
        return [Path(self.file.path)]

    @property
    def entries(self) -> dict[str, Extent]:
        return self.tensors

    def _header(self) -> tuple[dict[str, Any], int]:
        """The parsed header, and where the tensors' bytes begin"""
        size = int.from_bytes(self.file.read(0, 8, "safetensors header"), "little")
        if size > HEADER_LIMIT:
            raise self._error(f"a header of {size} bytes is over the limit of {HEADER_LIMIT}", 0)
        raw = self.file.read(8, size, "safetensors header")
        if raw[:1] != b"{":
            raise self._error("the header does not begin with '{'")
        entries = ENTRIES + DIMENSIONS * min(raw.count(b"data_offsets"), TENSORS)
        header = parse_json(raw, self.file.path, "the safetensors header", 8, entries)
        assert isinstance(header, dict)
        return header, 8 + size

    def _entry(self, name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
        """(start, stop, dtype, shape) of a tensor"""
        if not isinstance(entry, dict) or entry.keys() != _FIELDS:
            raise self._error(f"the entry of {show(name)} is malformed")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            hint = "supported: " + ", ".join(sorted(DTYPES))
            raise self._error(f"tensor {show(name)} has the unknown dtype {show(entry['dtype'])}", hint=hint)
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 64:
            raise self._error(f"the shape or data_offsets of {show(name)} are malformed")
        start, stop = offsets
        need = math.prod(shape) * ITEMSIZE[dtype]
        if stop - start != need:
            what = f"tensor {show(name)} of {need} bytes" if need < 1 << 63 else f"tensor {show(name)}"
            raise self._error(f"{what} lies in data_offsets of {stop - start} bytes")
        if self._data + stop > self.file.size:
            self.file.check(self._data + start, need, f"tensor {show(name)}")
        return start, stop, dtype, tuple(shape)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


# ------------------------------------------------------------------------------------------------------- writing


def safetensors_file(
    name: str,
    tensors: Mapping[str, Lazy],
    metadata: Mapping[str, str] = METADATA,
    copies: frozenset[str] = frozenset(),
) -> OutputFile:
    """A file that holds `tensors` in the given order; names in `copies` are replicas (see Region).

    Wider elements come first where the given order would leave an element unaligned.  Raises LayoutError for a
    dtype or a name that the format does not have.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, placed = 0, []
    for key in _ordered(tensors):
        tensor = tensors[key]
        if tensor.dtype not in CODES or key == "__metadata__":
            what = (
                f"dtype {tensor.dtype} of tensor {show(key)}" if key != "__metadata__" else "tensor name __metadata__"
            )
            raise LayoutError(f"{name}: safetensors has no {what}", hint="choose another dtype or target format")
        offsets = [at, at + tensor.nbytes]
        header[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        placed.append((key, tensor, at))
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    if len(text) > HEADER_LIMIT:
        raise LayoutError(f"{name}: a header of {len(text)} bytes is over the format's limit of {HEADER_LIMIT}")
    head = struct.pack("<Q", len(text)) + text
    regions = tuple(Region(key, tensor, len(head) + at, key in copies) for key, tensor, at in placed)
    return OutputFile(relative(name), len(head) + at, head, regions)


def _ordered(tensors: Mapping[str, Lazy]) -> list[str]:
    """The names as given if every tensor then lies at a multiple of its element size, else by size of elements."""
    at = 0
    for tensor in tensors.values():
        if at % ITEMSIZE[tensor.dtype]:
            return sorted(tensors, key=lambda k: -ITEMSIZE[tensors[k].dtype])
        at += tensor.nbytes
    return list(tensors)
