"""Rows of a table applied: canonical parts <-> what each rank stores.

    ranks = spread(table, parts, spec, Topology(tp=2))    # {Rank(tp=0): {"layers.0.mlp.fc1.weight": Stored(...)}, ...}
    gather(table, shards, spec, Topology(tp=2)).parts     # the exact inverse

The parts of a row, each canonical as in `model.spec`, are joined along `*`; axes of a part that have no letter of their
own in the layout are its share of `*`.  A placeholder of the parts that is missing in the name ({l}, {e}) is an axis
of the layout.  `cut` names the axis (or adjacent axes) divided among tensor-parallel ranks; where there are fewer
key/value heads than ranks, neighbours hold copies.  `gather` is strict: nothing may be missing, nothing may be left
over, copies must be equal.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from surgery.errors import LayoutError, some
from surgery.formats.names import collapsed
from surgery.formats.replicas import mean, share, total
from surgery.formats.table import Bind, Row, Table, placeholders
from surgery.formats.topology import Rank, Topology
from surgery.model.spec import AXES, FIELDS, PARTS, Spec, template_of
from surgery.tensors.axes import STAR, Axes, Named, flat, shape_of
from surgery.tensors.extent import Extent
from surgery.tensors.lazy import Fill, Lazy, Map, Same
from surgery.units import divisors

_MATRIX: Axes = (("row",), ("column",))
Parts = Mapping[str, Lazy]


class Stored(NamedTuple):
    """A tensor of a rank's file; `copy` says that another rank (or name) stores the same data as well."""

    tensor: Lazy
    copy: bool = False


Shards = Mapping[Rank, Mapping[str, Lazy]]


@dataclass(frozen=True)
class Gathered:
    """What `gather` found: the parts, and the tensors that a rule left out, each with the reason."""

    parts: dict[str, Lazy]
    ignored: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------- one tensor, both ways


def weave(r: Row, bind: Bind, parts: Parts, spec: Spec, padded: Mapping[str, int]) -> Named:
    """Canonical parts -> the whole tensor of the format (before it is cut for the ranks)."""
    axes = tuple((a,) for a in flat(r.layout))
    sizes = r.measures(spec.sizes)
    strands = []
    for part, view, star in zip(r.parts, r.layouts, r.stars, strict=True):
        strand = _strand(part, bind, parts, spec)
        if r.views:
            strand = Named(strand.data, view, sizes)
        if (STAR,) in axes:
            strand = strand.to(tuple(star if a == (STAR,) else a for a in axes))
            strand = strand.rename(star, (STAR,), {STAR: math.prod(sizes[a] for a in star)})
        strands.append(strand)
    whole = Named.cat(strands, STAR)
    extra = padded[r.pad] - whole.sizes[r.pad] if r.pad else 0
    if extra:
        wide = whole.to(axes)
        shape = [extra if a == (r.pad,) else n for a, n in zip(axes, wide.data.shape, strict=True)]
        zeros = Named(Fill(shape, wide.data.dtype), axes, {**wide.sizes, r.pad: extra})
        whole = Named.cat([wide, zeros], r.pad)
    return whole.to(r.layout)


def _strand(part: str, bind: Bind, parts: Parts, spec: Spec) -> Named:
    """One part; where the name of the row lacks a placeholder, all of its values stacked into an axis."""
    free = [k for k in placeholders(part) if k not in bind]
    if not free:
        name = part.format(**bind)
        if name not in parts:
            raise LayoutError(f"the model has no {name}")
        return _named(name, parts[name], PARTS[part].layout, spec.sizes)
    key = free[0]
    each = [_strand(part, {**bind, key: i}, parts, spec) for i in range(spec.sizes[key])]
    one = [Named(t.data, t.axes, {**t.sizes, key: 1}) for t in each]
    return Named.cat([t.to(((key,), *t.axes)) for t in one], key)


def unweave(r: Row, bind: Bind, whole: Named, spec: Spec) -> Iterator[tuple[str, Lazy]]:
    """The whole tensor of the format -> its canonical parts: the exact inverse of `weave`, padding kept."""
    at = 0
    fused = STAR in flat(r.layout)
    sizes = r.measures(spec.sizes)
    for part, view, star in zip(r.parts, r.layouts, r.stars, strict=True):
        strand = whole
        if fused:
            width = math.prod(sizes[a] for a in star)
            strand = whole.take(STAR, at, at + width)
            at += width
            strand = strand.to(tuple((a,) for a in flat(strand.axes)))
            strand = strand.rename((STAR,), star, {a: sizes[a] for a in star})
        free = [k for k in placeholders(part) if k not in bind]
        for values in itertools.product(*(range(spec.sizes[k]) for k in free)):
            one = strand
            for key, i in zip(free, values, strict=True):
                one = one.take(key, i, i + 1)
            name = part.format(**bind, **dict(zip(free, values, strict=True)))
            yield name, one.to(view).data


