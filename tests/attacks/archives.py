"""Zip archives and legacy streams whose structure lies, and files that are no checkpoint at all."""

# ruff: noqa: E501  (tables of cases, one a line)
from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from attacks.build import (
    FLOATS,
    MAGIC,
    NONE,
    PROTOCOL,
    SYS_INFO,
    Case,
    Member,
    d,
    file_case,
    i,
    l,
    legacy,
    pkl,
    storage,
    tensor,
    torch_members,
    torch_zip,
    u,
    weights,
    zip_archive,
)

GOOD = torch_zip(weights())
MEMBERS = torch_members(weights())


def lie(name: str, refused: str | None, index: int = 2, **fields: object) -> Case:
    """The good archive with one member's fields replaced; member 2 is a/data/0."""
    members = [replace(m, **fields) if k == index else m for k, m in enumerate(MEMBERS)]
    return file_case(f"zip {name}", zip_archive(members), refused)


def more(name: str, refused: str | None, *extra: Member, **end: object) -> Case:
    return file_case(f"zip {name}", zip_archive([*MEMBERS, *extra], **end), refused)


def deflated(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for m in MEMBERS:
            kind = zipfile.ZIP_DEFLATED if m.name.endswith(name) else zipfile.ZIP_STORED
            archive.writestr(m.name, m.data, kind)
    return out.getvalue()


def zip64(offset: int | None = None, start: int | None = None, record_size: int = 44) -> bytes:
    """The good archive with a zip64 end record"""
    plain = zip_archive(MEMBERS)
    _, _, _, here, count, size, begin, _ = struct.unpack("<4s4H2LH", plain[-22:])
    end = len(plain) - 22
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", record_size, 45, 45, 0, 0, here, count, size,
                         begin if start is None else start)  # fmt: skip
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end if offset is None else offset, 1)
    return (
        plain[:end] + record + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
    )


def zip64_member(*values: int) -> bytes:
    """The weight's directory entry sends readers to its zip64 field for both sizes and the offset."""
    extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)
    member = replace(MEMBERS[2], extra=extra, header=0xFFFFFFFF, packed=0xFFFFFFFF, size=0xFFFFFFFF)
    return zip_archive([*MEMBERS[:2], member])


HEADER_OF_WEIGHT = sum(30 + len(m.name) + len(m.data) for m in MEMBERS[:2])

