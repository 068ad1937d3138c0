"""What is wrong with the numbers that were written: NaN and infinities, and what a cast could not hold.

    remarks(ledger)        # ["weights too large for float16 became infinite: 2 in all, in layers.0.mlp.up (2)"]

The ledger counted them when the parts were written; a cast shows in the difference to the part's source.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import some
from surgery.tensors.fingerprint import NOTHING, SOURCE, Ledger
from surgery.units import count

SHOWN = 8  # parts that a note names


def remarks(ledger: Ledger) -> list[str]:
    """Notes on values that are no numbers, or were lost.  Each names the parts, with how many there are in each."""
    overflowed: dict[str, int] = {}
    vanished: dict[str, int] = {}
    odd: dict[str, int] = {}
    dtypes = set()
    for name, (dtype, _) in ledger.parts.items():
        if name.startswith(SOURCE):
            continue
        _, _, bad, zeros = ledger.counts.get(name, NOTHING)
        _, _, bad_before, zeros_before = ledger.counts.get(SOURCE + name, (0, 0, bad, zeros))
        overflowed[name], vanished[name], odd[name] = bad - bad_before, zeros - zeros_before, bad_before
        dtypes.add(dtype)
    into = "/".join(sorted(dtypes))
    return [
        *_note(overflowed, f"too large for {into} became infinite"),
        *_note(vanished, f"too small for {into} became 0"),
        *_note(odd, "NaN or infinite"),
    ]


def _note(counted: Mapping[str, int], what: str) -> list[str]:
    found = {name: n for name, n in counted.items() if n > 0}
    total = sum(found.values())
    named = some((f"{name} ({n})" for name, n in found.items()), SHOWN)
    return [f"weights {what}: {count(total)} in all, in {named}"] if found else []
