"""Per-block function of a merge method, after its whole-tensor statistics are known.

ready = METHODS["ties"].run(inputs, options)      # thresholds were found; now any block can be merged
ready.apply(inputs.flat(0, 4096))                 # 4096 elements of the merge
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.merging.engine.inputs import Block, Inputs

if TYPE_CHECKING:
    import torch

Options = Mapping[str, Any]
Apply = Callable[[Block], "torch.Tensor"]
Fused = Callable[[Block, Any], None]


@dataclass(frozen=True)
class Ready:
    """`apply` makes a block of the result, in the working dtype.

    span    how many of the last dimensions a block must hold whole
    nbytes  what the statistics occupy
    fused   the same as `apply` in compiled loops: from `Block.bits` into the bits of the result
    """

    apply: Apply
    span: int = 0
    nbytes: int = 1024
    fused: Fused | None = None


Run = Callable[[Inputs, Options], Ready]
