"""The order of a run: which instance of which source comes when, fixed by two seeds and kept in a file.

    order = make_order([Taken("web", have=1000, heldout=1, take=2500)], seed=42, sample_seed=0)
    source, instance = split(order)                 # uint64 [2500] -> int64 [2500] each

A source that is taken 2.5 times gives every instance twice and half of them, drawn without replacement, once more.
Held-out instances lie evenly over the source and depend on no seed, so that runs of different seeds share them.  An
entry is `source << 40 | instance`.  PCG64 draws and shuffles; only the file decides what a run sees, so a resumed run
does not depend on NumPy's versions.  Memory: 8 bytes for each entry and some blocks of a million.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.data.files.mapped import Array
from surgery.errors import ConfigError
from surgery.tensors.random import key_of
from surgery.units import human

BITS = 40
BLOCK = 1 << 20
MOST = 10**9 - 1  # instances of a source: as many as NumPy's hypergeometric distribution takes


@dataclass(frozen=True)
class Taken:
    """Of a source: the instances that may be trained on, those held out besides, and how many are taken."""

    name: str
    have: int
    heldout: int
    take: int


def heldout_of(have: int, heldout: int) -> Array:
    """int64 [heldout], rising: the middles of as many equal stretches of a source of have + heldout instances."""
    return (2 * np.arange(heldout, dtype=np.int64) + 1) * (have + heldout) // (2 * heldout or 1)


def make_order(sources: Sequence[Taken], seed: int, sample_seed: int) -> Array:
    """uint64 [sum of take].  Raises ConfigError if it needs too much memory, or a source has a billion instances."""
    out, filled = _room(sum(s.take for s in sources)), 0
    for number, source in enumerate(sources):
        if source.have > MOST:
            what = f"{source.name} has {source.have:,} instances, and one source can have {MOST:,}"
            raise ConfigError(what, hint="divide its files among two sources, or raise sequence_length")
        rng = np.random.Generator(np.random.PCG64(key_of(sample_seed, source.name)))
        kept_out = heldout_of(source.have, source.heldout)
        kept_out -= np.arange(len(kept_out))  # how many of the others stand before each
        for block in passes(source.have, source.take, rng):
            instances = block + np.searchsorted(kept_out, block, side="right")
            out[filled : filled + len(block)] = instances.astype(np.uint64) | np.uint64(number << BITS)
            filled += len(block)
    assert filled == len(out)
    np.random.Generator(np.random.PCG64(seed)).shuffle(out)
    return out


def _room(count: int) -> Array:
    try:
        return np.empty(count, np.uint64)
    except (MemoryError, ValueError, OverflowError):  # the last two are NumPy's for what no machine can hold
        what = f"an order of {count:,} instances needs {human(8 * count)} of memory, more than there is"
        raise ConfigError(what, hint="lower the budget, or raise sequence_length") from None


def split(entries: Array) -> tuple[Array, Array]:
    """The source and the instance of each entry, int64."""
    return (entries >> np.uint64(BITS)).astype(np.int64), (entries & np.uint64((1 << BITS) - 1)).astype(np.int64)


def passes(have: int, take: int, rng: np.random.Generator) -> Iterator[Array]:
    """`take` numbers below `have`, in blocks: whole passes, then a part of one, so that counts differ by 1 at most."""
    whole, part = divmod(take, have) if have else (0, 0)
    assert whole * have + part == take, (have, take)
    for _ in range(whole):
        for first in range(0, have, BLOCK):
            yield np.arange(first, min(first + BLOCK, have))
    yield from sample(have, part, rng)


def sample(n: int, k: int, rng: np.random.Generator) -> Iterator[Array]:
    """k different numbers below n, each set equally likely, in blocks: how many fall into a block is drawn first."""
    for first in range(0, n, BLOCK):
        size, rest = min(BLOCK, n - first), max(n - first - BLOCK, 0)
        here = int(rng.hypergeometric(size, rest, k)) if rest else k
        yield first + rng.choice(size, here, replace=False, shuffle=False)
        k -= here
        if not k:
            return
