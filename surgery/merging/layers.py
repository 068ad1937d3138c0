"""Which layers of which models make each tensor of the output, and with which parameters.

    spec, parts, notes = assemble(recipe, opened, "fp32", engine)

Tensors are merged as mergekit sees them: under Hugging Face's names, experts stacked as transformers 5 has them, so
that filters, norms and thresholds mean the same.  Any format gets there and back through Hugging Face's table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import LayoutError, show, some
from surgery.formats.base import Checkpoint
from surgery.formats.hf.config import choose_family
from surgery.formats.hf.table import table
from surgery.formats.table import ONE_RANK, Dialect, Rank, Stored, gather, spread
from surgery.merging.engine.inputs import Inputs
from surgery.merging.engine.merged import Merged
from surgery.merging.engine.pool import Engine
from surgery.merging.methods.registry import METHODS
from surgery.merging.parameters import filters, resolve
from surgery.merging.reader import Reference
from surgery.merging.recipe import OutputSlice, Recipe, Source
from surgery.model.fields import CHOICE
from surgery.model.spec import FIELDS, VOCABULARY, Spec
from surgery.tensors.lazy import Lazy, cast

STACKED = ("model.layers.0.mlp.experts.gate_up_proj",)
# Fields of a Spec that no part shows: the donor's value is used and a note names each difference.  Routers that were
# trained to another score cannot be averaged.
SILENT = {n for n, field in FIELDS.items() if field.kind == CHOICE and not n.startswith("router_")} | {"context"}
FREE = ("family", "layers", "vocab", "true_vocab", "tied", "moe_layers")  # the merge has its own
Opened = Mapping[Reference, Checkpoint]
Aligner = Callable[[Mapping[Reference, Lazy], Reference | None], Mapping[Reference, Lazy]]


@dataclass(frozen=True)
class Layer:
    """A layer of the output: its slice, how far into it, and the place t (0 to 1) for gradients."""

    slice: OutputSlice
    offset: int
    t: float


def hf_family(checkpoint: Checkpoint) -> str:
    """The model_type under which a model is merged."""
    return checkpoint.spec.family if checkpoint.format == "hf" else choose_family(checkpoint.spec)


def view(checkpoint: Checkpoint, dialect: Dialect) -> dict[str, Lazy]:
    """The tensors of a checkpoint under Hugging Face's names."""
    stored: Mapping[str, Stored] = spread(dialect, checkpoint.parts, checkpoint.spec, ONE_RANK)[Rank()]
    return {name: s.tensor for name, s in stored.items()}


def out_layers(recipe: Recipe, opened: Opened) -> list[Layer]:
    """The layers of the output.  Raises LayoutError where a model has too few."""
    out: list[Layer] = []
    for s in recipe.slices:
        counts = {_span(source, opened)[1] - _span(source, opened)[0] for source in s.sources}
        if len(counts) != 1:
            names = ", ".join(f"{source.model} has {opened[source.model].spec.layers}" for source in s.sources)
            raise LayoutError(f"the models have different numbers of layers: {names}",
                              hint="say with slices which layers to merge")  # fmt: skip
        n = counts.pop()
        out += [Layer(s, i, i / (n - 1) if n > 1 else 1.0) for i in range(n)]
    return out


def _span(source: Source, opened: Opened) -> tuple[int, int]:
    layers = opened[source.model].spec.layers
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
                wrong.append(f"{name} is {_short(theirs)} in {model}, {_short(ours)} in {recipe.donor}")
    if wrong:
        raise LayoutError(f"the models do not fit together: {some(wrong)}")
    tied = all(opened[m].spec.tied for m in used)
    if tied != donor.tied or any(opened[m].spec.tied != tied for m in used):
        notes.append("some models share the embedding with the head and others do not; the merge has both")
    first = [(layer.slice.sources[0], layer.offset) for layer in layers]
    origins = [(opened[s.model].spec, _span(s, opened)[0] + offset) for s, offset in first]
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


