"""Opcodes that move, join and name values: memo, marks, containers, globals, calls, framing.

Opcodes that torch never writes and that could only point outside the file (extension codes, out-of-band buffers,
textual persistent ids) are refused.  Order and meaning follow Python's pickletools.
"""

from __future__ import annotations

import struct
from typing import Any, NoReturn

from surgery.containers.pickles.allowed import storage
from surgery.containers.pickles.machine import HALF_DONE, Machine
from surgery.containers.pickles.records import BadPickle, Set
from surgery.containers.pickles.table import items, op, refuse, text_integer
from surgery.errors import show

_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from

# ---- memo, marks, stack


@op(0x71)
def binput(m: Machine, pos: int) -> int:
    m.memo[m.buf[pos]] = m.stack[-1]
    return pos + 1


@op(0x72)
def long_binput(m: Machine, pos: int) -> int:
    m.memo[_u32(m.buf, pos)[0]] = m.stack[-1]
    return pos + 4


@op(0x94)
def memoize(m: Machine, pos: int) -> int:
    m.memo[len(m.memo)] = m.stack[-1]
    m.spent += 128
    return pos


@op(0x70)
def put(m: Machine, pos: int) -> int:
    index, pos = text_integer(m, pos)
    if not 0 <= index < 1 << 32:  # from 2^61 - 1 on, many integers share one hash
        raise BadPickle(f"memo index {show(index)} is out of range")
    m.memo[index] = m.stack[-1]
    m.spent += 128
    return pos


@op(0x68)
def binget(m: Machine, pos: int) -> int:
    m.stack.append(m.memo[m.buf[pos]])
    return pos + 1


@op(0x6A)
def long_binget(m: Machine, pos: int) -> int:
    m.stack.append(m.memo[_u32(m.buf, pos)[0]])
    return pos + 4


@op(0x67)
def get(m: Machine, pos: int) -> int:
    index, pos = text_integer(m, pos)
    m.stack.append(m.memo[index])
    return pos


@op(0x28)
def mark(m: Machine, pos: int) -> int:
    m.meta.append(m.stack)
    m.stack = []
    m.spent += 96
    return pos


@op(0x30)
def pop(m: Machine, pos: int) -> int:
    if m.stack:
        m.stack.pop()
    else:
        items(m)
    return pos


@op(0x31)
def pop_mark(m: Machine, pos: int) -> int:
    items(m)
    return pos


@op(0x32)
def dup(m: Machine, pos: int) -> int:
    m.stack.append(m.stack[-1])
    return pos


# ---- containers


@op(0x29)
def empty_tuple(m: Machine, pos: int) -> int:
    m.stack.append(())
    return pos


@op(0x85)
def tuple1(m: Machine, pos: int) -> int:
    m.stack[-1] = (m.stack[-1],)
    m.spent += 80
    return pos


@op(0x86)
def tuple2(m: Machine, pos: int) -> int:
    last = m.stack.pop()
    m.stack[-1] = (m.stack[-1], last)
    m.spent += 96
    return pos


@op(0x87)
def tuple3(m: Machine, pos: int) -> int:
    last = m.stack.pop()
    middle = m.stack.pop()
    m.stack[-1] = (m.stack[-1], middle, last)
    m.spent += 96
    return pos


@op(0x74)
def tuple_(m: Machine, pos: int) -> int:
    above = items(m)
    m.stack.append(tuple(above))
    m.spent += 64 + 8 * len(above)
    return pos


@op(0x5D)
def empty_list(m: Machine, pos: int) -> int:
    m.stack.append([])
    m.spent += 80
    return pos


@op(0x6C)
def list_(m: Machine, pos: int) -> int:
    above = items(m)
    m.stack.append(above)
    return pos


@op(0x7D)
def empty_dict(m: Machine, pos: int) -> int:
    m.stack.append({})
    m.spent += 80
    return pos


@op(0x64)
def dict_(m: Machine, pos: int) -> int:
    above = items(m)
    made: dict[Any, Any] = {}
    m.set_items(made, above)
    m.stack.append(made)
    m.spent += 80
    return pos


@op(0x8F)
def empty_set(m: Machine, pos: int) -> int:
    m.stack.append(Set())
    m.spent += 80
    return pos


