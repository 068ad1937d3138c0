"""A transformers model from a checkpoint of any format, and a checkpoint from the model as it is now.

    source = with_family(open_checkpoint("Llama-2-7b"))             # Meta's files, say
    model, digest = load(source, torch.float32, "cuda")             # weights go from the files into the module
    now = checkpoint_of(weights_now(model, {}), source, step=500)   # parts in memory: plan_for(now, Write(to="olmo"))

Nothing is written between, and no weight is in memory twice: the module is built without memory, and each parameter is
filled block by block from the parts it is woven of.  Every element of every part must be read exactly once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from surgery.errors import LayoutError, some
from surgery.formats.base import RUN, Checkpoint
from surgery.formats.hf.table import table
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.weave import gather
from surgery.midtraining import parallel
from surgery.midtraining.attention_experts import empty_with_attention_experts
from surgery.midtraining.parallel import World
from surgery.midtraining.sharding import Place, at_rest, place_of
from surgery.running.device import Device
from surgery.running.layerwise import empty_model, weights_of
from surgery.running.loading import explained, quiet
from surgery.tensors.fingerprint import MASK, NOTHING, Counts, Ledger
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import ITEMSIZE, Box, Lazy, boxes, cast, inside, lengths
from surgery.writing.ahead import ahead
from surgery.writing.stream import block_limit

NOISE = re.compile("(?<!classifier_)(?<!summary_first_)dropout$|_pdrop$|jitter_noise$|_jitter_eps$")  # keys of configs
BLOCK = 32 << 20  # bytes of the file that are read at once


def load(
    source: Checkpoint, dtype: torch.dtype, device: str, *, attention: str = "sdpa", experts: str = "eager",
    dropout: float = 0.0, progress: Callable[[int], None] | None = None,
) -> tuple[Any, str]:  # fmt: skip
    """The model, ready to be trained, and the digest of the weights that it was filled with: `build` and `fill`."""
    model = build(source, dtype, device, attention=attention, experts=experts, dropout=dropout)
    return model, fill(model, source, World(device=device), progress)


def build(
    source: Checkpoint, dtype: torch.dtype, device: str, *, attention: str = "sdpa", experts: str = "eager",
    dropout: float = 0.0,
) -> Any:  # fmt: skip
    """The model without memory for its weights, which then can be divided among processes.

    Parameters have `dtype`; `attention` and `experts` are transformers' names; `dropout` is that of all places where
    the family has one.  Raises ConfigError if transformers has no such model.
    """
    name = str(dtype).removeprefix("torch.")
    with explained("transformers cannot hold the model", source.path), quiet():
        empty = empty_with_attention_experts if source.spec.attn_experts else empty_model
        model = empty(source, name, Device(device), attention, experts)
    model.config.use_cache = False
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # its balance loss is not ours
    _drop(model, dropout)
    return model.train()


def fill(model: Any, source: Checkpoint, world: World, progress: Callable[[int], None] | None = None) -> str:
    """Give it memory and the weights of the source; returns their digest.

    A process reads only what it holds.  `progress` is told bytes of the source.  Raises LayoutError if a part of the
    source is left over, or one of the model.
    """
    ledger = Ledger()
    tapped = replace(source, parts={name: ledger.tap(name, part) for name, part in source.parts.items()})
    weights = weights_of(model, tapped)
    for size, seen in filled(allocate(model, world.device), weights, ledger, world):
        ledger.add(seen)
        if progress:
            progress(size)
    _add_up(ledger, world)
    if gaps := ledger.gaps():
        raise LayoutError(f"the model has no place for {some(gaps)}", file=source.path)
    if left := [n for n, p in model.named_parameters() if p.is_meta]:
        raise LayoutError(f"the checkpoint gives no {some(left)}", file=source.path)
    return ledger.content_digest()


def _add_up(ledger: Ledger, world: World) -> None:
    """Every process gets the counts of all: they are sums."""
    if world.size > 1:
        mine = [ledger.counts.get(name, NOTHING) for name in ledger.parts]
        wide = torch.tensor([[f - (1 << 64) if f >> 63 else f, *more] for f, *more in mine])
        sums = parallel.summing(world)(wide).tolist()
        ledger.counts = {name: (f & MASK, a, b, c) for name, (f, a, b, c) in zip(ledger.parts, sums, strict=True)}


def _drop(model: Any, share: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = share


def noise_of_source(source: Checkpoint, share: float) -> list[str]:
    """A note on dropout and router noise that the source's config states and a run with `share` does not have."""
    stated = [f"{key} {value:g}" for key, value in entries(source.config)
              if NOISE.search(key) and type(value) in (int, float) and value > 0 and value != share]  # fmt: skip
    return [f"train.dropout is {share:g}; the source's config has {some(stated)}, not used here"] if stated else []


def entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys of a config and of the sections in it, each with its value."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from entries(value)
        else:
            yield str(key), value


def allocate(model: Any, device: str) -> dict[str, torch.Tensor]:
    """Memory for all parameters and kept buffers, by name: what this process holds of them, a tied one only once."""
    targets: dict[str, torch.Tensor] = {}
    kept = model.state_dict().keys()
    for name, empty in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in kept)]:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        targets[name] = torch.zeros_like(empty, device=device)
        if leaf in owner._buffers:
            owner._buffers[leaf] = targets[name]
        else:
            owner._parameters[leaf] = torch.nn.Parameter(targets[name], requires_grad=empty.requires_grad)
    model.tie_weights()
    return targets


def filled(
    targets: Mapping[str, torch.Tensor], weights: Mapping[str, Lazy], ledger: Ledger, world: World
) -> Iterator[tuple[int, Counts]]:
    """Fill the targets in a few threads: the bytes of every block, and of which parts they were, as far as it is this
    process that answers for them."""

    def fill(target: torch.Tensor, lazy: Lazy, place: Place, box: Box) -> tuple[int, Counts]:
        with ledger.collect() as seen:
            data = lazy.read(inside(box, place.box))
        target[tuple(slice(a, b) for a, b in box)].copy_(data)
        return data.nbytes, seen if place.answers else {}

    blocks = (
        partial(fill, parallel.local(target), weights[name], place, box)
        for name, target in targets.items()
        if name in weights
        for place in [place_of(world, target)]
        for box in boxes(tuple(lengths(place.box)), ITEMSIZE[weights[name].dtype], block_limit(weights[name], BLOCK))
    )
    with ahead(blocks) as filled:
        yield from filled


def weights_now(model: Any, masters: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters and kept buffers by name, in fp32 where there is a master (by the id of its parameter)."""
    names = at_rest(model).state_dict().keys()
    kept = {n: b for n, b in model.named_buffers() if n in names}
    return {n: masters.get(id(t), t).detach() for n, t in [*model.named_parameters(), *kept.items()]}


def checkpoint_of(
    weights: Mapping[str, torch.Tensor] | Mapping[str, Lazy],
    source: Checkpoint,
    dtype: str = "source",
    step: int | None = None,
) -> Checkpoint:
    """Weights of a model by its names, as a checkpoint like the one that it came from: its config and its tokenizer.

    dtype   "source": what each part had in `source`; or torch's name of one
    step    how far this run has come; what `source` says of its own run is left out then
    """
    held: dict[str, Lazy] = {n: InMemory(t) if isinstance(t, torch.Tensor) else t for n, t in weights.items()}
    found = gather(table(source.spec.family, held), {Rank(): held}, source.spec, ONE_RANK)
    parts = {n: cast(p, source.parts[n].dtype if dtype == "source" else dtype) for n, p in found.parts.items()}
    details = {k: v for k, v in source.details.items() if k not in RUN}
    if step is not None:
        details |= {"iteration": step, "step": step}
    return replace(source, parts=parts, details=details, ignored={})
