"""Pickles read as data: every name stays a name, every call a record, and nothing in the file is ever executed.

    found = describe(open("data.pkl", "rb").read(), file="data.pkl")
    found.root        # dicts, lists, numbers, texts; TensorRecord, Obj, ... for everything else
    found.globals     # ["argparse.Namespace", "torch._utils._rebuild_tensor_v2", ...]

An own opcode loop, because pickle.Unpickler trusts sizes and memo indices in the file, and hashes whatever it is
told to.
"""

from __future__ import annotations

import gc
import struct
from dataclasses import dataclass
from typing import Any

from surgery.containers.pickles import structure as opcodes_structure
from surgery.containers.pickles import values as opcodes_values
from surgery.containers.pickles.machine import HALF_DONE, Limits, Machine
from surgery.containers.pickles.records import BadPickle, Storage, TensorRecord
from surgery.containers.pickles.table import TABLE
from surgery.errors import FileError, show

_BLOCK = range(1024)  # opcodes between two looks at the budget
assert opcodes_structure and opcodes_values  # they have filled the table


class Truncated(FileError):
    """The pickle goes on past the end of the data."""


@dataclass(frozen=True)
class Description:
    """What a pickle says.  `end`: the byte after its STOP.  `tensors` have no place in a file yet."""

    root: Any
    globals: list[str]
    storages: dict[str, Storage]
    tensors: list[TensorRecord]
    end: int


def describe(
    data: bytes,
    *,
    file: str,
    member: str | None = None,
    base: int = 0,
    start: int = 0,
    storages: bool = True,
    limits: Limits | None = None,
) -> Description:
    """Read one pickle that begins at data[start]; data[0] is byte `base` of the file (for messages).

    storages=False refuses persistent ids.  Raises FileError, or Truncated if more data might help.
    """
    machine = Machine(data, start, storages, limits or Limits())
    collecting = gc.isenabled()
    gc.disable()  # millions of new containers: collections would only cost time
    failure, end = None, 0
    try:
        end = _run(machine)
    except BadPickle as error:
        failure = (error.what, error.hint)
    finally:
        if collecting:
            gc.enable()
    if failure:
        what, hint = failure
        byte = base + machine.at
        del machine  # an error that is kept must not keep all objects alive
        raise (Truncated if hint == HALF_DONE else FileError)(what, file=file, member=member, byte=byte, hint=hint)
    names = sorted(ascii(found.path)[1:-1] for found in machine.globals.values())
    return Description(machine.root, names, machine.storages, machine.tensors, end)


def _run(m: Machine) -> int:
    """Interpret up to STOP; the position after it.  Whatever goes wrong becomes BadPickle, at byte `m.at`."""
    if m.size > m.limits.pickle_bytes:
        raise BadPickle(f"a pickle of {m.size} bytes is over the limit of {m.limits.pickle_bytes}")
    buf, at, table = m.buf, m.at, TABLE
    pos = at
    try:
        while True:
            for _ in _BLOCK:
                at = pos
                pos = table[buf[pos]](m, pos + 1)
            m.charge(0)
    except StopIteration:
        return at + 1
    except IndexError:
        # either the data ended inside an opcode's argument, or an opcode found the stack empty
        if m.size - at < 16:
            raise BadPickle("the pickle ends without STOP", HALF_DONE) from None
        raise BadPickle("an opcode takes more from the stack than is there", "the file is damaged") from None
    except struct.error:
        raise BadPickle("the pickle ends inside an argument", HALF_DONE) from None
    except KeyError as error:
        raise BadPickle(f"memo {show(error.args[0])} is read but was never written") from None
    except UnicodeDecodeError:
        raise BadPickle("text in the pickle is not UTF-8") from None
    except MemoryError:
        raise BadPickle("out of memory while reading the pickle") from None
    finally:
        m.at = at
