"""What is wrong with the numbers that were written: NaN and infinities, and what a cast could not hold.

    remarks(ledger, parts)        # ["weights too large for float16 became infinite: 2 in all, in layers.0.mlp.up (2)"]

The ledger counted them when the parts were written, and what goes along of an optimizer's state; a cast shows in the
difference to the part's source.  Where parts are made of several folders' files, those are read again that may have
brought a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from surgery.errors import shown, some
from surgery.tensors.extent import Extent
from surgery.tensors.fingerprint import NOTHING, SOURCE, STATE, Ledger, not_finite
from surgery.tensors.lazy import Lazy, boxes, walk
from surgery.units import count

SHOWN = 8  # parts that a note names
BLOCK = 8 << 20  # bytes that are read again at once


def remarks(ledger: Ledger, parts: Mapping[str, Lazy]) -> list[str]:
    """Notes on values that are no numbers, or were lost.  Each names the parts, with how many there are in each."""
    overflowed: dict[str, int] = {}
    vanished: dict[str, int] = {}
    odd: dict[str, int] = {}
    states: dict[str, int] = {}
    dtypes = set[str]()
    for name, (dtype, _) in ledger.parts.items():
        if name.startswith(SOURCE):
            continue
        _, _, bad, zeros = ledger.counts.get(name, NOTHING)
        if name.startswith(STATE):
            role, _, part = name.removeprefix(STATE).partition("/")
            states[f"{role} of {part}"] = bad
            continue
        _, _, bad_before, zeros_before = ledger.counts.get(SOURCE + name, (0, 0, bad, zeros))
        overflowed[name], vanished[name], odd[name] = bad - bad_before, zeros - zeros_before, bad_before
        dtypes |= {dtype} if SOURCE + name in ledger.parts else set()
    into = "/".join(sorted(dtypes))
    return [
        *_note(overflowed, f"weights too large for {into} became infinite"),
        *_note(vanished, f"weights too small for {into} became 0"),
        *(note + _origins(odd, parts) for note in _note(odd, "weights NaN or infinite")),
        *_note(states, "NaN or infinite in the optimizer's state"),
    ]


def _origins(odd: Mapping[str, int], parts: Mapping[str, Lazy]) -> str:
    """Which folders brought values that are no numbers, and how many; "" if all are one folder's."""
    first = [name for name, n in odd.items() if n > 0 and name in parts][:SHOWN]
    leaves = {id(leaf): leaf for name in first for leaf in walk(parts[name]) if isinstance(leaf, Extent)}
    found: dict[str, int] = {}
    for leaf in leaves.values():
        blocks = boxes(leaf.shape, max(1, leaf.nbytes // max(1, math.prod(leaf.shape))), BLOCK)
        folder = shown(Path(leaf.file.path).parent)
        found[folder] = found.get(folder, 0) + sum(not_finite(leaf.read(box)) for box in blocks)
    if len(found) == 1 and sum(found.values()) == sum(odd[name] for name in first):
        return ""
    named = some((f"{folder} ({n})" for folder, n in found.items() if n), SHOWN)
    return f"; brought by {named}" if named else "; what they are made of is finite"


def _note(counted: Mapping[str, int], what: str) -> list[str]:
    found = {name: n for name, n in counted.items() if n > 0}
    total = sum(found.values())
    named = some((f"{name} ({n})" for name, n in found.items()), SHOWN)
    return [f"{what}: {count(total)} in all, in {named}"] if found else []
