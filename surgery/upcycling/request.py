"""Requests for changes of a checkpoint that are proven: upcycling, other experts, a mixture that becomes dense.

Upcycle(experts=64, top_k=8, to="megatron-dist", topology=Topology(ep=8))
Edit(keep=[0, 2], top_k=1, force_lossy=True).selection
Collapse(by="average", force_lossy=True)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.conversion.request import Write, dtype_setting
from surgery.running.device import nobody
from surgery.settings import setting
from surgery.upcycling.dense_to_moe.settings import Settings
from surgery.upcycling.edit_experts.selection import Choices, Selection, selected

TOKENS = 256
BY = ("exact", "average", "by-router")


@dataclass(frozen=True, kw_only=True)
class Proven(Write):
    """How a result is written and proven.  `proving` is told bytes of the proof."""

    verify: bool = setting(True, "Read the output back, and prove what was promised.")
    verify_tokens: int = setting(TOKENS, "Tokens of the proof; 0: no proof, but the output is read back.", low=0)
    device: str = setting(
        "cpu", "Where the proof runs, and the model on a text: cpu, cuda or cuda:N.", metavar="DEVICE"
    )
    proving: Callable[[int], None] = nobody

    @property
    def proof_tokens(self) -> int:
        """Tokens of the proof, 0 without one."""
        return self.verify_tokens if self.verify else 0


@dataclass(frozen=True, kw_only=True)
class Upcycle(Settings, Proven):
    """A dense checkpoint becomes a mixture of experts."""

    dtype: str = dtype_setting()


@dataclass(frozen=True, kw_only=True)
class Edit(Choices, Proven):
    """The experts of a mixture are pruned, kept, duplicated, merged or permuted."""

    @property
    def selection(self) -> Selection:
        """What that means, layer by layer.  Raises UsageError."""
        return selected(self)


@dataclass(frozen=True, kw_only=True)
class Collapse(Proven):
    """A mixture becomes dense again."""

    by: str = setting("exact", "exact (of copies and virtual groups), average, or by-router (weighted by use on a "
                      "text).", choices=BY)  # fmt: skip
    force_lossy: bool = setting(False, "Allow what does not preserve the function.")

    def to_json(self) -> dict[str, Any]:
        return {"collapse": self.by}
