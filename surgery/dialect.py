"""A format as a table, read in both directions: `Row`, `Dialect`, `Topology`.

    row("layers.{l}.mlp.fc1.weight", "mlp.gate", "mlp.up", layout="(* f) h", cut="f")
         name in the format           canonical parts       gate over up       tensor parallelism divides f

The parts of a row, each canonical as in `anatomy`, are joined along `*`; axes of a part that have no letter of their
own in the layout are its share of `*`.  A placeholder of the parts that is missing in the name ({l}, {e}) is an axis
of the layout.  `cut` names the axis (or adjacent axes) divided among tensor-parallel ranks; where there are fewer
key/value heads than ranks, neighbours hold copies.

`spread` turns parts into what each rank's files hold, `gather` is its exact inverse and strict: nothing may be
missing, nothing may be left over, copies must be equal.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

from surgery.anatomy import PARTS, Spec, full_template
from surgery.axes import STAR, Axes, Named, flat, parse, pattern
from surgery.errors import LayoutError, some
from surgery.lazy import Fill, Lazy, Map, Same

Bind = dict[str, int]
Parts = Mapping[str, Lazy]


class Rank(NamedTuple):
    """Who stores a tensor: the tensor-, pipeline- and expert-parallel rank, and the virtual pipeline chunk."""

    tp: int = 0
    pp: int = 0
    ep: int = 0
    chunk: int = 0


class Stored(NamedTuple):
    """A tensor of a rank's file; `copy` says that another rank (or name) stores the same data as well."""

    tensor: Lazy
    copy: bool = False


Shards = Mapping[Rank, Mapping[str, Lazy]]


@dataclass(frozen=True)
class Topology:
    """How many ranks share the tensors: tp divides the `cut` axes, pp the layers, ep the experts.

    `vpp` chunks of layers per pipeline stage (interleaved schedule); `stages` gives, for uneven pipelines, how many
    layers each (chunk, stage) holds, chunk by chunk in the order of the layers.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    vpp: int = 1
    stages: tuple[int, ...] = ()

    def layer_counts(self, layers: int) -> tuple[int, ...]:
        """Layers per (chunk, stage), in the order of the layers."""
        slots = self.pp * self.vpp
        if self.stages:
            if len(self.stages) != slots or sum(self.stages) != layers:
                raise LayoutError(f"stages of {list(self.stages)} layers do not make {layers} layers on {slots} stages")
            return self.stages
        if layers % slots:
            raise LayoutError(
                f"cannot divide {layers} layers among {slots} pipeline stages", hint="choose another --pp"
            )
        return (layers // slots,) * slots

    @cache  # noqa: B019  a frozen record of a few numbers: asked once per tensor, kept by the few topologies there are
    def places(self, layers: int) -> list[tuple[int, int, int]]:
        """For every layer: its pipeline stage, its chunk and its number there."""
        counts = self.layer_counts(layers)
        return [(slot % self.pp, slot // self.pp, i) for slot, count in enumerate(counts) for i in range(count)]

    def ranks(self) -> Iterator[Rank]:
        for pp, ep, tp, chunk in itertools.product(*(range(n) for n in (self.pp, self.ep, self.tp, self.vpp))):
            yield Rank(tp, pp, ep, chunk)


ONE_RANK = Topology()


@dataclass(frozen=True)
class Row:
    """One line of a dialect: a tensor of the format, the parts that it is made of, and where its axes lie."""

    name: str
    parts: tuple[str, ...]
    layout: Axes
    cut: str = ""
    pad: str = ""  # the axis that is padded with rows of zeros (the vocabulary)
    stage: int = 0  # pipeline stage of rows without {l}: 0 is the first, -1 the last
    copy: bool = False  # another row stores these parts too; this is the second copy
    optional: bool = False  # read (and compared) where it is found, never written: an old or redundant copy
    summed: bool = False  # the ranks' tensors add up to the part (each is written as 1/tp of it)
    when: Callable[[Spec, Topology], bool] | None = None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The placeholders of the name."""
        return tuple(re.findall(r"\{(\w+)\}", self.name))

    @cached_property
    def stars(self) -> tuple[tuple[str, ...], ...]:
        """For each part, its axes that have no place of their own in the layout: they are merged into `*`."""
        here = set(flat(self.layout))
        return tuple(tuple(a for a in flat(PARTS[p].layout) if a not in here) for p in self.parts)

    def binds(self, spec: Spec) -> Iterator[Bind]:
        """The values of the name's placeholders for which the model has this tensor."""
        per_layer = any("{l}" in p for p in self.parts)
        layers = [i for i in range(spec.l if per_layer else 1) if all(spec.has(p, i) for p in self.parts)]
        if "l" not in self.keys:
            if layers and (not per_layer or len(layers) == spec.l):  # a stack of layers holds all of them or none
                yield from ({"e": e} for e in range(spec.e)) if "e" in self.keys else ({},)
            return
        for layer in layers:
            if "e" in self.keys:
                yield from ({"l": layer, "e": e} for e in range(spec.e))
            else:
                yield {"l": layer}


