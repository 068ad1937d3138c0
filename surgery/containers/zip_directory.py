"""The directory of a torch zip archive, read strictly: where each member's bytes lie, and nothing left to chance.

    directory = ZipDirectory(File("model.pt"))
    directory.span("archive/data.pkl")          # (absolute offset, size)

The archive may be a part of a file (`base`, `length`), as in `.distcp` files.  Python's zipfile is no help: it
guesses offsets of prefixed archives, takes the last of two equal names, and refuses the wrong CRCs that torch
writes on request.  Members must be stored, unencrypted and unique, must not overlap, and local headers must agree
with the directory.  CRCs, attributes and flags are ignored, as torch ignores them.  Source: PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

from surgery.errors import FileError, show
from surgery.tensors.files import File

MEMBER_LIMIT = 1_000_000
DIRECTORY_LIMIT = 256 << 20
_END = struct.Struct("<4s4H2LH")
_END64_AT = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s4B4HL2L5H2L")
_TOLD_IN_EXTRA = 0xFFFFFFFF
_ENCRYPTED = 0x2041  # bits 0, 6, 13: traditional, strong, masked headers


@dataclass(frozen=True)
class Member:
    """One file of the archive: header offset, stored size, real size, compression method, where the next begins."""

    name: str
    header: int
    packed: int
    size: int
    method: int


class ZipDirectory:
    """`members` by name, of the archive in bytes [base, base + length) of `file`.  Raises FileError."""

    def __init__(self, file: File, base: int = 0, length: int | None = None) -> None:
        self.file, self.base = file, base
        self.length = file.size - base if length is None else length
        file.check(base, self.length, "zip archive")
        self.members: dict[str, Member] = {}
        start, size, count = self._end_record()
        self.ends: dict[str, int] = {}  # where the next header begins
        self._entries(start, size, count)
        self._no_overlaps(start)

    def error(self, what: str, at: int | None = None, hint: str | None = None) -> FileError:
        """A FileError at byte `at` of the archive."""
        return FileError(what, file=self.file.path, byte=None if at is None else self.base + at, hint=hint)

    def span(self, name: str) -> tuple[int, int]:
        """(offset in the file, size) of a member's bytes, after checking its local header."""
        m = self.members[name]
        if m.method != 0 or m.packed != m.size:
            raise self.error(
                f"zip member {show(name)} is compressed (method {m.method})",
                m.header,
                "torch.save stores members uncompressed; unpack the archive and pack it again with zip -0",
            )
        raw = name.encode()
        head = self.file.read(self.base + m.header, 30 + len(raw), "zip local header")
        if head[:4] != b"PK\3\4":
            raise self.error(f"zip local header of {show(name)} is missing", m.header)
        name_size, extra_size = struct.unpack_from("<HH", head, 26)
        if name_size != len(raw) or head[30:] != raw:
            raise self.error(f"zip local header names another file than the directory, {show(name)}", m.header)
        # the data begin after the local extra field, with which torch aligns them; the directory's may differ
        at = m.header + 30 + name_size + extra_size
        if at + m.size > self.ends[name]:
            raise self.error(f"zip member {show(name)} reaches into what follows it", at)
        return self.base + at, m.size

    def _end_record(self) -> tuple[int, int, int]:
        """(offset, size, entries) of the directory"""
        if self.length < _END.size:
            raise self.error(f"{self.length} bytes are too few for a zip archive", 0)
        for tail_size in (_END.size, min(self.length, _END.size + 0xFFFF)):  # without a comment, as torch; with one
            tail_at = self.length - tail_size
            tail = self.file.read(self.base + tail_at, tail_size, "zip end record")
            found = [at for at in _find_all(tail, b"PK\5\6") if _ends_exactly(tail, at)]
            if found:
                break
        else:
            hint = "the file is truncated (an incomplete download or copy); copy or download it again"
            raise self.error("the end record of the zip archive is missing", self.length, hint)
        if len(found) > 1:
            raise self.error("two possible zip end records", tail_at + found[1], "torch.save never writes this")
        end = tail_at + found[0]
        _, disk, first_disk, here, count, size, start, _ = _END.unpack_from(tail, found[0])
        if end >= _END64_AT.size:
            locator = self.file.read(self.base + end - _END64_AT.size, _END64_AT.size, "zip64 locator")
            if locator[:4] == b"PK\6\7":
                end, fields = self._end_record64(end - _END64_AT.size, locator)
                disk, first_disk, here, count, size, start = fields
        if disk or first_disk or here != count:
            raise self.error("a zip archive of several volumes", end)
        if start + size != end:
            raise self.error(
                f"the zip directory ends at {start + size} but its end record is at {end}",
                end,
                "bytes were added or removed: a prefix, a second archive, or a truncation",
            )
        if count > MEMBER_LIMIT or size > DIRECTORY_LIMIT or size < count * _ENTRY.size:
            raise self.error(f"a zip directory of {size} bytes cannot hold {count} members", start)
        return start, size, count

    def _end_record64(self, locator_at: int, locator: bytes) -> tuple[int, tuple[int, ...]]:
        _, _, at, _ = _END64_AT.unpack(locator)
        if at + _END64.size > locator_at:
            raise self.error(f"the zip64 end record is said to lie at {at}, past its locator", locator_at)
        record = self.file.read(self.base + at, _END64.size, "zip64 end record")
        if record[:4] != b"PK\6\6":
            raise self.error("the zip64 end record is missing", at)
        _, size, _, _, *fields = _END64.unpack(record)
        if at + 12 + size != locator_at:
            raise self.error(f"the zip64 end record of {show(size)} bytes does not end at its locator", at)
        return at, tuple(fields)

    def _entries(self, start: int, size: int, count: int) -> None:
        raw = self.file.read(self.base + start, size, "zip directory")
        at = 0
        for _ in range(count):
            if at + _ENTRY.size > size or raw[at : at + 4] != b"PK\1\2":
                raise self.error("a zip directory entry is damaged", start + at)
            at = self._entry(raw, at, start)
        if at != size:
            raise self.error(f"{size - at} unexplained bytes in the zip directory", start + at)

    def _entry(self, raw: bytes, at: int, start: int) -> int:
        (flags, method) = struct.unpack_from("<HH", raw, at + 8)
        packed, size, name_size, extra_size, comment_size, disk, _, _, header = struct.unpack_from(
            "<LLHHHHHLL", raw, at + 20
        )
        name_at = at + _ENTRY.size
        extra_at = name_at + name_size
        end: int = extra_at + extra_size + comment_size
        if end > len(raw):
            raise self.error("a zip directory entry is damaged", start + at)
        try:
            name = raw[name_at:extra_at].decode()
        except UnicodeDecodeError:
            raise self.error("the name of a zip member is not UTF-8", start + at) from None
        if _TOLD_IN_EXTRA in (packed, size, header):
            extra = raw[extra_at : extra_at + extra_size]
            try:
                size, packed, header = _zip64(extra, (size, packed, header))
            except ValueError:
                raise self.error(f"the zip64 field of {show(name)} is damaged", start + at) from None
        if flags & _ENCRYPTED:
            raise self.error(f"zip member {show(name)} is encrypted", start + at)
        if name in self.members:
            hint = "readers disagree on which one counts; torch.save never writes this"
            raise self.error(f"zip member {show(name)} appears twice", start + at, hint)
        if disk or header + 30 + name_size + packed > start:
            raise self.error(f"zip member {show(name)} lies outside the archive", start + at)
        self.members[name] = Member(name, header, packed, size, method)
        return end

    def _no_overlaps(self, directory: int) -> None:
        ordered = sorted(self.members.values(), key=lambda m: m.header)
        for m, after in itertools.pairwise(ordered):
            self.ends[m.name] = after.header
            if m.header + 30 + len(m.name.encode()) + m.packed > after.header:
                raise self.error(f"zip members {show(m.name)} and {show(after.name)} overlap", after.header)
        if ordered:
            self.ends[ordered[-1].name] = directory


def _find_all(data: bytes, what: bytes) -> list[int]:
    found, at = [], data.find(what)
    while at >= 0:
        found.append(at)
        at = data.find(what, at + 1)
    return found


def _ends_exactly(tail: bytes, at: int) -> bool:
    """Whether an end record at `at` and its comment end where the archive ends."""
    return at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[7] == len(tail)


def _zip64(extra: bytes, fields: tuple[int, int, int]) -> list[int]:
    """The fields, those that did not fit replaced by the 64-bit ones, in this order.  Raises ValueError."""
    at = 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            values = iter(struct.unpack_from(f"<{min(size, len(extra) - at - 4) // 8}Q", extra, at + 4))
            out = [next(values, None) if field == _TOLD_IN_EXTRA else field for field in fields]
            if None in out:
                raise ValueError
            return out  # type: ignore[return-value]
        at += 4 + size
    raise ValueError
