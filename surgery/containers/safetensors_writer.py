"""Plans a safetensors file: a JSON header padded with blanks, then the tensors without a hole between them.

    safetensors_file("model-00001-of-00002.safetensors", {"lm_head.weight": lazy})

Format: https://huggingface.co/docs/safetensors ("Format"); the header's length is a little-endian uint64.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

from surgery.containers.output import OutputFile, Region, relative
from surgery.errors import LayoutError, show
from surgery.tensors.lazy import ITEMSIZE, Lazy

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64",
}  # fmt: skip
ALIGN = 64  # of the first tensor in the file
MAX_HEADER = 100_000_000  # bytes; readers refuse more
METADATA = {"format": "pt"}  # without it transformers refuses the file


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
        if tensor.dtype not in DTYPES or key == "__metadata__":
            what = (
                f"dtype {tensor.dtype} of tensor {show(key)}" if key != "__metadata__" else "tensor name __metadata__"
            )
            raise LayoutError(f"{name}: safetensors has no {what}", hint="choose another dtype or target format")
        offsets = [at, at + tensor.nbytes]
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        placed.append((key, tensor, at))
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    if len(text) > MAX_HEADER:
        raise LayoutError(f"{name}: a header of {len(text)} bytes is over the format's limit of {MAX_HEADER}")
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