def assemble(
    recipe: Recipe, opened: Opened, arithmetic: str, engine: Engine, align: Aligner | None = None,
    rows: int | None = None,
) -> tuple[Spec, dict[str, Lazy], list[str]]:  # fmt: skip
    """The spec and the lazy parts of the merge, and notes.  Raises LayoutError and ConfigError.

    `align` brings the vocabularies of the models to the same `rows`.
    """
    layers = out_layers(recipe, opened)
    spec, notes = merged_spec(recipe, opened, layers, rows)
    dialect = table(hf_family(opened[recipe.donor]), STACKED if spec.experts else ())
    used = list(dict.fromkeys(source.model for s in recipe.slices for source in s.sources))
    views = {m: view(opened[m], dialect) for m in used}
    merged: dict[str, Lazy] = {}
    unused = _all_filters(recipe)
    for row, bind in dialect.live(spec, ONE_RANK):
        if row.optional:
            continue
        name = row.name.format(**bind)
        unused -= {f for f in unused if f in name}
        layer = layers[bind["l"]] if "l" in bind else None
        part = layer.slice if layer else recipe.slices[0 if row.parts[0] in ("embed", "positions") else -1]
        sources = []
        for source in part.sources:
            at = row.name.format(**{**bind, "l": _span(source, opened)[0] + layer.offset}) if layer else name
            own = views[source.model]
            if at not in own and row.parts[0] == "lm_head" and opened[source.model].spec.tied:
                at = next(n for n in own if n.endswith(("embed_tokens.weight", "embed_in.weight")))
            if at not in own:
                raise LayoutError(f"{source.model} has no {at}")
            sources.append((source, at, own[at]))
        vocabulary = row.parts[0] in VOCABULARY
        merged[name] = _tensor(recipe, name, part, sources, layer.t if layer else 0.0, arithmetic, engine,
                               align if vocabulary else None, vocabulary)  # fmt: skip
    if unused - {"*"}:
        notes.append(f"no tensor's name holds the filter {some(sorted(show(f) for f in unused - {'*'}))}")
    return spec, gather(dialect, {Rank(): merged}, spec, ONE_RANK).parts, notes


def _all_filters(recipe: Recipe) -> set[str]:
    scopes = [recipe.settings, recipe.outer, *(s.settings for s in recipe.slices)]
    scopes += [source.settings for s in recipe.slices for source in s.sources]
    return {f for scope in scopes for f in filters(scope)}


def _tensor(
    recipe: Recipe, name: str, part: OutputSlice, found: Sequence[tuple[Source, str, Lazy]], t: float, arithmetic: str,
    engine: Engine, align: Aligner | None, vocabulary: bool,
) -> Lazy:  # fmt: skip
    """One tensor of the output."""
    method = METHODS[recipe.method]
    sources = {source.model: tensor for source, _, tensor in found}
    common = promoted(name, [recipe.dtype] if recipe.dtype else [s.dtype for s in sources.values()])
    kind = recipe.out_dtype or common
    work = common if arithmetic == "mergekit" else "float64" if common == "float64" else "float32"
    named_base = part.base or recipe.base
    if align:
        sources = dict(align({m: cast(s, work) for m, s in sources.items()}, named_base))
    if len({s.shape for s in sources.values()}) > 1:
        shapes = ", ".join(f"{m}: {list(s.shape)}" for m, s in sources.items())
        hint = "say which tokenizer to keep: tokenizer: {source: base}" if vocabulary else None
        raise LayoutError(f"{name} has different shapes: {shapes}", hint=hint)
    base = None if method.base == "ignored" else named_base
    order = [m for m in sources if m == base] + [m for m in sources if m != base]
    if method.base == "ignored":
        order = list(sources)
    options: dict[str, Any] = {}
    above = [part.settings, recipe.settings, recipe.outer]
    for parameter in method.parameters:
        if parameter.scope == "all":
            options[parameter.name] = resolve(parameter, above, name, t)
            continue
        takers = [m for m in order if parameter.scope == "input" or m != base]
        own = {source.model: (source, at) for source, at, _ in found}
        options[parameter.name] = [
            resolve(parameter, [own[m][0].settings, *above], own[m][1], t, str(m)) for m in takers
        ]
    lazies = [sources[m] for m in order]
    if recipe.method == "passthrough" and options["scale"] == [None]:
        return cast(lazies[0], kind)
    inputs = Inputs(name, lazies, 0 if base is not None else None, work, recipe.seed, engine)
    return Merged(method.run, inputs, options, kind)


def promoted(name: str, kinds: Sequence[str]) -> str:
    """The dtype that holds all of these, as torch promotes them."""
    if odd := [k for k in kinds if k not in ("float64", "float32", "bfloat16", "float16")]:
        raise LayoutError(f"{name} is stored as {odd[0]}, which cannot be merged", hint="convert it to bf16 first")
    unique = set(kinds)
    if len(unique) == 1:
        return kinds[0]
    return "float64" if "float64" in unique else "float32"