def row(
    name: str,
    *parts: str,
    layout: str | None = None,
    cut: str = "",
    pad: str = "",
    stage: int = 0,
    copy: bool = False,
    optional: bool = False,
    summed: bool = False,
    when: Callable[[Spec, Topology], bool] | None = None,
) -> Row:
    """A Row; parts inside layers are named without `layers.{l}.`, the layout is the first part's own by default."""
    full = tuple(full_template(p) for p in parts)
    axes = parse(layout) if layout is not None else PARTS[full[0]].layout
    return Row(name, full, axes, cut, pad, stage, copy or optional, optional, summed, when)


@dataclass(frozen=True)
class Dialect:
    """A format's table.  `ignore` lists (pattern of names, why they carry nothing); `vocab_multiple` times tp is what
    the rows of padded tensors are a multiple of when they are written."""

    name: str
    rows: tuple[Row, ...]
    ignore: tuple[tuple[str, str], ...] = ()
    vocab_multiple: int = 1

    def live(self, spec: Spec, topology: Topology) -> Iterator[tuple[Row, Bind]]:
        for r in self.rows:
            if r.when is None or r.when(spec, topology):
                for bind in r.binds(spec):
                    yield r, bind


@dataclass(frozen=True)
class Gathered:
    """What `gather` found: the parts, and the tensors that a rule left out, each with the reason."""

    parts: dict[str, Lazy]
    ignored: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------- one tensor, both ways


def weave(r: Row, bind: Bind, parts: Parts, spec: Spec, padded: Mapping[str, int]) -> Named:
    """Canonical parts -> the whole tensor of the format (before it is cut for the ranks)."""
    axes = tuple((a,) for a in flat(r.layout))
    strands = []
    for part, star in zip(r.parts, r.stars, strict=True):
        strand = _strand(part, bind, parts, spec)
        if (STAR,) in axes:
            strand = strand.to(tuple(star if a == (STAR,) else a for a in axes))
            strand = strand.rename(star, (STAR,), {STAR: math.prod(spec.sizes[a] for a in star)})
        strands.append(strand)
    whole = Named.cat(strands, STAR)
    extra = padded[r.pad] - whole.sizes[r.pad] if r.pad else 0
    if extra:
        wide = whole.to(axes)
        shape = [extra if a == (r.pad,) else n for a, n in zip(axes, wide.data.shape, strict=True)]
        zeros = Named(Fill(shape, wide.data.kind), axes, {**wide.sizes, r.pad: extra})
        whole = Named.cat([wide, zeros], r.pad)
    return whole.to(r.layout)


def _strand(part: str, bind: Bind, parts: Parts, spec: Spec) -> Named:
    """One part; where the name of the row lacks a placeholder, all of its values stacked into an axis."""
    free = [k for k in re.findall(r"\{(\w+)\}", part) if k not in bind]
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
    for part, star in zip(r.parts, r.stars, strict=True):
        strand = whole
        if fused:
            width = math.prod(spec.sizes[a] for a in star)
            strand = whole.take(STAR, at, at + width)
            at += width
            strand = strand.to(tuple((a,) for a in flat(strand.axes)))
            strand = strand.rename((STAR,), star, {a: spec.sizes[a] for a in star})
        free = [k for k in re.findall(r"\{(\w+)\}", part) if k not in bind]
        for values in itertools.product(*(range(spec.sizes[k]) for k in free)):
            one = strand
            for key, i in zip(free, values, strict=True):
                one = one.take(key, i, i + 1)
            name = part.format(**bind, **dict(zip(free, values, strict=True)))
            yield name, one.to(PARTS[part].layout).data