ZIPS = [
    more("honest", None),
    more("honest with comment", None, comment=b"saved on a tuesday"),
    more("honest with other members", None, Member("a/.data/serialization_id", b"7"), Member("a/byteorder", b"little")),
    file_case("zip honest zip64", zip64()),
    file_case("zip honest zip64 member", zip64_member(32, 32, HEADER_OF_WEIGHT)),
    lie("aligned by extra", None, local_extra=struct.pack("<HH20s", 0x4246, 20, b"Z" * 20)),
    lie("directory attribute", None, attributes=0x10),
    lie("unix directory attribute", None, attributes=0o040755 << 16),
    lie("data descriptor flag", None, flags=8),
    *(file_case(f"zip cut at {cut}", GOOD[:cut], "end record|outside the file") for cut in (30, 100, len(GOOD) - 1)),
    file_case("zip cut at 4", GOOD[:4], "too few"),
    file_case("zip prefix", b"PK\3\4" + GOOD, "directory ends at"),
    file_case("zip prefix page", b"#!/bin/sh\n" + GOOD, "no checkpoint that surgery knows"),
    file_case("zip suffix", GOOD + b"\0", "end record of the zip archive is missing"),
    file_case("zip two archives", GOOD + GOOD, "directory ends at"),
    file_case("zip end record as comment", zip_archive(MEMBERS, comment=GOOD[-22:]), "directory ends at"),
    file_case("zip two end records", zip_archive(MEMBERS, comment=GOOD[-22:-2] + b"\1\0x"), "two possible zip end records"),
    file_case("zip bytes before the end", zip_archive(MEMBERS, before_end=b"hidden"), "directory ends at"),
    file_case("zip safetensors polyglot", struct.pack("<Q", 2) + b"{}" + GOOD, "describes 10 bytes"),
    more("member twice", "'a/data/0' appears twice", Member("a/data/0", b"\1" * 32)),
    more("pickle twice", "'a/data.pkl' appears twice", Member("a/data.pkl", pkl(NONE))),
    more("two pickles", "2 members data.pkl", Member("b/data.pkl", pkl(NONE))),
    file_case("zip no pickle", zip_archive(MEMBERS[1:]), "0 members data.pkl"),
    file_case("zip pickle too deep", zip_archive([Member("a/b/data.pkl", pkl(NONE))]), "0 members data.pkl"),
    file_case("zip prefix with control characters", zip_archive([Member("\x1b[2J\u202e/data.pkl", b"\xff")]),
              r"\\x1b\[2J\\u202e/data.pkl @ byte .*: unknown pickle opcode"),
    file_case("zip prefix of 60,000 characters", zip_archive([Member("a" * 60_000 + "/data.pkl", b"\xff")]), "unknown"),
    file_case("zip empty", zip_archive([]), "empty zip archive"),
    more("TorchScript", "TorchScript program", Member("a/constants.pkl", pkl(b")"))),
    file_case("zip data deflated", deflated("data/0"), r"'a/data/0' is compressed .method 8."),
    file_case("zip pickle deflated", deflated("data.pkl"), r"'a/data.pkl' is compressed"),
    file_case("zip deflate bomb", zip_archive([Member("a/data.pkl", zlib.compress(b"(" * (64 << 20), 9)[2:-4], method=8,
              size=64 << 20)]), "is compressed", bomb=True),
    lie("encrypted", "'a/data/0' is encrypted", flags=1),
    lie("strongly encrypted", "is encrypted", flags=0x41),
    lie("masked headers", "is encrypted", flags=0x2000),
    lie("stored under another method", "is compressed .method 99.", method=99),
    lie("size beyond the data", "is compressed|lies outside", size=64),
    lie("both sizes beyond the data", "lies outside the archive|reaches into", size=640, packed=640),
    lie("sizes shorter", "8 elements of float32, 32 bytes, but its member has 16", size=16, packed=16),
    lie("local name differs", "names another file", local_name="a/data/1"),
    lie("local name longer", "names another file|overlap|outside|reaches", local_name="a/data/00"),
    lie("local header missing", "local header of 'a/data/0' is missing", signature=b"XXXX"),
    lie("header offset past the end", "lies outside the archive", header=0xFFFFFF),
    lie("header inside another", "overlap|names another|missing", header=10),
    lie("header of the pickle", "overlap|names another", header=0),
    file_case("zip local extra reaches out", (lambda raw: raw[: HEADER_OF_WEIGHT + 28] + struct.pack("<H", 60)
              + raw[HEADER_OF_WEIGHT + 30 :])(GOOD), "reaches into what follows it"),
    more("count too small", "unexplained bytes in the zip directory", count=2),
    more("count too large", "entry is damaged|cannot hold", count=4),
    more("count enormous", "cannot hold 65000 members", count=65000),
    more("directory size lies", "directory ends at|damaged", size=10),
    more("directory start lies", "directory ends at", start=3),
    more("several volumes", "several volumes", disk=1),
    file_case("zip name not UTF-8", GOOD.replace(b"a/version", b"a/\xff\xfe\xfd\xfc\xfb\xfa\xf9"), "not UTF-8"),
    file_case("zip zip64 locator out of place", zip64(offset=1 << 40), "said to lie at"),
    file_case("zip zip64 record missing", zip64(offset=0), "zip64 end record is missing"),
    file_case("zip zip64 start lies", zip64(start=1 << 62), "directory ends at"),
    file_case("zip zip64 record of another size", zip64(record_size=1 << 50), "does not end at its locator"),
    file_case("zip zip64 member too short", zip64_member(32, 32), "zip64 field of 'a/data/0' is damaged"),
    file_case("zip zip64 member of an exabyte", zip64_member(1 << 60, 1 << 60, HEADER_OF_WEIGHT), "lies outside"),
    file_case("zip zip64 offset of an exabyte", zip64_member(32, 32, 1 << 60), "lies outside"),
    file_case("zip zip64 field missing", zip_archive([*MEMBERS[:2], replace(MEMBERS[2], size=0xFFFFFFFF)]),
              "zip64 field of 'a/data/0' is damaged"),
]  # fmt: skip


def stream(name: str, refused: str | None, **parts: object) -> Case:
    return file_case(f"legacy {name}", legacy(**parts), refused)  # type: ignore[arg-type]