@op(0x91)
def frozenset_(m: Machine, pos: int) -> int:
    above = items(m)
    m.stack.append(Set(above))
    m.spent += 64 + 8 * len(above)
    return pos


@op(0x73)
def setitem(m: Machine, pos: int) -> int:
    value = m.stack.pop()
    key = m.stack.pop()
    m.set_items(m.stack[-1], [key, value])
    return pos


@op(0x75)
def setitems(m: Machine, pos: int) -> int:
    above = items(m)
    m.set_items(m.stack[-1], above)
    return pos


@op(0x61)
def append(m: Machine, pos: int) -> int:
    value = m.stack.pop()
    m.append(m.stack[-1], [value])
    return pos


@op(0x65, 0x90)  # APPENDS, ADDITEMS
def appends(m: Machine, pos: int) -> int:
    above = items(m)
    m.append(m.stack[-1], above)
    return pos


# ---- names, calls, instances


@op(0x63)
def global_(m: Machine, pos: int) -> int:
    module, pos = m.line(pos)
    name, pos = m.line(pos)
    m.stack.append(m.name(module.decode(), name.decode()))
    return pos


@op(0x93)
def stack_global(m: Machine, pos: int) -> int:
    name = m.stack.pop()
    m.stack[-1] = m.name(m.stack[-1], name)
    return pos


@op(0x52)
def reduce(m: Machine, pos: int) -> int:
    args = m.stack.pop()
    m.at = pos - 1
    m.stack[-1] = m.reduce(m.stack[-1], args)
    return pos


@op(0x81)
def newobj(m: Machine, pos: int) -> int:
    args = m.stack.pop()
    m.at = pos - 1
    m.stack[-1] = m.new(m.stack[-1], args)
    return pos


@op(0x92)
def newobj_ex(m: Machine, pos: int) -> int:
    kwargs = m.stack.pop()
    args = m.stack.pop()
    if not isinstance(kwargs, dict):
        raise BadPickle("the keyword arguments of a new object are not a dictionary")
    m.at = pos - 1
    m.stack[-1] = m.new(m.stack[-1], args, kwargs)
    return pos


@op(0x69)
def inst(m: Machine, pos: int) -> int:
    at = pos - 1
    module, pos = m.line(pos)
    name, pos = m.line(pos)
    args = tuple(items(m))
    m.at = at
    m.stack.append(m.new(m.name(module.decode(), name.decode()), args))
    return pos


@op(0x6F)
def obj(m: Machine, pos: int) -> int:
    above = items(m)
    m.at = pos - 1
    m.stack.append(m.new(above[0], tuple(above[1:])))
    return pos


@op(0x62)
def build(m: Machine, pos: int) -> int:
    state = m.stack.pop()
    m.build(m.stack[-1], state)
    return pos


@op(0x51)
def binpersid(m: Machine, pos: int) -> int:
    if not m.persistent:
        raise BadPickle("a persistent id in a pickle that has no storages")
    m.stack[-1] = storage(m, m.stack[-1])
    return pos


# ---- protocol


@op(0x80)
def proto(m: Machine, pos: int) -> int:
    m.protocol = m.buf[pos]
    if m.protocol > 5:
        raise BadPickle(f"pickle protocol {m.protocol} is newer than 5")
    return pos + 1


@op(0x95)
def frame(m: Machine, pos: int) -> int:
    """Framing carries no meaning; it only has to lie inside the data."""
    size = _u64(m.buf, pos)[0]
    left = m.size - pos - 8
    if size > left:
        raise BadPickle(f"a frame of {size} bytes goes past the end of the pickle ({left} left)", HALF_DONE)
    return pos + 8


@op(0x2E)
def stop(m: Machine, pos: int) -> NoReturn:
    if m.meta or len(m.stack) != 1:
        raise BadPickle("the pickle stops with leftovers on the stack", "the file is damaged")
    m.root = m.stack[0]
    raise StopIteration


refuse(0x50, "a persistent id as text")
for _code in (0x82, 0x83, 0x84):
    refuse(_code, "a copyreg extension code")
for _code in (0x97, 0x98):
    refuse(_code, "an out-of-band buffer, which a file cannot have")
