"""Plans a file as `torch.save` writes it: a stored zip archive of a pickle and one member per tensor.

    torch_file("consolidated.00.pth", {"tok_embeddings.weight": lazy, "step": 7})

The tensors' bytes begin at multiples of 64, so that the file can be mapped.  Headers and directory hold the CRCs,
which are known when the tensors are written; their sizes are known before.  Sizes and offsets of 4 GiB and more, and
more than 65,535 members, take the zip64 forms.  Sources: the zip specification (APPNOTE 6.3.10, sections 4.3 to 4.5),
torch/csrc/serialize/inline_container.cc (members, names, padding field "FB").
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from surgery.containers.output import Literal, OutputFile, Region, relative
from surgery.containers.pickles.pickler import Record, pickle_tree

__all__ = ["Record", "torch_file"]

ALIGN = 64
MAX32, MAX16 = 0xFFFFFFFF, 0xFFFF
STORED, VERSION, VERSION64 = 0, 20, 45
UTF8 = 0x0800
DATE_1980 = 0x21  # the earliest that the format knows; files do not depend on the time of day


@dataclass(frozen=True)
class Member:
    """A stored file of an archive: its local header at `header`, its bytes at `start`."""

    name: bytes
    header: int
    start: int
    size: int

    @property
    def is_big(self) -> bool:
        return self.size >= MAX32


def torch_file(name: str, tree: Any, copies: frozenset[str] = frozenset()) -> OutputFile:
    """A file that `torch.load(weights_only=True)` reads as `tree`, with or without mmap.

    tree    nested dict, OrderedDict, list, tuple, str, int, float, bool, None, bytes, Record and Lazy; a Lazy that
            occurs twice is stored once
    copies  dotted paths of tensors that are replicas (see Region)

    Raises LayoutError for values that have no place in such a file.
    """
    pickled, tensors = pickle_tree(tree)
    root = PurePosixPath(name).stem or "archive"
    small = {"data.pkl": pickled, ".format_version": b"1", ".storage_alignment": b"%d" % ALIGN, "byteorder": b"little"}
    last = {"version": b"3\n"}
    sizes = {k: len(v) for k, v in small.items()}
    sizes |= {f"data/{i}": t.nbytes for i, t in enumerate(tensors)} | {k: len(v) for k, v in last.items()}
    members = _place(root, sizes)
    known = dict(zip(sizes, members, strict=True))
    paths = _paths(tree)
    regions = tuple(
        Region(paths[id(t)], t, known[f"data/{i}"].start, paths[id(t)] in copies) for i, t in enumerate(tensors)
    )
    literals = {known[key].start: data for key, data in (small | last).items()}
    tail = _tail(members, literals, {r.offset: i for i, r in enumerate(regions) if r.tensor.nbytes})
    return OutputFile(relative(name), _size(members), b"", regions, tail)


def _size(members: Sequence[Member]) -> int:
    """Bytes of the whole archive: the directory follows the last member."""
    at = members[-1].start + members[-1].size
    entries = sum(46 + len(m.name) + _extra(m) for m in members)
    return at + entries + len(_end(len(members), at, entries))


def _extra(m: Member) -> int:
    """Bytes of the 64-bit fields of a directory entry."""
    fields = 2 * m.is_big + (m.header >= MAX32)
    return 4 + 8 * fields if fields else 0


def _place(root: str, sizes: dict[str, int]) -> list[Member]:
    """Members one after the other, the bytes of each at a multiple of ALIGN."""
    members, at = [], 0
    for key, size in sizes.items():
        name = f"{root}/{key}".encode()
        fixed = at + 30 + len(name) + (20 if size >= MAX32 else 0) + 4  # 4: the padding field's own head
        members.append(Member(name, at, fixed + -fixed % ALIGN, size))
        at = members[-1].start + size
    return members


def _tail(
    members: Sequence[Member], literals: dict[int, bytes], regions: dict[int, int]
) -> Callable[[Sequence[int]], list[Literal]]:
    """All bytes of the archive that are no tensor's, once the tensors' CRCs are known."""

    def tail(crcs: Sequence[int]) -> list[Literal]:
        return list(_bytes(members, literals, regions, crcs))

    return tail


def _bytes(
    members: Sequence[Member], literals: dict[int, bytes], regions: dict[int, int], crcs: Sequence[int]
) -> Iterator[Literal]:
    central = b""
    parts = []
    for m in members:
        crc = crcs[regions[m.start]] if m.start in regions and m.size else 0
        if m.size and m.start in literals:
            crc = zlib.crc32(literals[m.start])
            yield m.start, literals[m.start]
        yield m.header, _local_header(m, crc)
        parts.append(_central_header(m, crc))
    central = b"".join(parts)
    at = members[-1].start + members[-1].size
    yield at, central + _end(len(members), at, len(central))


def _local_header(m: Member, crc: int) -> bytes:
    size = MAX32 if m.is_big else m.size
    extra = struct.pack("<HHQQ", 1, 16, m.size, m.size) if m.is_big else b""
    gap = m.start - m.header - 30 - len(m.name) - len(extra) - 4
    extra += struct.pack("<2sH", b"FB", gap) + b"Z" * gap
    version = VERSION64 if m.is_big else VERSION
    head = (0x04034B50, version, UTF8, STORED, 0, DATE_1980, crc, size, size, len(m.name), len(extra))
    return struct.pack("<IHHHHHIIIHH", *head) + m.name + extra


def _central_header(m: Member, crc: int) -> bytes:
    """The 64-bit fields stand in the extra field in the order size, compressed size, offset, as far as needed."""
    far = m.header >= MAX32
    wide = [m.size, m.size] * m.is_big + [m.header] * far
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, at, version = MAX32 if m.is_big else m.size, MAX32 if far else m.header, VERSION64 if wide else VERSION
    head = (0x02014B50, version, version, UTF8, STORED, 0, DATE_1980, crc, size, size, len(m.name), len(extra))
    return struct.pack("<IHHHHHHIIIHHHHHII", *head, 0, 0, 0, 0, at) + m.name + extra


def _end(count: int, at: int, size: int) -> bytes:
    """End of the central directory, in the zip64 form too if a number does not fit."""
    out = b""
    if count >= MAX16 or at >= MAX32 or size >= MAX32:
        out += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, VERSION64, VERSION64, 0, 0, count, count, size, at)
        out += struct.pack("<IIQI", 0x07064B50, 0, at + size, 1)
    count, size, at = min(count, MAX16), min(size, MAX32), min(at, MAX32)
    return out + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, size, at, 0)


def _paths(tree: Any) -> dict[int, str]:
    """id of every tensor in the tree -> the dotted path at which it is met first."""
    found: dict[int, str] = {}
    seen: set[int] = set()

    def visit(node: Any, path: str) -> None:
        if isinstance(node, Record):
            visit(node.args or (), path)
            visit(node.state, path)
        elif isinstance(node, (dict, list, tuple)) and id(node) not in seen:
            seen.add(id(node))
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                visit(child, f"{path}.{key}" if path else str(key))
        elif not isinstance(node, (dict, list, tuple)):
            found.setdefault(id(node), path)

    visit(tree, "")
    return found