COUNT = struct.Struct("<q").pack
LEGACY = [
    stream("honest", None),
    stream("keys as integers", None, keys=pkl(l(i(0)))),
    stream("wrong magic", "magic number is missing", magic=pkl(i(12345))),
    stream("magic is True", "magic number is missing", magic=pkl(b"\x88")),
    stream("wrong protocol", "unknown legacy protocol 1002", protocol=pkl(i(1002))),
    stream("keys no list", "list of storage keys is malformed", keys=pkl(u("0"))),
    stream("keys of lists", "list of storage keys is malformed", keys=pkl(l(b"]"))),
    stream("key unknown", "'7' is listed twice or never used", keys=pkl(l(u("7")))),
    stream("key twice", "'0' is listed twice", keys=pkl(l(u("0"), u("0")))),
    stream("key as text and number", "'0' is listed twice", keys=pkl(l(u("0"), i(0)))),
    stream("key missing", "storage '0' has no data", keys=pkl(b"]")),
    stream("count differs", "has 7 elements here but 8 in the pickle", data=COUNT(7) + FLOATS),
    stream("count negative", "has -8 elements here", data=COUNT(-8) + FLOATS),
    stream("data cut", "outside the file of", data=COUNT(8) + FLOATS[:-1]),
    stream("data missing", "outside the file of", data=b""),
    stream("bytes left over", "1 unexplained bytes after the last storage", data=COUNT(8) + FLOATS + b"\0"),
    stream("persistent id in sys_info", "persistent id in a pickle", sys_info=pkl(storage("0", 8))),
    stream("persistent id in keys", "persistent id in a pickle", keys=pkl(l(storage("0", 8)))),
    stream("storage of an exabyte", "outside the file", body=d((u("w"), tensor(storage("0", 1 << 58), 0, (8,), (1,)))),
           data=COUNT(1 << 58) + FLOATS),
    file_case("legacy only magic", MAGIC, "ends without STOP"),
    file_case("legacy only three pickles", MAGIC + PROTOCOL + SYS_INFO, "ends without STOP"),
    file_case("legacy cut in the object", legacy()[:150], "goes past the end|ends|outside"),
]  # fmt: skip


def special(name: str, make: Callable[[Path], None], refused: str) -> Case:
    def build(folder: Path) -> Path:
        path = folder / "file.pt"
        make(path)
        return path

    return Case(f"special {name}", build, refused)


def _sparse(path: Path, head: bytes, size: int) -> None:
    path.write_bytes(head)
    os.truncate(path, size)


SPECIAL = [
    special("pipe", os.mkfifo, "no regular file"),
    special("device", lambda p: p.symlink_to("/dev/zero"), "no regular file"),
    special("endless device", lambda p: p.symlink_to("/dev/urandom"), "no regular file"),
    special("missing", lambda p: None, "No such file"),
    special("link to nothing", lambda p: p.symlink_to("gone"), "No such file"),
    special("link to itself", lambda p: p.symlink_to(p), "symbolic links|Symbolic"),
    special("folder without checkpoint", Path.mkdir, "holds no checkpoint that surgery knows"),
    special("1 TB of zeros", lambda p: _sparse(p, b"", 1 << 40), "begins with zeros only"),
    special("1 TB after a zip", lambda p: _sparse(p, GOOD, 1 << 40), "end record of the zip archive is missing"),
    special("1 TB of opcodes that do nothing", lambda p: _sparse(p, legacy()[:150], 1 << 40), "unknown pickle opcode"),
    file_case("special empty", b"", "is empty"),
    file_case("special one byte", b"P", "no checkpoint that surgery knows"),
    file_case("special git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
    file_case("special HTML page", b"<!DOCTYPE html><html>Sign in</html>", "HTML"),
    file_case("special gzip", b"\x1f\x8b\x08" + b"\0" * 60, "gzip"),
    file_case("special bzip2", b"BZh9" + b"1" * 60, "bzip2"),
    file_case("special xz", b"\xfd7zXZ\0" + b"1" * 60, "xz"),
    file_case("special zstd", b"\x28\xb5\x2f\xfd" + b"1" * 60, "zstd"),
    file_case("special 7z", b"7z\xbc\xaf\x27\x1c" + b"1" * 60, "7z"),
    file_case("special rar", b"Rar!\x1a\x07\x01\0" + b"1" * 60, "RAR"),
    file_case("special GGUF", b"GGUF\3\0\0\0" + b"1" * 60, "GGUF"),
    file_case("special tar", b"model/".ljust(257, b"\0") + b"ustar\x0000".ljust(300, b"\0"), "tar archive"),
    file_case("special torch 0.1 tar", b"sys_info\0".ljust(600, b"\0"), "tar archive"),
    file_case("special noise", bytes((k * 197 + 31) % 251 + 1 for k in range(4096)), "no checkpoint that surgery knows"),
]  # fmt: skip

CASES: list[Case] = [*ZIPS, *LEGACY, *SPECIAL]
