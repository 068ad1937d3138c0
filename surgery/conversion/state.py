"""An optimizer's state in a conversion: made ready for its target, counted in the ledger, and compared again.

    source = prepared(source, target, "keep")     # for formats without masters, the weights become the masters

Nothing here knows a format: `Checkpoint.optimizer` is canonical, and `Format.masters` says what a target keeps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from surgery.conversion.report import states_of
from surgery.errors import ConfigError, FileError
from surgery.formats.base import Checkpoint, Format
from surgery.formats.operations import from_masters
from surgery.formats.optimizer import ALONE, LAST_EXACT, Optimizer
from surgery.tensors.fingerprint import STATE, Ledger


def check(source: Checkpoint, origin: Format, target: Format) -> None:
    """Raise FileError unless a state was found, ConfigError if a number of steps is more than the target can count."""
    if source.optimizer is None:
        why = "" if origin.states else f", and none is read from the format {origin.name}"
        raise FileError(f"holds no optimizer's state{why}", file=source.path, hint=ALONE)
    if source.optimizer.step > LAST_EXACT:
        raise ConfigError(f"its optimizer has taken {source.optimizer.step:,} steps, more than fp32 counts exactly",
                          file=str(source.path), hint=ALONE)  # fmt: skip


def prepared(source: Checkpoint, target: Format, dtype: str) -> Checkpoint:
    """With a state for the parts that are written; where the target keeps no masters, those are its weights."""
    found = source.optimizer
    if found is None:
        return source
    found = found.mapped(lambda name, tensor: tensor, source.parts)
    notes = [f"carried: the optimizer's state, {found.said()}", *found.notes]
    source = replace(source, optimizer=found)
    if found.kept and not target.masters:
        if dtype == "keep":
            source = from_masters(source)
            notes.append(f"the weights are the fp32 masters: {target.name} keeps no others (--dtype bf16 rounds them)")
        else:
            notes.append(
                f"{target.name} keeps no masters: what --dtype {dtype} rounds off is lost to a run that goes on"
            )
    return replace(source, notes=(*source.notes, *notes))


def tapped(source: Checkpoint, target: Format, ledger: Ledger) -> Optimizer | None:
    """The state, counted in a ledger when it is read."""
    found = source.optimizer
    if found is None:
        return None
    counted = {name: ledger.tap(name, tensor) for name, tensor in states_of(source, target).items()}
    roles = {role: {n: counted.get(f"{STATE}{role}/{n}", t) for n, t in parts.items()}
             for role, parts in found.roles.items()}  # fmt: skip
    return replace(found, roles=roles)


def compare(planned: Optimizer | None, found: Optimizer | None, dst: Path) -> None:
    """Raise ConfigError unless what was written says the same steps; its tensors are compared elsewhere."""
    if planned is None:
        return
    if found is None or found.step != planned.step:
        what = "no optimizer's state" if found is None else f"{found.step:,} steps"
        raise ConfigError(f"the written checkpoint has {what}, not {planned.step:,} steps", file=dst)
