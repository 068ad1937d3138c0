"""How two tensors of one shape differ: counted block by block, in any order of magnitude, in little memory.

tally = Tally("float32", "bfloat16")
tally.add(a_block, b_block, box)          # any boxes of the two tensors, as they are read
tally.values()                            # None if no element differs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.tensors.lazy import ITEMSIZE, Box, same_bits, torch_dtype

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 17  # elements that are compared at once: a few MiB, whatever the size of the blocks


@dataclass(frozen=True)
class Values:
    """How far two tensors are apart.

    differing   of `elements`: those of other bits, or, between two dtypes, of another value
    max_abs     largest |a - b| of the finite ones;  max_rel  largest |a - b| / max(|a|, |b|)
    first       index of the first one that differs, in row-major order, and its two values
    nonfinite   how many of them are NaN or infinite on at least one side
    rounded     between two dtypes: whether rounding the wider side gives the narrower one
    """

    elements: int
    differing: int
    max_abs: float
    max_rel: float
    first: tuple[int, ...]
    first_a: float | str
    first_b: float | str
    nonfinite: int = 0
    rounded: bool = False

    @property
    def text(self) -> str:
        """One line for people."""
        share = (
            "every element differs"
            if self.differing == self.elements
            else f"{self.differing} of {self.elements} differ"
        )
        far = f"by up to {self.max_abs:.3g} ({self.max_rel:.2g} of the value)"
        if self.max_abs == 0 and not self.nonfinite:
            far = "only in the sign of zero or the bits of a NaN"
        odd = f", {self.nonfinite} are NaN or infinite" if self.nonfinite else ""
        cause = ", as rounding gives" if self.rounded else ""
        return (
            f"{share} {far}{odd}{cause}; first at {list(self.first)}: {_shown(self.first_a)} and {_shown(self.first_b)}"
        )


class Tally:
    """Adds up the differences of two tensors of dtypes `kind_a` and `kind_b`."""

    def __init__(self, kind_a: str, kind_b: str) -> None:
        self.same_kind = kind_a == kind_b
        sizes = ITEMSIZE[kind_a], ITEMSIZE[kind_b]
        # which side is the rounded one: 0 for a, 1 for b, None if neither can be
        self.narrow = None if sizes[0] == sizes[1] else int(sizes[1] < sizes[0])
        self.narrow_dtype = (kind_a, kind_b)[self.narrow or 0]
        self.elements = self.differing = self.nonfinite = 0
        self.max_abs = self.max_rel = 0.0
        self.rounded = self.narrow is not None
        self.first: tuple[tuple[int, ...], float | str, float | str] | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor, box: Box) -> None:
        """Count one box of both tensors."""
        self.elements += a.numel()
        if self.same_kind and same_bits(a, b):
            return
        flat_a, flat_b = a.reshape(-1), b.reshape(-1)
        for at in range(0, a.numel(), CHUNK):
            self._chunk(flat_a[at : at + CHUNK], flat_b[at : at + CHUNK], box, at)

    def _chunk(self, a: torch.Tensor, b: torch.Tensor, box: Box, at: int) -> None:
        import torch

        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        x, y = a.to(wide), b.to(wide)
        differ = _other_bits(a, b) if self.same_kind else (x != y) & ~(x.isnan() & y.isnan())
        count = int(differ.sum())
        if not count:
            return
        if self.rounded:
            rounded, other = (x, b) if self.narrow else (y, a)
            self.rounded = same_bits(rounded.to(torch_dtype(self.narrow_dtype)), other)
        where = differ.nonzero().reshape(-1)
        self.differing += count
        x, y = x[where], y[where]
        if self.first is None:
            self.first = _index(box, at + int(where[0])), _number(x[0]), _number(y[0])
        finite = x.isfinite() & y.isfinite()
        self.nonfinite += count - int(finite.sum())
        x, y = x[finite], y[finite]
        if x.numel():
            gap = (x - y).abs()
            self.max_abs = max(self.max_abs, float(gap.max()))
            scale = torch.maximum(x.abs(), y.abs())
            self.max_rel = max(self.max_rel, float((gap / scale.clamp_min(1e-300)).max()))

    def values(self) -> Values | None:
        """The differences, or None if there are none."""
        if self.first is None:
            return None
        index, a, b = self.first
        return Values(
            self.elements, self.differing, self.max_abs, self.max_rel, index, a, b, self.nonfinite, self.rounded
        )


def _other_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    item = a.element_size()
    x, y = (t.contiguous().view(torch.uint8).reshape(-1, item) for t in (a, b))
    return (x != y).any(1)


def _index(box: Box, at: int) -> tuple[int, ...]:
    """The index in the whole tensor of the `at`-th element of a box."""
    index = []
    for a, b in reversed(box):
        at, inner = divmod(at, b - a)
        index.append(a + inner)
    return tuple(reversed(index))


def _number(value: torch.Tensor) -> float | str:
    """A number that JSON can hold; NaN, the infinities and complex numbers as text."""
    if value.is_complex() or not bool(value.isfinite()):
        return str(value.item())
    return float(value)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.8g}"
