"""Opcodes that push a value: numbers, constants, text and bytes.  Order and meaning follow Python's pickletools."""

from __future__ import annotations

import codecs
import struct

from surgery.containers.pickles.machine import Machine
from surgery.containers.pickles.records import BadPickle
from surgery.containers.pickles.table import op, text_integer
from surgery.errors import show

_u16 = struct.Struct("<H").unpack_from
_u32 = struct.Struct("<I").unpack_from
_i32 = struct.Struct("<i").unpack_from
_u64 = struct.Struct("<Q").unpack_from
_f64 = struct.Struct(">d").unpack_from
_LONG_LIMIT = 32  # bytes of an integer: nothing in a checkpoint is wider

# ---- numbers and constants


@op(0x4B)
def binint1(m: Machine, pos: int) -> int:
    m.stack.append(m.buf[pos])
    return pos + 1


@op(0x4D)
def binint2(m: Machine, pos: int) -> int:
    m.stack.append(_u16(m.buf, pos)[0])
    return pos + 2


@op(0x4A)
def binint(m: Machine, pos: int) -> int:
    m.stack.append(_i32(m.buf, pos)[0])
    return pos + 4


@op(0x47)
def binfloat(m: Machine, pos: int) -> int:
    m.stack.append(_f64(m.buf, pos)[0])
    return pos + 8


@op(0x8A)
def long1(m: Machine, pos: int) -> int:
    return _long(m, pos + 1, m.buf[pos])


@op(0x8B)
def long4(m: Machine, pos: int) -> int:
    return _long(m, pos + 4, _i32(m.buf, pos)[0])


def _long(m: Machine, pos: int, size: int) -> int:
    if not 0 <= size <= _LONG_LIMIT:
        raise BadPickle(f"an integer of {size} bytes, more than {_LONG_LIMIT}", "no checkpoint holds such integers")
    m.stack.append(int.from_bytes(m.take(pos, size, "an integer"), "little", signed=True))
    return pos + size


@op(0x49)
def text_int(m: Machine, pos: int) -> int:
    text, end = m.line(pos)
    value: int | bool = text == b"01" if text in (b"00", b"01") else text_integer(m, pos)[0]
    m.stack.append(value)
    return end


@op(0x4C)
def text_long(m: Machine, pos: int) -> int:
    value, pos = text_integer(m, pos)
    m.stack.append(value)
    return pos


@op(0x46)
def text_float(m: Machine, pos: int) -> int:
    text, pos = m.line(pos)
    try:
        m.stack.append(float(text))
    except ValueError:
        raise BadPickle(f"{show(text)} is not a number") from None
    return pos


@op(0x88)
def true(m: Machine, pos: int) -> int:
    m.stack.append(True)
    return pos


@op(0x89)
def false(m: Machine, pos: int) -> int:
    m.stack.append(False)
    return pos


@op(0x4E)
def none(m: Machine, pos: int) -> int:
    m.stack.append(None)
    return pos


# ---- text and bytes


@op(0x8C)
def short_unicode(m: Machine, pos: int) -> int:
    size = m.buf[pos]
    m.stack.append(m.take(pos + 1, size, "text").decode("utf-8", "surrogatepass"))
    return pos + 1 + size


@op(0x58)
def unicode(m: Machine, pos: int) -> int:
    size: int = _u32(m.buf, pos)[0]
    m.stack.append(m.take(pos + 4, size, "text").decode("utf-8", "surrogatepass"))
    return pos + 4 + size


@op(0x8D)
def unicode8(m: Machine, pos: int) -> int:
    size: int = _u64(m.buf, pos)[0]
    m.stack.append(m.take(pos + 8, size, "text").decode("utf-8", "surrogatepass"))
    return pos + 8 + size


@op(0x43)
def short_bytes(m: Machine, pos: int) -> int:
    size = m.buf[pos]
    m.stack.append(m.take(pos + 1, size, "bytes"))
    return pos + 1 + size


@op(0x42)
def bytes4(m: Machine, pos: int) -> int:
    size: int = _u32(m.buf, pos)[0]
    m.stack.append(m.take(pos + 4, size, "bytes"))
    return pos + 4 + size


@op(0x8E, 0x96)  # BINBYTES8, BYTEARRAY8
def bytes8(m: Machine, pos: int) -> int:
    size: int = _u64(m.buf, pos)[0]
    m.stack.append(m.take(pos + 8, size, "bytes"))
    return pos + 8 + size


# Python 2's str: text or bytes, nobody knows.  surrogateescape keeps every byte and stays reversible.


@op(0x55)
def short_string(m: Machine, pos: int) -> int:
    size = m.buf[pos]
    m.stack.append(m.take(pos + 1, size, "text").decode("utf-8", "surrogateescape"))
    return pos + 1 + size


@op(0x54)
def string4(m: Machine, pos: int) -> int:
    size: int = _u32(m.buf, pos)[0]
    m.stack.append(m.take(pos + 4, size, "text").decode("utf-8", "surrogateescape"))
    return pos + 4 + size


@op(0x53)
def text_string(m: Machine, pos: int) -> int:
    text, pos = m.line(pos)
    if len(text) < 2 or text[0] != text[-1] or text[:1] not in (b"'", b'"'):
        raise BadPickle("a STRING argument is not quoted")
    try:
        raw = codecs.escape_decode(text[1:-1])[0]
    except ValueError:
        raise BadPickle("a STRING argument has a broken escape") from None
    m.stack.append(raw.decode("utf-8", "surrogateescape"))
    return pos


@op(0x56)
def text_unicode(m: Machine, pos: int) -> int:
    text, pos = m.line(pos)
    m.stack.append(str(text, "raw-unicode-escape"))
    return pos
