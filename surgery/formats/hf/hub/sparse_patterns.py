"""Sparse causal attention: which earlier tokens each head sees, as one small function a kind.

    pattern = pattern_of("spattention", length=1024, heads=16)
    mask(pattern, 1024)                             # bool [16, 1024, 1024]: head, query, key; True: sees

A token at place i of its document sees one at place j, d = i - j >= 0, or not.  What is made for `length` tokens N and
H heads stays as it is for longer and for growing documents.  Head h has a band of w = N // H + (h < N % H) distances,
which begins at s = h * (N // H) + min(h, N % H); the bands of all heads cover the distances below N.

The kinds but `full` and `sliding` are those of SPAttention (arXiv 2511.09596) and of what it is compared with; its
`SPAttention.py`, `SPAttention_GappedBands.py`, `SPAttention_ExclusiveBands.py` and `attention_variants.py` define them.
Of `local_only` (and the paper's causal baseline, here `full`) no source was found: it is inferred from its name.

This file is complete: it needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SHORT = 4  # longformer, bigbird and reformer see everything where documents are made no longer


@dataclass(frozen=True)
class Pattern:
    """A kind with its numbers, for `heads` heads."""

    kind: str
    length: int
    heads: int
    numbers: tuple[tuple[str, int], ...] = ()

    def __getitem__(self, name: str) -> int:
        return dict(self.numbers)[name]

    def band(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Where the band of head h begins, and how many distances it has."""
        width, left = divmod(self.length, self.heads)
        return h * width + h.clamp(max=left), width + (h < left).to(h.dtype)

    def sees(self, h: Any, i: Any, j: Any) -> Tensor:
        """Whether head h sees place j from place i; tensors of integers, which broadcast."""
        found: Tensor = KINDS[self.kind].sees(self, h, i, j) & (j <= i)
        return found


# --------------------------------------------------------------------------------------------------------- the kinds


def _full(p: Pattern, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _sliding(p: Pattern, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i - j < p["window"]


def _local_only(p: Pattern, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i - j <= p.band(h)[1]


def _exclusive_bands(p: Pattern, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    start, width = p.band(h)
    return (start <= i - j) & (i - j < start + width)


def _gapped_bands(p: Pattern, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    start, width = p.band(h)
    return (start <= i - j) & (i - j < start + width // 2)


def _spattention(p: Pattern, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return _local_only(p, h, i, j) | _exclusive_bands(p, h, i, j)


def _longformer(p: Pattern, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    if p.length <= SHORT:
        return j <= i
    return (i - j <= p["window"]) | (i < p["globals"]) | (j < p["globals"])


def _bigbird(p: Pattern, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    if p.length <= SHORT:
        return j <= i
    strided = ((i - j) % p["stride"] == 0) & (i - j > p["window"])
    return _longformer(p, h, i, j) | strided


def _reformer(p: Pattern, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    if p.length <= SHORT:
        return j <= i
    buckets = p["buckets"]
    apart = ((3 * i + 13 * h + 7) % buckets - (3 * j + 13 * h + 7) % buckets).abs()
    near = (apart <= 1) | ((apart == buckets - 1) if buckets > 2 else (apart < 0))
    return near | (i - j <= p["window"])


@dataclass(frozen=True)
class Kind:
    """`numbers`: what each is by default, from length and heads; `absolute`: it depends on places, not on distances
    alone; `inferred`: no source of it was found."""

    sees: Callable[[Pattern, Tensor, Tensor, Tensor], Tensor]
    meaning: str
    numbers: Mapping[str, Callable[[int, int], int]] = field(default_factory=dict)
    absolute: bool = False
    inferred: bool = False


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(high, value))


KINDS: Mapping[str, Kind] = {
    "full": Kind(_full, "all earlier tokens", inferred=True),
    "sliding": Kind(_sliding, "the last `window` tokens, itself among them", {"window": lambda n, h: max(1, n // 4)}),
    "spattention": Kind(_spattention, "a window of the band's width, and the head's own band of distances"),
    "local_only": Kind(_local_only, "the window of spattention alone", inferred=True),
    "exclusive_bands": Kind(_exclusive_bands, "the head's band alone"),
    "gapped_bands": Kind(_gapped_bands, "the first half of the head's band"),
    "longformer": Kind(
        _longformer, "`window` distances; the first `globals` tokens see and are seen by all that causality allows",
        {"window": lambda n, h: _between(1, n // 4, 256), "globals": lambda n, h: _between(1, n // 32, 16)}, True,
    ),
    "bigbird": Kind(
        _bigbird, "as longformer, and beyond the window every `stride`-th distance; nothing is random",
        {"window": lambda n, h: _between(1, n // 8, 128), "globals": lambda n, h: _between(1, n // 64, 8),
         "stride": lambda n, h: max(16, n // 32)}, True,
    ),
    "reformer": Kind(
        _reformer, "tokens of the same or a neighbouring one of `buckets`, which places decide; `window` distances",
        {"window": lambda n, h: _between(1, n // 4, 8), "buckets": lambda n, h: max(2, n // _between(1, n // 8, 64))},
        True,
    ),
}  # fmt: skip


def pattern_of(kind: str, length: int, heads: int, given: Mapping[str, int] | None = None) -> Pattern:
    """A kind with all its numbers: those that are `given`, the others by default.

    Raises ValueError for a kind or a number that there is not, and for a number below 1.
    """
    if kind not in KINDS:
        raise ValueError(f"attention {kind!r} is not known; there are {', '.join(KINDS)}")
    defaults, given = KINDS[kind].numbers, given or {}
    if unknown := [name for name in given if name not in defaults]:
        has = ", ".join(defaults) or "no numbers"
        raise ValueError(f"{kind} attention has no {unknown[0]!r}; it has {has}")
    numbers = {name: given.get(name, default(length, heads)) for name, default in defaults.items()}
    for name, value in {"length": length, "heads": heads, **numbers}.items():
        if value < 1:
            raise ValueError(f"{kind} attention: {name} is {value}, but at least 1 is needed")
    return Pattern(kind, length, heads, tuple(numbers.items()))


@lru_cache(maxsize=8)
def mask(pattern: Pattern, length: int, device: str = "cpu") -> Tensor:
    """bool [heads, length, length] of one document that begins at place 0: head, query, key."""
    import torch

    h = torch.arange(pattern.heads, device=device)[:, None, None]
    i = torch.arange(length, device=device)
    seen = pattern.sees(h, i[:, None], i[None, :])
    return seen.expand(pattern.heads, length, length)
