"""What a sparse attention sees, in figures.

figures(pattern_of("spattention", 1024, 16), 1024).density        # 0.178: of what full attention sees
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from surgery.formats.hf.hub.sparse_patterns import KINDS, Pattern, mask

BLOCK = 128


@dataclass(frozen=True)
class Figures:
    """Of a mask of `length` tokens.

    density     pairs that are seen, of those that full attention sees
    distances   how many of the tokens, itself among them, the last one sees by some head
    blind       queries that see nothing, of all heads together
    blocks      blocks of 128 x 128 that a GPU has to compute, of those of full attention
    """

    kind: str
    length: int
    heads: int
    numbers: dict[str, int]
    density: float
    distances: int
    blind: int
    blocks: float
    inferred: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def figures(pattern: Pattern, length: int) -> Figures:
    """Of one document of `length` tokens."""
    seen = mask(pattern, length)
    pairs = length * (length + 1) // 2
    blocks = shrunk(seen, BLOCK) > 0
    side = blocks.shape[-1]
    return Figures(
        pattern.kind, length, pattern.heads, dict(pattern.numbers), int(seen.sum()) / (pattern.heads * pairs),
        int(seen[:, -1].any(0).sum()), int((~seen.any(-1)).sum()),
        int(blocks.sum()) / (pattern.heads * side * (side + 1) // 2), KINDS[pattern.kind].inferred,
    )  # fmt: skip


def shrunk(seen: Tensor, block: int) -> Tensor:
    """The share of pairs that are seen in every block [heads, length / block, length / block]."""
    left = -seen.shape[-1] % block
    wide = pad(seen.float(), (0, left, 0, left))
    blocks: Tensor = wide.unflatten(1, (-1, block)).unflatten(3, (-1, block))
    return blocks.mean((2, 4))
