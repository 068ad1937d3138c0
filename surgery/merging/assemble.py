"""The tensors of a merge: each with its sources, its dtypes and the method's options for it.

spec, parts, notes = assemble(recipe, opened, "fp32", engine)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import LayoutError, show, some
from surgery.formats.table import Row
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.weave import gather
from surgery.merging.engine.inputs import Inputs
from surgery.merging.engine.merged import Merged
from surgery.merging.engine.pending import narrower, pending
from surgery.merging.engine.pool import Engine
from surgery.merging.layers import Layer, depths_of, merged_spec, out_layers, span
from surgery.merging.methods.registry import METHODS
from surgery.merging.parameters import filters, resolve
from surgery.merging.reader import Reference
from surgery.merging.recipe import OutputSlice, Recipe, Source
from surgery.merging.references import Opened
from surgery.merging.view import hf_table, view
from surgery.merging.vocabulary import Alignment
from surgery.model.spec import VOCABULARY, Spec
from surgery.tensors.lazy import Lazy, cast

EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight")  # what serves as the head of a tied model


@dataclass(frozen=True)
class Tensor:
    """A tensor of the output: its name, the slice that says what is merged, the place t (0 to 1) for gradients."""

    name: str
    part: OutputSlice
    t: float
    vocabulary: bool


@dataclass(frozen=True)
class Given:
    """What one model gives to it: its place in the recipe, and the tensor, under its own name there."""

    source: Source
    name: str
    tensor: Lazy


def assemble(
    recipe: Recipe, opened: Opened, arithmetic: str, engine: Engine, alignment: Alignment | None = None
) -> tuple[Spec, dict[str, Lazy], list[str]]:
    """The spec and the lazy parts of the merge, and notes.  Raises LayoutError and ConfigError.

    `alignment` brings the vocabularies of the models to the same rows.
    """
    layers = out_layers(recipe, depths_of(opened))
    spec, notes = merged_spec(recipe, opened, layers, alignment.rows if alignment else None)
    table = hf_table(opened[recipe.donor])
    used = dict.fromkeys(source.model for s in recipe.slices for source in s.sources)
    views = {m: view(opened[m], table) for m in used}
    merged: dict[str, Lazy] = {}
    for row, bind in table.live(spec, ONE_RANK):
        if row.optional:
            continue
        layer = layers[bind["l"]] if "l" in bind else None
        tensor = _tensor(recipe, row, bind, layer)
        given = [_given(source, row, bind, layer, opened, views[source.model]) for source in tensor.part.sources]
        merged[tensor.name] = merged_tensor(recipe, tensor, given, arithmetic, engine, alignment)
    notes += idle_filters(recipe, merged)
    return spec, gather(table, {Rank(): merged}, spec, ONE_RANK).parts, notes


def idle_filters(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """A note on the filters that are part of no tensor's name, if there are any."""
    scopes = [recipe.settings, recipe.outer, *(s.settings for s in recipe.slices)]
    scopes += [source.settings for s in recipe.slices for source in s.sources]
    text = "\n".join(names)
    idle = sorted(show(f) for f in {f for scope in scopes for f in filters(scope)} - {"*"} if f not in text)
    return [f"no tensor's name holds the filter {some(idle)}"] if idle else []


def _tensor(recipe: Recipe, row: Row, bind: dict[str, int], layer: Layer | None) -> Tensor:
    """What stands before the layers belongs to the first slice, what stands behind them to the last."""
    part = layer.slice if layer else recipe.slices[0 if row.parts[0] in ("embed", "positions") else -1]
    return Tensor(row.name.format(**bind), part, layer.t if layer else 0.0, row.parts[0] in VOCABULARY)


def _given(
    source: Source, row: Row, bind: dict[str, int], layer: Layer | None, opened: Opened, tensors: dict[str, Lazy]
) -> Given:
    """The tensor of a model, of the layer that is meant there; of a tied model its embedding as the head."""
    name = row.name.format(**({**bind, "l": span(source, depths_of(opened))[0] + layer.offset} if layer else bind))
    if name not in tensors and row.parts[0] == "lm_head" and opened[source.model].spec.tied:
        name = next(n for n in tensors if n.endswith(EMBEDDINGS))
    if name not in tensors:
        raise LayoutError(f"{source.model} has no {name}")
    return Given(source, name, tensors[name])


def merged_tensor(
    recipe: Recipe, tensor: Tensor, given: Sequence[Given], arithmetic: str, engine: Engine,
    alignment: Alignment | None,
) -> Lazy:  # fmt: skip
    """One tensor of the output."""
    method, base = METHODS[recipe.method], tensor.part.base or recipe.base
    sources = {g.source.model: g.tensor for g in given}
    work, stored = dtypes(recipe, tensor.name, [t.dtype for t in sources.values()], arithmetic)
    if alignment and tensor.vocabulary:
        sources = alignment.apply({m: cast(s, work) for m, s in sources.items()}, base)
    if len({s.shape for s in sources.values()}) > 1:
        shapes = ", ".join(f"{m}: {list(s.shape)}" for m, s in sources.items())
        hint = "say which tokenizer to keep: tokenizer: {source: base}" if tensor.vocabulary else None
        raise LayoutError(f"{tensor.name} has different shapes: {shapes}", hint=hint)
    if method.base == "ignored":
        base = None
    order = sorted(sources, key=lambda m: m != base)  # the base first, the others as they come
    options = _options(recipe, tensor, {g.source.model: g for g in given}, order, base)
    lazies = [sources[m] for m in order]
    if recipe.method == "passthrough" and options["scale"] == [None]:
        return pending(lazies[0], stored)
    inputs = Inputs(tensor.name, lazies, None if base is None else 0, work, recipe.seed, engine)
    return pending(Merged(method.run, inputs, options, work if narrower(work, stored) else stored), stored)


def _options(
    recipe: Recipe, tensor: Tensor, given: dict[Reference, Given], order: Sequence[Reference], base: Reference | None
) -> dict[str, Any]:
    """What the method is told: of the whole tensor, and of every model that a parameter is for."""
    options: dict[str, Any] = {}
    above = [tensor.part.settings, recipe.settings, recipe.outer]
    for parameter in METHODS[recipe.method].parameters:
        if parameter.scope == "all":
            options[parameter.name] = resolve(parameter, above, tensor.name, tensor.t)
            continue
        takers = [m for m in order if parameter.scope == "input" or m != base]
        options[parameter.name] = [
            resolve(parameter, [given[m].source.settings, *above], given[m].name, tensor.t, str(m)) for m in takers
        ]
    return options


def dtypes(recipe: Recipe, name: str, kinds: Sequence[str], arithmetic: str) -> tuple[str, str]:
    """In which dtype a tensor is computed, and in which it is stored."""
    common = promoted(name, [recipe.dtype] if recipe.dtype else kinds)
    work = common if arithmetic == "mergekit" else "float64" if common == "float64" else "float32"
    return work, recipe.out_dtype or common


def promoted(name: str, kinds: Sequence[str]) -> str:
    """The dtype that holds all of these, as torch promotes them."""
    if odd := [k for k in kinds if k not in ("float64", "float32", "bfloat16", "float16")]:
        raise LayoutError(f"{name} is stored as {odd[0]}, which cannot be merged", hint="convert it to bf16 first")
    unique = set(kinds)
    if len(unique) == 1:
        return kinds[0]
    return "float64" if "float64" in unique else "float32"
