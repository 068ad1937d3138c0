"""Tools that build broken files byte by byte: a pickle assembler, a zip writer that can lie, and the Case record.

body = d((u("w"), tensor(storage("0", 8), 0, (8,), (1,))))
torch_zip(body, {"0": FLOATS})
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.containers import open_tensors

VALUES = [float(i) for i in range(8)]
FLOATS = struct.pack("<8f", *VALUES)


def read_tensors(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Values of every tensor as nested lists, and the names that pickles mention."""
    table = open_tensors(path)
    return {name: lazy.full().tolist() for name, lazy in table.items()}, table.globals


@dataclass(frozen=True)
class Case:
    """refused: what the error must say (a regular expression); None: the file must be read as `values`."""

    name: str
    make: Callable[[Path], Path]
    refused: str | None = None
    values: Any = field(default_factory=lambda: {"w": VALUES})
    globals: tuple[str, ...] = ()
    read: Callable[[Path], Any] = read_tensors
    bomb: bool = False  # is also run under a memory limit


def file_case(name: str, data: bytes | Callable[[Path], bytes], refused: str | None = None, **more: Any) -> Case:
    """A case of one file; `data` may depend on the marker's path."""
    suffix = more.pop("suffix", ".pt")

    def make(folder: Path) -> Path:
        path = folder / f"file{suffix}"
        path.write_bytes(data if isinstance(data, bytes) else data(folder / "marker"))
        return path

    return Case(name, make, refused, **more)


# ---- pickles: every function returns opcodes that push one value


def u(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def b(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def i(value: int) -> bytes:
    if 0 <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(raw)) + raw


def f(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


def g(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def g4(module: str, name: str) -> bytes:
    """Protocol 4's spelling, whose names may hold dots."""
    return u(module) + u(name) + b"\x93"


def t(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def ints(values: tuple[int, ...]) -> bytes:
    return t(*map(i, values))


def l(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def d(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def call(fn: bytes, *args: bytes) -> bytes:
    return fn + t(*args) + b"R"


NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"


def pkl(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def storage(key: str, numel: int, cls: str = "torch.FloatStorage") -> bytes:
    return t(u("storage"), g(cls), u(key), u("cpu"), i(numel)) + b"Q"


def tensor(where: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    return raw_tensor(where, i(offset), ints(shape), ints(strides))


def raw_tensor(where: bytes, offset: bytes, shape: bytes, strides: bytes, *more: bytes) -> bytes:
    hooks = call(g("collections.OrderedDict"))
    return call(g("torch._utils._rebuild_tensor_v2"), where, offset, shape, strides, FALSE, hooks, *more)


WEIGHT = tensor(storage("0", 8), 0, (8,), (1,))


def weights(*more: tuple[bytes, bytes]) -> bytes:
    """{"w": the good weights, ...}"""
    return d((u("w"), WEIGHT), *more)


# ---- zip archives


@dataclass
class Member:
    """A zip member and the lies told about it; None means the truth."""

    name: str
    data: bytes
    local_name: str | None = None
    method: int = 0
    flags: int = 0
    crc: int | None = None
    packed: int | None = None
    size: int | None = None
    header: int | None = None
    local_extra: bytes = b""
    extra: bytes = b""
    attributes: int = 0
    signature: bytes = b"PK\3\4"


def zip_archive(members: list[Member], *, prefix: bytes = b"", comment: bytes = b"", **end: Any) -> bytes:
    """An archive; keywords replace fields of the end record: count, size, start, disk, comment_size."""
    out, directory = bytearray(prefix), bytearray()
    for m in members:
        at = len(out)
        crc = zlib.crc32(m.data) if m.crc is None else m.crc
        size = len(m.data) if m.size is None else m.size
        packed = len(m.data) if m.packed is None else m.packed
        local = (m.name if m.local_name is None else m.local_name).encode()
        sizes = (crc, min(packed, 0xFFFFFFFF), min(size, 0xFFFFFFFF))
        head = struct.pack("<4sHHHHH", m.signature, 20, m.flags, m.method, 0, 0)
        out += head + struct.pack("<LLLHH", *sizes, len(local), len(m.local_extra)) + local + m.local_extra + m.data
        name = m.name.encode()
        directory += struct.pack("<4sHHHHHH", b"PK\1\2", 20, 20, m.flags, m.method, 0, 0)
        directory += struct.pack("<LLLHHHHHLL", *sizes, len(name), len(m.extra), 0, 0, 0, m.attributes,
                                 at if m.header is None else m.header)  # fmt: skip
        directory += name + m.extra
    count = end.get("count", len(members))
    fields = (end.get("disk", 0), 0, count, count, end.get("size", len(directory)), end.get("start", len(out)))
    tail = struct.pack("<4s4H2LH", b"PK\5\6", *fields, end.get("comment_size", len(comment)))
    return bytes(out + directory + end.get("before_end", b"") + tail + comment)


def torch_members(body: bytes, storages: Mapping[str, bytes] | None = None, protocol: int = 2) -> list[Member]:
    stores = {"0": FLOATS} if storages is None else storages
    members = [Member("a/data.pkl", pkl(body, protocol)), Member("a/version", b"3\n")]
    return members + [Member(f"a/data/{key}", data) for key, data in stores.items()]


def torch_zip(body: bytes, storages: Mapping[str, bytes] | None = None, protocol: int = 2) -> bytes:
    return zip_archive(torch_members(body, storages, protocol))


def raw_zip(pickle: bytes) -> bytes:
    """A torch zip around exactly this pickle."""
    return zip_archive([Member("a/data.pkl", pickle), Member("a/data/0", FLOATS)])


# ---- legacy streams


MAGIC = pkl(b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little"))
PROTOCOL = pkl(b"M" + struct.pack("<H", 1001))
SYS_INFO = pkl(d((u("little_endian"), TRUE)))


def legacy(
    body: bytes | None = None,
    *,
    magic: bytes = MAGIC,
    protocol: bytes = PROTOCOL,
    sys_info: bytes = SYS_INFO,
    keys: bytes | None = None,
    data: bytes = struct.pack("<q", 8) + FLOATS,
) -> bytes:
    body = weights() if body is None else body
    return magic + protocol + sys_info + pkl(body) + (pkl(l(u("0"))) if keys is None else keys) + data
