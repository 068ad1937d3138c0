"""Which layers of which models make the layers of the output, and the spec of that.

layers = out_layers(recipe, depths)          # how many layers each model has
layers[3].slice.sources, layers[3].offset, layers[3].t          # what is merged, and where gradients stand
spec, notes = merged_spec(recipe, opened, layers, rows=None)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.errors import LayoutError, some
from surgery.merging.reader import Reference
from surgery.merging.recipe import OutputSlice, Recipe, Source
from surgery.merging.references import Opened
from surgery.model.fields import CHOICE
from surgery.model.spec import FIELDS, Spec

# Fields of a Spec that no part shows: the donor's value is used and a note names each difference.  Routers that were
# trained to another score cannot be averaged.
SILENT = {n for n, field in FIELDS.items() if field.kind == CHOICE and not n.startswith("router_")} | {"context"}
FREE = ("family", "layers", "vocab", "true_vocab", "tied", "moe_layers")  # the merge has its own


Depths = Mapping[Reference, int]


@dataclass(frozen=True)
class Layer:
    """A layer of the output: its slice, how far into it, and the place t (0 to 1) for gradients."""

    slice: OutputSlice
    offset: int
    t: float


def depths_of(opened: Opened) -> Depths:
    return {model: checkpoint.spec.layers for model, checkpoint in opened.items()}


def out_layers(recipe: Recipe, depths: Depths) -> list[Layer]:
    """The layers of the output.  Raises LayoutError where a model has too few."""
    out: list[Layer] = []
    for s in recipe.slices:
        counts = {stop - start for start, stop in (span(source, depths) for source in s.sources)}
        if len(counts) != 1:
            names = ", ".join(f"{source.model} has {depths[source.model]}" for source in s.sources)
            raise LayoutError(f"the models have different numbers of layers: {names}",
                              hint="say with slices which layers to merge")  # fmt: skip
        n = counts.pop()
        out += [Layer(s, i, i / (n - 1) if n > 1 else 1.0) for i in range(n)]
    if not out:
        raise LayoutError("no slice has a layer", hint="layer_range is [first, behind the last]")
    return out


def span(source: Source, depths: Depths) -> tuple[int, int]:
    layers = depths[source.model]
    start, stop = source.layers or (0, layers)
    if stop > layers:
        raise LayoutError(f"layer_range [{start}, {stop}] of {source.model}: it has {layers} layers")
    return start, stop


def merged_spec(recipe: Recipe, opened: Opened, layers: Sequence[Layer], rows: int | None) -> tuple[Spec, list[str]]:
    """The donor's spec with the layers and rows of the merge, and notes on what else differs."""
    donor = opened[recipe.donor].spec
    used = list(dict.fromkeys(source.model for s in recipe.slices for source in s.sources))
    wrong, notes = [], []
    for model in used:
        for name, (ours, theirs) in donor.differences(opened[model].spec).items():
            if name in SILENT:
                notes.append(f"{name} of {model} is {_short(theirs)}; the merge has {_short(ours)}, as {recipe.donor}")
            elif name not in FREE:
                label = FIELDS[name].label
                wrong.append(f"{label} {_short(theirs)} in {model} and {_short(ours)} in {recipe.donor}")
    if wrong:
        raise LayoutError(f"the models do not fit together: {some(wrong)}",
                          hint="only models whose layers have the same sizes can be merged")  # fmt: skip
    tied = all(opened[m].spec.tied for m in used)
    if tied != donor.tied or any(opened[m].spec.tied != tied for m in used):
        notes.append("some models share the embedding with the head and others do not; the merge has both")
    first = [(layer.slice.sources[0], layer.offset) for layer in layers]
    origins = [(opened[s.model].spec, span(s, depths_of(opened))[0] + offset) for s, offset in first]
    windows = tuple(spec.windows[i] if spec.windows else 0 for spec, i in origins)
    sparse = tuple(n for n, (spec, i) in enumerate(origins) if spec.is_moe(i))
    spec = donor.replace(
        layers=len(layers),
        tied=tied,
        windows=windows if any(windows) else (),
        moe_layers=() if len(sparse) == len(layers) or not donor.experts else sparse,
    )
    if rows is not None:
        spec = spec.replace(vocab=rows, true_vocab=None)
    return spec, notes


def _short(value: object) -> str:
    return repr(value)[:60]
