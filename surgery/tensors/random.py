"""Random numbers that are a function of the seed, a name and their place: the same in blocks of any size.

Random((64, 576), "float32", "layers.0.router", seed=0, std=0.02).read(box)
permutation(seed=0, name="layers.0", n=1536)       # a fixed order of 0 ... 1535
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.tensors.hashing import places, splitmix64
from surgery.tensors.lazy import Box, Lazy, lengths

if TYPE_CHECKING:
    import torch


class Random(Lazy):
    """Independent numbers: normal with mean 0 and `std`, or `uniform` in [-bound, bound) where a bound is given."""

    __slots__ = ("bound", "dtype", "key", "shape", "std")

    def __init__(
        self, shape: Sequence[int], dtype: str, name: str, seed: int, std: float = 1.0, bound: float | None = None
    ) -> None:
        self.shape, self.dtype, self.std, self.bound = tuple(shape), dtype, std, bound
        self.key = key_of(seed, name)

    def read(self, box: Box) -> torch.Tensor:
        import torch

        raw = splitmix64(places(box, self.shape), self.key)
        values = _normal(raw) * self.std if self.bound is None else _uniform(raw) * self.bound
        return torch.from_numpy(values).to(self.torch_dtype).reshape(lengths(box))


def permutation(seed: int, name: str, n: int) -> list[int]:
    """0 ... n-1 in an order that depends on the seed and the name."""
    import numpy as np

    raw = splitmix64(np.arange(n, dtype=np.uint64), key_of(seed, name))
    return [int(i) for i in np.argsort(raw, kind="stable")]


def key_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")


def _uniform(raw: Any) -> Any:
    """In [-1, 1)."""
    import numpy as np

    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def _normal(raw: Any) -> Any:
    """Box and Muller (1958): the two halves of every number are one pair."""
    import numpy as np

    radius = ((raw >> np.uint64(32)).astype(np.float64) + 1.0) * 2.0**-32
    angle = (raw & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0**-31 * np.pi)
    return np.sqrt(-2.0 * np.log(radius)) * np.cos(angle)