def shard(r: Row, whole: Named, rank: int, tp: int) -> Stored:
    """The piece of a whole tensor that tensor-parallel rank `rank` of `tp` stores."""
    if tp == 1:
        return Stored(_claimed(r, whole))
    if r.summed:
        return Stored(Map(lambda t: share(t, rank, tp), (whole.data,)), rank > 0)
    if not r.cut:
        return Stored(_claimed(r, whole), rank > 0)
    n = math.prod(whole.sizes[a] for a in r.cut.split())
    if n % tp and (r.cut != "g" or tp % n):
        raise _Indivisible(r, n, tp)
    if n < tp:
        return Stored(_claimed(r, whole.take(r.cut, rank * n // tp, rank * n // tp + 1)), rank % (tp // n) > 0)
    return Stored(_claimed(r, whole.take(r.cut, rank * n // tp, (rank + 1) * n // tp)))


def _claimed(r: Row, whole: Named) -> Lazy:
    """The tensor in the layout of its row, under the dimensions that it claims."""
    if r.shape is None:
        return whole.to(r.layout).data
    rows, columns = shape_of(r.shape, whole.sizes)
    line = whole.to((flat(r.layout),))
    return line.rename(line.axes[0], ("row", "column"), {"row": rows, "column": columns}).to(_MATRIX).data


def _unclaimed(r: Row, name: str, data: Lazy, sizes: Mapping[str, int]) -> Named:
    """The inverse of `_claimed`: a stored tensor in the layout of its row."""
    if r.shape is None:
        return _named(name, data, r.layout, sizes)
    _named(name, data, r.shape, sizes)  # it must have the dimensions that it should claim
    if isinstance(data, Extent) and data.strides is None:
        data = Extent(data.file, data.offset, shape_of(r.layout, sizes), data.dtype, None, data.swap)
        return _named(name, data, r.layout, sizes)
    matrix = Named(data, _MATRIX, dict(zip(("row", "column"), data.shape, strict=True)))
    line = matrix.to((("row", "column"),))
    return line.rename(("row", "column"), flat(r.layout), {a: sizes[a] for a in flat(r.layout)}).to(r.layout)


def unshard(r: Row, pieces: Sequence[Lazy], sizes: Mapping[str, int], name: str) -> Named:
    """The ranks' pieces -> the whole tensor."""
    tp = len(pieces)
    if tp == 1:
        return _unclaimed(r, name, pieces[0], sizes)
    if r.summed:
        return _named(name, Map(total, pieces), r.layout, sizes)
    if not r.cut:
        return _unclaimed(r, name, Map(mean, pieces) if r.averaged else Same(pieces, name), sizes)
    names = r.cut.split()
    n = math.prod(sizes[a] for a in names)
    if n % tp and (r.cut != "g" or tp % n):
        raise _Indivisible(r, n, tp)
    local = {**sizes, **dict.fromkeys(names, 1), names[0]: max(n // tp, 1)}
    copies = max(tp // n, 1)  # neighbours that hold the same key/value head
    groups = [pieces[i : i + copies] for i in range(0, tp, copies)]
    each = [_unclaimed(r, name, Same(g, name) if len(g) > 1 else g[0], local) for g in groups]
    joined = Named.cat(each, r.cut)
    return Named(joined.data, joined.axes, {**joined.sizes, **{a: sizes[a] for a in names}}).to(r.layout)


def _named(name: str, data: Lazy, axes: Axes, sizes: Mapping[str, int]) -> Named:
    try:
        return Named(data, axes, sizes)
    except LayoutError as error:
        raise LayoutError(f"{name} {error.what}") from None


class _Indivisible(LayoutError):
    """An axis of a row has `n` entries (`counted`), which the ranks cannot share."""

    def __init__(self, r: Row, n: int, tp: int) -> None:
        self.n, self.name = n, r.name
        self.counted = f"{n} {' x '.join(_counted(axis) for axis in r.cut.split())}"
        super().__init__(f"cannot divide {self.counted} of {r.name} among {tp} ranks")


def _counted(axis: str) -> str:
    return (FIELDS[AXES[axis]].counted if axis in AXES else "") or f"'{axis}'"


# ------------------------------------------------------------------------------------------- whole checkpoints


def padded_sizes(table: Table, spec: Spec, topology: Topology) -> dict[str, int]:
    """Sizes of the axes as the format stores them: the vocabulary is rounded up."""
    multiple = table.vocab_multiple * (topology.tp if any(r.pad for r in table.rows) else 1)
    return {**spec.sizes, "v": -(-spec.vocab // multiple) * multiple}


def spread(table: Table, parts: Parts, spec: Spec, topology: Topology) -> dict[Rank, dict[str, Stored]]:
    """What each rank's files hold, all lazy.  Raises LayoutError with every row that does not fit."""
    out: dict[Rank, dict[str, Stored]] = {rank: {} for rank in topology.ranks()}
    sizes = padded_sizes(table, spec, topology)
    errors, hints, undivided = list[str](), list[str | None](), list[_Indivisible]()
    written: set[str] = set()
    for r, bind in table.live(spec, topology):
        if r.optional:
            continue
        try:
            whole = weave(r, bind, parts, spec, sizes)
            if r.cut and topology.tp > 1:
                whole = whole.split(r.cut)
            for home in _homes(r, bind, spec, topology):
                mine = _of_rank(r, whole, home.rank.ep, topology)
                piece = shard(r, mine, home.piece, home.pieces)
                out[home.rank][home.name] = piece._replace(copy=piece.copy or r.copy or not home.first)
        except _Indivisible as error:
            undivided.append(error)
        except LayoutError as error:
            errors.append(error.what)
            hints.append(error.hint)
        if not r.copy:
            written.update(_part_names(r, bind, spec))
    homeless = [name for name in spec.part_names() if name not in written]
    if homeless:
        errors.append(f"{table.name} has no place for {some(collapsed(homeless))}")
    if undivided:
        errors = [*_undivided(undivided, topology.tp), *errors]
        hints.insert(0, f"--tp {divisors(*(error.n for error in undivided))}")
    _raise(errors, next(filter(None, hints), None))
    return out


def _undivided(found: Sequence[_Indivisible], tp: int) -> list[str]:
    """What cannot be divided, each with the names of its rows."""
    names: dict[str, list[str]] = {}
    for error in found:
        names.setdefault(error.counted, []).append(error.name)
    return [f"cannot divide {counted} of {some(collapsed(rows))} among {tp} ranks" for counted, rows in names.items()]


def gather(table: Table, shards: Shards, spec: Spec, topology: Topology, spared: Collection[str] = ()) -> Gathered:
    """The canonical parts behind the ranks' files, all lazy.  Raises LayoutError naming every gap and surplus.

    `spared` are templates of parts that need not be there.
    """
    parts: dict[str, Lazy] = {}
    claimed: dict[Rank, set[str]] = {rank: set() for rank in shards}
    errors: list[str] = []
    missing: dict[str, list[str]] = {}
    for r, bind in table.live(spec, topology):
        if (r.optional or not set(r.parts).isdisjoint(spared)) and not _present(r, bind, shards, spec, topology):
            continue
        try:
            whole = _collect(r, bind, shards, spec, topology, claimed)
            for name, data in unweave(r, bind, whole, spec):
                parts[name] = Same((parts[name], data), name) if name in parts else data
        except _Missing as error:
            missing.setdefault(error.where, []).append(error.what)
        except LayoutError as error:
            errors.append(error.what)
    ignored, left = {}, []
    for rank, tensors in shards.items():
        for name in tensors.keys() - claimed[rank]:
            reason = next((why for rule, why in table.ignore if re.search(rule, name)), None)
            if reason is None:
                left.append(name)
            else:
                ignored[name] = reason
    for where, names in missing.items():
        errors.append(f"{some(collapsed(names))} {'is' if len(names) == 1 else 'are'} missing{where}")
    if left:
        odd = some(collapsed(sorted(set(left))))
        errors.append(f"{len(left)} tensors have no place in a {table.name} {spec.family}: {odd}")
    if not errors and (gaps := [n for n in spec.part_names() if n not in parts and template_of(n) not in spared]):
        errors.append(f"no tensor holds {some(collapsed(gaps))}")
    _raise(errors)
    return Gathered({n: _hinted(parts[n], table.unequal) for n in spec.part_names() if n in parts}, ignored)


def _hinted(part: Lazy, hint: str) -> Lazy:
    return Same(part.srcs, part.name, hint) if hint and isinstance(part, Same) else part


def _present(r: Row, bind: Bind, shards: Shards, spec: Spec, topology: Topology) -> bool:
    return any(home.name in shards.get(home.rank, {}) for home in _homes(r, bind, spec, topology))


def _collect(
    r: Row, bind: Bind, shards: Shards, spec: Spec, topology: Topology, claimed: dict[Rank, set[str]]
) -> Named:
    """The whole tensor of a row from the ranks that hold it."""
    homes = list(_homes(r, bind, spec, topology))
    found: dict[tuple[int, int], list[Lazy]] = {(home.group, home.piece): [] for home in homes}
    missing = []
    for home in homes:
        tensor = shards.get(home.rank, {}).get(home.name)
        if tensor is None:
            missing.append(home.name)
            continue
        claimed[home.rank].add(home.name)
        found[home.group, home.piece].append(tensor)
    name = r.named(bind)
    if missing or not all(found.values()):
        where = "" if len(shards) == 1 else f" (on {len(missing)} of {len(shards)} ranks)"
        raise _Missing(name, where)
    sizes = dict(r.measures(spec.sizes))
    sizes[STAR] = sum(math.prod(sizes[a] for a in star) for star in r.stars)
    groups = sorted({home.group for home in homes})
    if len(groups) > 1:
        sizes["e"] = spec.experts // len(groups)
    whole = []
    for group in groups:
        pieces = [found[group, i] for i in range(homes[0].pieces)]
        whole.append(unshard(r, [ts[0] if len(ts) == 1 else Same(ts, name) for ts in pieces], sizes, name))
    return Named.cat(whole, "e") if len(whole) > 1 else whole[0]


class _Missing(LayoutError):
    """A tensor is not there, on some ranks or on all."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(name)
        self.where = where


class _Home(NamedTuple):
    """A rank that stores a tensor, and under which name.

    It stores piece `piece` of `pieces`; `group` says which experts of a stack.  `first`: the others hold copies.
    """

    rank: Rank
    name: str
    piece: int
    pieces: int
    group: int
    first: bool


def _homes(r: Row, bind: Bind, spec: Spec, topology: Topology) -> Iterator[_Home]:
    """Every rank that stores a tensor."""
    local = dict(bind)
    pp, chunk = r.stage % topology.pp, (topology.vpp - 1 if r.stage < 0 else 0)
    if "l" in bind:
        pp, chunk, local["l"] = topology.places(spec.layers)[bind["l"]]
    if r.of_experts and spec.experts % topology.ep:
        raise LayoutError(f"cannot divide {spec.experts} experts among {topology.ep} ranks",
                          hint=f"--ep {divisors(spec.experts)}")  # fmt: skip
    owner = None
    if "e" in bind:
        owner, local["e"] = divmod(bind["e"], spec.experts // topology.ep)
    name = r.named(local)
    for tp, ep, piece, pieces, group, first in _holders(topology, r.of_experts, r.stacks_experts, owner):
        yield _Home(Rank(tp, pp, ep, chunk), name, piece, pieces, group, first)


@functools.lru_cache(maxsize=4096)
def _holders(
    topology: Topology, of_experts: bool, stacked: bool, owner: int | None
) -> tuple[tuple[int, int, int, int, int, bool], ...]:
    """Which ranks of a pipeline stage store a tensor, and what of it: (tp, ep, piece, pieces, group, first)."""
    pieces = topology.expert_tp if of_experts else topology.tp
    out, seen = [], set()
    for tp, ep in topology.grid():
        if owner is None or ep == owner:
            what = ep if stacked else 0, tp % pieces
            out.append((tp, ep, tp % pieces, pieces, what[0], what not in seen))
            seen.add(what)
    return tuple(out)


def _of_rank(r: Row, whole: Named, ep: int, topology: Topology) -> Named:
    """Of a stack of experts, those that an expert-parallel rank stores."""
    if not r.stacks_experts or topology.ep == 1:
        return whole
    n = whole.sizes["e"] // topology.ep
    return whole.take("e", ep * n, (ep + 1) * n).to(r.layout)


def _part_names(r: Row, bind: Bind, spec: Spec) -> Iterator[str]:
    for part in r.parts:
        free = [k for k in placeholders(part) if k not in bind]
        for values in itertools.product(*(range(spec.sizes[k]) for k in free)):
            yield part.format(**bind, **dict(zip(free, values, strict=True)))


def _raise(errors: Sequence[str], hint: str | None = None) -> None:
    if errors:
        unique = list(dict.fromkeys(errors))
        rest = f"\n  and {len(unique) - 8} more" if len(unique) > 8 else ""
        raise LayoutError("\n  ".join(unique[:8]) + rest, hint=hint)
