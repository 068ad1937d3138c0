"""The table of pickle opcodes: small functions from (machine, position of the argument) to the next position.

    TABLE[0x4b](machine, pos)      # BININT1: pushes machine.buf[pos], returns pos + 1

Filled by opcodes_values.py and opcodes_structure.py; everything else is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

from surgery.containers.pickles.machine import Machine
from surgery.containers.pickles.records import BadPickle
from surgery.errors import show

Op = Callable[[Machine, int], int]
_INTEGER = re.compile(rb"[+-]?[0-9]{1,78}")


def _unknown(m: Machine, pos: int) -> int:
    hint = "this is no pickle, or it is damaged" if pos < 4 else "the file is damaged"
    raise BadPickle(f"unknown pickle opcode 0x{m.buf[pos - 1]:02x}", hint)


TABLE: list[Op] = [_unknown] * 256


def op(*codes: int) -> Callable[[Op], Op]:
    def register(fn: Op) -> Op:
        for code in codes:
            TABLE[code] = fn
        return fn

    return register


def refuse(code: int, what: str) -> None:
    def refused(m: Machine, pos: int) -> NoReturn:
        raise BadPickle(what, "torch never writes this")

    TABLE[code] = refused


def items(m: Machine) -> list[Any]:
    """Everything above the last mark, which is removed."""
    if not m.meta:
        raise BadPickle("an opcode needs a mark on the stack and there is none", "the file is damaged")
    above = m.stack
    m.stack = m.meta.pop()
    return above


def text_integer(m: Machine, pos: int) -> tuple[int, int]:
    """The value of a decimal argument, and the position after it."""
    text, pos = m.line(pos)
    digits = text[:-1] if text.endswith(b"L") else text
    if not _INTEGER.fullmatch(digits):
        raise BadPickle(f"{show(text)} is not an integer")
    return int(digits), pos