def shard(r: Row, whole: Named, rank: int, tp: int) -> Stored:
    """The piece of a whole tensor that tensor-parallel rank `rank` of `tp` stores."""
    if tp == 1:
        return Stored(whole.data)
    if r.summed:
        return Stored(Map(lambda t: t / tp, (whole.data,)), rank > 0)
    if not r.cut:
        return Stored(whole.data, rank > 0)
    n = math.prod(whole.sizes[a] for a in r.cut.split())
    if n % tp and (r.cut != "g" or tp % n):
        raise LayoutError(_indivisible(r, n, tp))
    if n < tp:
        return Stored(whole.take(r.cut, rank * n // tp, rank * n // tp + 1).to(r.layout).data, rank % (tp // n) > 0)
    return Stored(whole.take(r.cut, rank * n // tp, (rank + 1) * n // tp).to(r.layout).data)


def unshard(r: Row, pieces: Sequence[Lazy], sizes: Mapping[str, int], name: str) -> Named:
    """The ranks' pieces -> the whole tensor."""
    tp = len(pieces)
    if tp == 1:
        return _named(name, pieces[0], r.layout, sizes)
    if r.summed:
        return _named(name, Map(lambda *ts: sum(ts[1:], ts[0].float()).to(ts[0].dtype), pieces), r.layout, sizes)
    if not r.cut:
        return _named(name, Same(pieces, name), r.layout, sizes)
    names = r.cut.split()
    n = math.prod(sizes[a] for a in names)
    if n % tp and (r.cut != "g" or tp % n):
        raise LayoutError(_indivisible(r, n, tp))
    local = {**sizes, **dict.fromkeys(names, 1), names[0]: max(n // tp, 1)}
    copies = max(tp // n, 1)  # neighbours that hold the same key/value head
    groups = [pieces[i : i + copies] for i in range(0, tp, copies)]
    each = [_named(name, Same(g, name) if len(g) > 1 else g[0], r.layout, local) for g in groups]
    joined = Named.cat(each, r.cut)
    return Named(joined.data, joined.axes, {**joined.sizes, **{a: sizes[a] for a in names}}).to(r.layout)


def _named(name: str, data: Lazy, axes: Axes, sizes: Mapping[str, int]) -> Named:
    try:
        return Named(data, axes, sizes)
    except LayoutError as error:
        raise LayoutError(f"{name} {error.what}") from None


def _indivisible(r: Row, n: int, tp: int) -> str:
    return f"cannot divide {n} x {r.cut!r} of {r.name} ({pattern(r.layout)}) among {tp} ranks"


# ------------------------------------------------------------------------------------------- whole checkpoints


def padded_sizes(dialect: Dialect, spec: Spec, topology: Topology) -> dict[str, int]:
    """Sizes of the axes as the format stores them: the vocabulary is rounded up."""
    multiple = dialect.vocab_multiple * (topology.tp if any(r.pad for r in dialect.rows) else 1)
    return {**spec.sizes, "v": -(-spec.v // multiple) * multiple}


def spread(dialect: Dialect, parts: Parts, spec: Spec, topology: Topology) -> dict[Rank, dict[str, Stored]]:
    """What each rank's files hold, all lazy.  Raises LayoutError with every row that does not fit."""
    out: dict[Rank, dict[str, Stored]] = {rank: {} for rank in topology.ranks()}
    sizes = padded_sizes(dialect, spec, topology)
    errors, written = [], set()
    for r, bind in dialect.live(spec, topology):
        if r.optional:
            continue
        try:
            whole = weave(r, bind, parts, spec, sizes)
            for rank, name, first in _homes(r, bind, spec, topology):
                piece = shard(r, whole, rank.tp, topology.tp)
                out[rank][name] = piece._replace(copy=piece.copy or r.copy or not first)
        except LayoutError as error:
            errors.append(error.what)
        if not r.copy:
            written.update(_part_names(r, bind, spec))
    homeless = [name for name in spec.part_names() if name not in written]
    if homeless:
        errors.append(f"{dialect.name} has no place for {some(homeless)}")
    _raise(errors)
    return out


def gather(dialect: Dialect, shards: Shards, spec: Spec, topology: Topology) -> Gathered:
    """The canonical parts behind the ranks' files, all lazy.  Raises LayoutError naming every gap and surplus."""
    parts: dict[str, Lazy] = {}
    claimed: dict[Rank, set[str]] = {rank: set() for rank in shards}
    errors: list[str] = []
    for r, bind in dialect.live(spec, topology):
        if r.optional and not _present(r, bind, shards, spec, topology):
            continue
        try:
            whole = _collect(r, bind, shards, spec, topology, claimed)
            for name, data in unweave(r, bind, whole, spec):
                parts[name] = Same((parts[name], data), name) if name in parts else data
        except LayoutError as error:
            errors.append(error.what)
    ignored, left = {}, []
    for rank, tensors in shards.items():
        for name in tensors.keys() - claimed[rank]:
            reason = next((why for rule, why in dialect.ignore if re.search(rule, name)), None)
            if reason is None:
                left.append(name)
            else:
                ignored[name] = reason
    if left:
        errors.append(f"{len(left)} tensors have no place in a {dialect.name} {spec.family}: {some(sorted(set(left)))}")
    if not errors:
        missing = [name for name in spec.part_names() if name not in parts]
        if missing:
            errors.append(f"no tensor holds {some(missing)}")
    _raise(errors)
    return Gathered({name: parts[name] for name in spec.part_names()}, ignored)


def _present(r: Row, bind: Bind, shards: Shards, spec: Spec, topology: Topology) -> bool:
    return any(name in shards.get(rank, {}) for rank, name, _ in _homes(r, bind, spec, topology))


def _collect(
    r: Row, bind: Bind, shards: Shards, spec: Spec, topology: Topology, claimed: dict[Rank, set[str]]
) -> Named:
    """The whole tensor of a row from the ranks that hold it."""
    found: dict[int, list[Lazy]] = {tp: [] for tp in range(topology.tp)}
    missing = []
    for rank, name, _ in _homes(r, bind, spec, topology):
        tensor = shards.get(rank, {}).get(name)
        if tensor is None:
            missing.append(name)
            continue
        claimed[rank].add(name)
        found[rank.tp].append(tensor)
    name = r.name.format(**bind)
    if missing or not all(found.values()):
        where = "" if len(shards) == 1 else f" (on {len(missing)} of {len(shards)} ranks)"
        raise LayoutError(f"{name} is missing{where}")
    pieces = [ts[0] if len(ts) == 1 else Same(ts, name) for ts in found.values()]
    joined = sum(math.prod(spec.sizes[a] for a in star) for star in r.stars)
    return unshard(r, pieces, {**spec.sizes, STAR: joined}, name)


def _homes(r: Row, bind: Bind, spec: Spec, topology: Topology) -> Iterator[tuple[Rank, str, bool]]:
    """Every rank that stores a tensor, its name there, and whether it is the first (the others hold copies)."""
    local = dict(bind)
    pp, chunk = r.stage % topology.pp, (topology.vpp - 1 if r.stage < 0 else 0)
    if "l" in bind:
        pp, chunk, local["l"] = topology.places(spec.l)[bind["l"]]
    eps: Iterable[int] = range(topology.ep)
    if "e" in bind:
        if spec.e % topology.ep:
            raise LayoutError(f"cannot divide {spec.e} experts among {topology.ep} ranks", hint="choose another --ep")
        ep, local["e"] = divmod(bind["e"], spec.e // topology.ep)
        eps = (ep,)
    name = r.name.format(**local)
    for i, ep in enumerate(eps):
        for tp in range(topology.tp):
            yield Rank(tp, pp, ep, chunk), name, i == 0


def _part_names(r: Row, bind: Bind, spec: Spec) -> Iterator[str]:
    for part in r.parts:
        free = [k for k in re.findall(r"\{(\w+)\}", part) if k not in bind]
        for values in itertools.product(*(range(spec.sizes[k]) for k in free)):
            yield part.format(**bind, **dict(zip(free, values, strict=True)))


def _raise(errors: Sequence[str]) -> None:
    if errors:
        unique = list(dict.fromkeys(errors))
        rest = f"\n  and {len(unique) - 8} more" if len(unique) > 8 else ""
        raise LayoutError("\n  ".join(unique[:8]) + rest)
