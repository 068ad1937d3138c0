"""A format as a table: `Row` says what a tensor of the format is made of, `Table` lists the rows.

    row("layers.{l}.mlp.fc1.weight", "mlp.gate", "mlp.up", layout="(* f) h", cut="f")
         name in the format           canonical parts       gate over up       tensor parallelism divides f

What is done with rows, in both directions, is in `weave`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from surgery.formats.topology import Topology
from surgery.model.spec import PARTS, Spec, full_template
from surgery.tensors.axes import Axes, flat, parse

Bind = dict[str, int]  # the values of a name's placeholders


@cache
def placeholders(name: str) -> tuple[str, ...]:
    """ "layers.{l}.experts.{e}.up" -> ("l", "e")."""
    return tuple(re.findall(r"\{(\w+)\}", name))


@dataclass(frozen=True)
class Row:
    """One line of a table: a tensor of the format, the parts that it is made of, and where its axes lie."""

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
    layers: Callable[[Spec, int], bool] | None = None  # which layers store the parts under this name; None: all
    shape: Axes | None = None  # the two dimensions that the tensor claims, where they are not those of its memory
    first: int = 0  # the number in the name of the first layer
    views: tuple[Axes, ...] = ()  # the parts' own layouts, where axes have to be split to describe the tensor
    sizes: tuple[tuple[str, int], ...] = ()  # of axes that only `views` and `layout` know
    averaged: bool = False  # copies that differ between the ranks are averaged

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The placeholders of the name."""
        return placeholders(self.name)

    @cached_property
    def stars(self) -> tuple[tuple[str, ...], ...]:
        """For each part, its axes that have no place of their own in the layout: they are merged into `*`."""
        here = set(flat(self.layout))
        return tuple(tuple(a for a in flat(layout) if a not in here) for layout in self.layouts)

    @cached_property
    def layouts(self) -> tuple[Axes, ...]:
        """The layouts of the parts, as far as this row needs to see into them."""
        return self.views or tuple(PARTS[p].layout for p in self.parts)

    def measures(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """The sizes of the model's axes and of those that only this row knows."""
        return {**sizes, **dict(self.sizes)} if self.sizes else sizes

    def named(self, bind: Mapping[str, int]) -> str:
        """The tensor's name, layers numbered as the format does."""
        return self.name.format(**{**bind, "l": bind["l"] + self.first} if "l" in bind else bind)

    @cached_property
    def of_experts(self) -> bool:
        """Whether the parts are the experts' own: the expert-parallel ranks divide them."""
        return any("{e}" in p for p in self.parts)

    @property
    def stacks_experts(self) -> bool:
        """Whether one tensor holds all of a rank's experts."""
        return self.of_experts and "e" not in self.keys

    def binds(self, spec: Spec) -> Iterator[Bind]:
        """The values of the name's placeholders for which the model has this tensor."""
        per_layer = any("{l}" in p for p in self.parts)
        layers = [i for i in range(spec.layers if per_layer else 1) if self._holds(spec, i)]
        if "l" not in self.keys:
            if layers and (not per_layer or len(layers) == spec.layers):  # a stack of layers holds all of them or none
                yield from ({"e": e} for e in range(spec.experts)) if "e" in self.keys else ({},)
            return
        for layer in layers:
            if "e" in self.keys:
                yield from ({"l": layer, "e": e} for e in range(spec.experts))
            else:
                yield {"l": layer}

    def _holds(self, spec: Spec, layer: int) -> bool:
        return all(spec.has(p, layer) for p in self.parts) and (self.layers is None or self.layers(spec, layer))


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
    layers: Callable[[Spec, int], bool] | None = None,
    shape: str | None = None,
    first: int = 0,
    views: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
    averaged: bool = False,
) -> Row:
    """A Row; parts inside layers are named without `layers.{l}.`, the layout is the first part's own by default.

    `views` give every part's layout with axes split further: "(g d) h" seen as "(g n x) h", x of the given `sizes`.
    """
    full = tuple(full_template(p) for p in parts)
    axes = parse(layout) if layout is not None else PARTS[full[0]].layout
    claimed = parse(shape) if shape is not None else None
    seen, own = tuple(parse(v) for v in views), tuple((sizes or {}).items())
    return Row(name, full, axes, cut, pad, stage, copy or optional, optional, summed, when, layers, claimed, first,
               seen, own, averaged)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A format's table.  `ignore` lists (pattern of names, why they carry nothing); `vocab_multiple` times tp is what
    the rows of padded tensors are a multiple of when they are written; `unequal` is a hint for copies that differ."""

    name: str
    rows: tuple[Row, ...]
    ignore: tuple[tuple[str, str], ...] = ()
    vocab_multiple: int = 1
    unequal: str = ""

    def live(self, spec: Spec, topology: Topology) -> Iterator[tuple[Row, Bind]]:
        for r in self.rows:
            if r.when is None or r.when(spec, topology):
                for bind in r.binds(spec):
                    yield r, bind
