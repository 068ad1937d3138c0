"""Sparse attention of a model: which tokens each head sees, frozen for one length.

    Sparse("bigbird", 1024, {"window": 128, "globals": 8, "stride": 32})

The kinds and what their numbers mean: `formats/hf/hub/sparse_patterns.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Sparse:
    """`kind` with its `numbers`, made for rows of `reference_len` tokens; longer rows have the same bands."""

    kind: str
    reference_len: int
    numbers: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", MappingProxyType(dict(self.numbers)))

    def __str__(self) -> str:
        numbers = "".join(f", {name} {value}" for name, value in self.numbers.items())
        return f"{self.kind} made for {self.reference_len} tokens{numbers}"
