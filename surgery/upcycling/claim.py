"""What an operation says of its result, for the proof to hold it to.

Claim("virtual-group", spec, exact=True, group=8)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from surgery.formats.base import Checkpoint
from surgery.model.spec import Spec


@dataclass(frozen=True)
class Claim:
    """`spec` is the result's.  `exact`: it computes the same function; `rounds`: but for rounding its weights; `group`:
    runs of so many experts are chosen together; `intact` measures the share of neurons that are the source's own."""

    name: str
    spec: Spec
    exact: bool
    rounds: bool = False
    group: int = 1
    intact: Callable[[Checkpoint], float] | None = None
