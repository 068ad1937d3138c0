"""Ways to thin a task vector: by magnitude, at random, without the outliers, at random by rank.

    way = THINNING["magnitude"](inputs, {"density": [0.2, 0.2]})
    way.thin(block, 0, delta)                # the task vector of source 0 in a block, zero where it goes
    way.masks(block)                         # the same for all sources, for compiled loops

Formulas: mergekit 0.1.5, `sparsify.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError
from surgery.merging.engine.inputs import Block, Inputs
from surgery.merging.engine.order_statistics import Found, Query, at_least, bits_of, limit_bits, number, order
from surgery.merging.engine.pool import KEPT
from surgery.merging.engine.random_masks import Bitmap, keys, shares
from surgery.merging.engine.ready import Options
from surgery.merging.engine.sparsity import NEVER, Bound, Mask, between, everything
from surgery.tensors.lazy import torch_dtype

if TYPE_CHECKING:
    import torch

Thin = Callable[[Block, int, "torch.Tensor"], "torch.Tensor"]  # block, source, delta -> delta, zero where it goes
Draw = Callable[[Block, int, "torch.Tensor"], Any]  # block, source, delta -> what stays: numpy's booleans, flat
Masks = Callable[[Block], Sequence[Mask]]


@dataclass(frozen=True)
class Thinning:
    """How task vectors are thinned.

    thin    of one source, by torch               masks   of all sources, for compiled loops
    span    how many dimensions it needs whole    bitmap  what is noted while the tensor is scanned
    """

    thin: Thin
    masks: Masks
    span: int = 0
    bitmap: Bitmap | None = None
    nbytes: int = 1024


def _none(inputs: Inputs, options: Options) -> Thinning:
    return Thinning(lambda block, i, delta: delta, lambda block: [everything(block)])


def _magnitude(inputs: Inputs, options: Options) -> Thinning:
    """The largest max(1, density * n) elements; of equal ones the first in the tensor."""
    n = inputs.numel
    queries = [Query(i, n - max(1, int(d * n)), True) for i, d in enumerate(options["density"]) if 0 < d < 1 and n]
    found = dict(zip((q.of for q in queries), order(inputs, _magnitudes, queries), strict=True))

    def thin(block: Block, i: int, delta: torch.Tensor) -> torch.Tensor:
        if options["density"][i] >= 1:
            return delta
        return _where_at_least(block, delta, found[i], True) if i in found else delta * 0

    bounds = [(0 if d >= 1 else found.get(i, NEVER), NEVER) for i, d in enumerate(options["density"])]
    return Thinning(thin, lambda block: between(block, bounds, True))


def _magnitudes(block: Block) -> list[Any]:
    if not block.loops:
        return [d.abs_() for d in block.deltas()]
    out = block.room("values", len(block.bits) - 1)
    for stored, own in zip(block.bits[1:], out, strict=True):
        block.loops.magnitudes(block.bits[0], stored, own)
    return list(out)


def _where_at_least(block: Block, delta: torch.Tensor, found: Found, first_wins: bool) -> torch.Tensor:
    """`delta` where its magnitude ranks as high as that of the element, or higher; else zero."""
    import torch

    bits = limit_bits(block, found, first_wins)
    if bits is None or delta.dtype.itemsize < 4:
        return delta * at_least(block, delta.abs(), found, first_wins)
    return torch.nn.functional.hardshrink(delta, number(bits - 1, found.wide)) if bits else delta


def _outliers(inputs: Inputs, options: Options) -> Thinning:
    """density * n elements, beginning behind the gamma * n largest; of equal ones, the last count as larger."""
    n = inputs.numel
    queries, ranges = [], []
    for i, (density, gamma) in enumerate(zip(options["density"], options["gamma"], strict=True)):
        target = int(density * n)
        low = max(0, n - target - int(gamma * n))
        ranges.append((low, low + target))
        if density < 1:
            queries += [Query(i, rank) for rank in (low, low + target) if 0 < rank < n]
    found = {(q.of, q.rank): f for q, f in zip(queries, order(inputs, _magnitudes, queries), strict=True)}

    def thin(block: Block, i: int, delta: torch.Tensor) -> torch.Tensor:
        if options["density"][i] >= 1:
            return delta
        low, high = ranges[i]
        if low >= high:
            return delta * 0
        above = _where_at_least(block, delta, found[i, high], False) if (i, high) in found else None
        kept = _where_at_least(block, delta, found[i, low], False) if (i, low) in found else delta
        return kept if above is None else kept - above

    def bound(i: int) -> tuple[Bound, Bound]:
        low, high = ranges[i]
        if options["density"][i] >= 1:
            return 0, NEVER
        return (NEVER, NEVER) if low >= high else (found.get((i, low), 0), found.get((i, high), NEVER))

    bounds = [bound(i) for i in range(inputs.count)]
    return Thinning(thin, lambda block: between(block, bounds, False))


@dataclass(frozen=True)
class Choice:
    """Elements chosen at random, each source with its density: those of 0 and 1 need no choice.

    draw      what is chosen of a block, a source and its task vector     compiled   the same in loops, into bytes
    bitmap    where what is chosen in the scan for the vectors' lengths is kept for the merge; None: it is not
    """

    densities: Sequence[float]
    draw: Draw
    compiled: Callable[[Block, int, Any], None] | None
    bitmap: Bitmap | None

    def thinning(self, span: int = 0) -> Thinning:
        return Thinning(self.thin, self.masks, span, self.bitmap, self.bitmap.nbytes if self.bitmap else 1024)

    def thin(self, block: Block, i: int, delta: torch.Tensor) -> torch.Tensor:
        import torch

        if self.densities[i] >= 1:
            return delta
        if self.densities[i] <= 0:
            return delta * 0
        chosen = self.known(block, i)
        if chosen is None:
            chosen = self.noted(block, i, self.draw(block, i, delta))
        return delta * torch.from_numpy(chosen.view("u1")).to(torch_dtype(block.inputs.work)).reshape(delta.shape)

    def masks(self, block: Block) -> list[Mask]:
        kept = block.room("kept", len(self.densities), 1)
        for i, (density, row) in enumerate(zip(self.densities, kept, strict=True)):
            if not 0 < density < 1:
                row[:] = density > 0
            elif (chosen := self.known(block, i)) is not None:
                row[:] = chosen.view("u1")
            else:
                if self.compiled:
                    self.compiled(block, i, row)
                else:
                    row[:] = self.draw(block, i, block.others[i] - block.base).view("u1")
                self.noted(block, i, row)
        return [everything(block, kept)]

    def known(self, block: Block, i: int) -> Any:
        """What was chosen before, as booleans; None if it was not kept."""
        return self.bitmap.get(i, block.runs()) if self.bitmap and self.bitmap.complete else None

    def noted(self, block: Block, i: int, chosen: Any) -> Any:
        if self.bitmap:
            self.bitmap.put(i, block.runs(), chosen)
        return chosen


def _bitmap(inputs: Inputs, options: Options) -> Bitmap | None:
    """Room for what is chosen, if the vectors are to be scaled and there is room."""
    nbytes = inputs.count * inputs.numel // 8
    fits = options["rescale"] and nbytes <= min(KEPT, inputs.engine.memory // 4)
    return Bitmap(inputs.count, inputs.numel) if fits else None


def _random(inputs: Inputs, options: Options) -> Thinning:
    """Each element with probability `density`."""
    import numpy as np

    if bad := [d for d in options["density"] if d < 0]:
        raise ConfigError(f"density is {bad[0]}, no probability")

    coarse, fine = np.array([keys((inputs.seed, inputs.name, i)) for i in range(inputs.count)], np.uint64).T.copy()
    how = coarse, fine, *shares(options["density"])

    def draw(block: Block, i: int, delta: torch.Tensor) -> Any:
        return block.below(i, options["density"][i])

    def compiled(block: Block, i: int, out: Any) -> None:
        starts, counts = (np.array(column) for column in zip(*block.runs(), strict=True))
        block.loops.choose(starts, counts, *(column[i] for column in how), out)

    # what compiled loops draw is drawn again sooner than it is kept
    choice = Choice(options["density"], draw, compiled, None if inputs.loops else _bitmap(inputs, options))
    if inputs.single or not all(0 < d < 1 for d in options["density"]):
        return choice.thinning()

    def masks(block: Block) -> Sequence[Mask]:
        (start, _), *more = block.runs()
        return choice.masks(block) if more else [everything(block, chance=(start, *how))]

    return replace(choice.thinning(), masks=masks)


def _ranks(inputs: Inputs, options: Options) -> Thinning:
    """With a probability from density - epsilon (the smallest of a row) to density + epsilon (the largest)."""
    import numpy as np
    import torch

    for d, e in zip(options["density"], options["epsilon"], strict=True):
        if 0 < d < 1 and (d + e >= 1 or d - e <= 0):
            raise ConfigError(f"density {d} and epsilon {e}: the probabilities do not lie between 0 and 1")

    def draw(block: Block, i: int, delta: torch.Tensor) -> Any:
        density, epsilon = options["density"][i], options["epsilon"][i]
        rows = delta if delta.dim() > 1 else delta.reshape(1, -1)
        return block.below(i, _chances(rows.shape[1], delta.dtype, density, epsilon)[ranks_in_rows(rows.abs())])

    def compiled(block: Block, i: int, out: Any) -> None:
        (start, _), *more = block.runs()
        assert not more, (inputs.name, block.box)  # whole rows follow each other
        shape = block.shape if len(block.shape) > 1 else (1, *block.shape)
        whole, rest = shares(_chances(shape[1], torch.float32, options["density"][i], options["epsilon"][i]))
        coarse, fine = (np.uint64(k) for k in keys((inputs.seed, inputs.name, i)))
        lines = shape[0], shape[1], math.prod(shape[2:])
        bits = block.bits
        block.loops.choose_by_rank(bits[0], bits[i + 1], lines, start, coarse, fine, whole, rest, out)

    # rows are the last dimension of a matrix; of stacked matrices (experts) each column of one, as in mergekit
    span = 2 if len(inputs.shape) > 2 else 1
    usable = compiled if len(inputs.shape) <= 3 else None
    return Choice(options["density"], draw, usable, _bitmap(inputs, options)).thinning(span)


@functools.lru_cache
def _chances(count: int, dtype: torch.dtype, density: float, epsilon: float) -> Any:
    """The probability of each rank among `count`, in fp64, rounded where mergekit rounds."""
    import torch

    ranks = torch.arange(count).to(dtype if dtype != torch.float16 else torch.float32) + 1
    chance = (density - epsilon) + ((ranks - ranks[0]) / (ranks[-1] - ranks[0])).clamp(0, 1) * 2 * epsilon
    return chance.nan_to_num(density).double().numpy()  # a row of one element has no range


def ranks_in_rows(magnitudes: torch.Tensor) -> Any:
    """The rank (from 0) of every element along dimension 1, as numpy's int64, flat; of equal ones the first is less.

    numpy sorts integers several times faster than anything sorts with the places: these become part of the integers.
    """
    import numpy as np
    import torch

    lines = magnitudes.movedim(1, -1)
    if magnitudes.dtype == torch.float64 or magnitudes.shape[1] >= 1 << 31:
        order = torch.sort(lines, dim=-1, stable=True).indices
    else:
        keys = (bits_of(lines).long() << 32) | torch.arange(lines.shape[-1])
        order = torch.from_numpy(np.sort(keys.numpy(), axis=-1)).bitwise_and_(0xFFFFFFFF)
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order))
    return ranks.movedim(-1, 1).reshape(-1).numpy()


THINNING: Mapping[str, Callable[[Inputs, Options], Thinning]] = {
    "": _none,
    "magnitude": _magnitude,
    "random": _random,
    "outliers": _outliers,
    "ranks": _ranks,
}
