"""Run a checkpoint of any format through transformers, one layer in memory at a time, or so many rows of it as fit.

    run = forward(checkpoint, tokens, "float32", device("cuda"))
    run.logits                       # [batch, length, vocabulary], on the CPU
    run.routes[3].chosen             # [tokens, top_k] experts of layer 3

transformers builds the model without memory (on the `meta` device); a layer's weights are read when its turn comes and
let go when it is done, of experts one at a time.  They are the checkpoint's parts, woven as the model holds them.  With
`room`, so many bytes, linear layers, embeddings and experts are read a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError
from surgery.formats.base import Checkpoint
from surgery.formats.hf.config import choose_family, misfits, write_config
from surgery.formats.hf.sparse import implementation
from surgery.formats.hf.table import table
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.weave import spread
from surgery.running.device import CPU, Device
from surgery.running.expertwise import STORED, expert_modules, one_by_one
from surgery.running.loading import explained, own_classes, quiet
from surgery.running.rowwise import Blocks, Rows, looked_up, product
from surgery.tensors.lazy import Lazy, torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Route:
    """Where a router sent every token: its logits [tokens, experts] and the chosen experts [tokens, top_k]."""

    logits: torch.Tensor
    chosen: torch.Tensor


@dataclass
class Run:
    """What a model said."""

    logits: torch.Tensor
    routes: dict[int, Route] = field(default_factory=dict)


def forward(checkpoint: Checkpoint, tokens: torch.Tensor, dtype: str, on: Device = CPU) -> Run:
    """One pass over tokens [batch, length] in a dtype, a layer in memory at a time.

    The family of the Spec says which model of transformers this is.  Raises ConfigError if it cannot run it.
    """
    import torch

    checkpoint = with_family(checkpoint)
    with explained("transformers cannot run the model", checkpoint.path), quiet(), torch.inference_mode():
        model = empty_model(checkpoint, dtype, on)
        found = Run(torch.empty(0))
        with layer_by_layer(model, checkpoint, dtype, on), observed(model, found.routes):
            found.logits = model(input_ids=on.holds(tokens), use_cache=False).logits.float().cpu()
        return found


def with_family(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a family that holds it: its own, else the first that does.  Raises ConfigError if none does."""
    if not misfits(checkpoint.spec, checkpoint.spec.family):
        return checkpoint
    return replace(checkpoint, spec=checkpoint.spec.replace(family=choose_family(checkpoint.spec)))


def bytes_of_a_pass(checkpoint: Checkpoint) -> int:
    """What `forward` tells `on.advance` in all: the weights, and the embedding again where it is the output head."""
    weights = sum(part.nbytes for part in checkpoint.parts.values())
    return weights + (checkpoint.parts["embed"].nbytes if checkpoint.spec.tied else 0)


def empty_model(
    checkpoint: Checkpoint,
    dtype: str,
    on: Device = CPU,
    attention_by: str = "sdpa",
    experts_by: str = "eager",
    config: Any = None,
) -> Any:
    """The model without memory for its weights, but with its tables of angles.

    `attention_by` and `experts_by` are names of transformers' implementations; sparse attention has its own.  `config`
    is one that transformers read itself; by default it is written from the Spec.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = checkpoint.spec
    written = write_config(spec, {"pad_token_id": None}, dtype, spec.family)
    if own := own_classes(spec.family):
        with torch.device("meta"):
            return own.model(config or own.config(**written)).to(torch_dtype(dtype)).eval()
    config = config or AutoConfig.for_model(**written)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch_dtype(dtype),
            attn_implementation=implementation(config, attention_by),
            experts_implementation=experts_by,
        )
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set and not list(module.children()):
            if "Rotary" not in type(module).__name__:
                raise ConfigError(f"{name} of a {spec.family} holds a table that is not known here")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config).to(on.name))
    return model.eval()


def weights_of(model: Any, checkpoint: Checkpoint) -> dict[str, Lazy]:
    """What every parameter and buffer of the model should hold."""
    names = list(model.state_dict())
    woven = spread(table(checkpoint.spec.family, names), checkpoint.parts, checkpoint.spec, ONE_RANK)[Rank()]
    found = {name: s.tensor for name, s in woven.items()}
    if checkpoint.spec.tied:
        found |= {head: found[embedding] for head, embedding in model._tied_weights_keys.items()}
    if missing := [n for n in names if n not in found]:
        raise ConfigError(f"the model wants {missing[0]}, which the checkpoint does not give")
    return {name: found[name] for name in names}


@contextmanager
def layer_by_layer(
    model: Any, checkpoint: Checkpoint, dtype: str, on: Device = CPU, room: int | None = None
) -> Iterator[None]:
    """The model can be run: what holds weights gets them before it runs and loses them after it."""
    weights, held = weights_of(model, checkpoint), torch_dtype(dtype)
    blocks = None if room is None else Blocks(room, held, on)
    for name, module in expert_modules(model).items():
        gate_up, down = (weights.pop(f"{name}.{leaf}") for leaf in STORED)
        module.forward = one_by_one(module, gate_up, down, held, on, blocks)
    if blocks:
        for name, module in _matrices(model).items():
            module.forward = _by_rows(module, blocks.rows(weights.pop(f"{name}.weight")))
    handles = []
    for prefix, unit in _units(model).items():
        mine = {n.removeprefix(prefix + "."): t for n, t in weights.items() if n.startswith(prefix + ".")}
        handles.append(unit.register_forward_pre_hook(_filler(mine, held, on)))
        handles.append(unit.register_forward_hook(_emptier(mine)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if blocks:
            blocks.free()


def held_at_once(model: Any, checkpoint: Checkpoint) -> int:
    """Bytes of the weights that a layer holds whatever `room` is, as they are stored and in fp32: norms, routers, and
    matrices of classes that are not known here."""
    free = {f"{name}.{leaf}" for name in expert_modules(model) for leaf in STORED}
    free |= {f"{name}.weight" for name in _matrices(model)}
    kept = {n: t.nbytes + 4 * math.prod(t.shape) for n, t in weights_of(model, checkpoint).items() if n not in free}
    return max(sum(size for n, size in kept.items() if n.startswith(f"{unit}.")) for unit in _units(model))


def _matrices(model: Any) -> dict[str, Any]:
    """The modules whose weights nobody else looks at, and which can be computed by rows."""
    from torch.nn import Embedding, Linear

    return {name: module for name, module in model.named_modules() if type(module) in (Embedding, Linear)}


def _by_rows(module: Any, rows: Rows) -> Callable[[torch.Tensor], torch.Tensor]:
    from torch.nn import Embedding

    return looked_up(rows) if type(module) is Embedding else lambda x: product(x, rows, module.bias)


def _units(model: Any) -> dict[str, Any]:
    """What is run one after another: what stands before the layers, each layer, what stands behind them."""
    from torch.nn import ModuleList

    base = f"{model.base_model_prefix}."
    units: dict[str, Any] = {}
    for name, child in model.base_model.named_children():
        single = not isinstance(child, ModuleList)
        units |= {base + name: child} if single else {f"{base}{name}.{i}": layer for i, layer in enumerate(child)}
    return units | {"lm_head": model.lm_head}


def _filler(weights: Mapping[str, Lazy], dtype: torch.dtype, on: Device) -> Any:
    def hook(unit: Any, _: Any) -> None:
        import torch

        for name, lazy in weights.items():
            owner, leaf = _owner(unit, name)
            if leaf in owner._buffers:  # statistics keep their own dtype
                owner._buffers[leaf] = on.holds(lazy.full(), owner._buffers[leaf].dtype)
            else:
                owner._parameters[leaf] = torch.nn.Parameter(on.holds(lazy.full(), dtype), requires_grad=False)
            on.advance(lazy.nbytes)

    return hook


def _emptier(weights: Mapping[str, Lazy]) -> Any:
    def hook(unit: Any, _: Any, __: Any) -> None:
        import torch

        for name in weights:
            owner, leaf = _owner(unit, name)
            if leaf in owner._buffers:
                owner._buffers[leaf] = owner._buffers[leaf].to("meta")
            else:
                owner._parameters[leaf] = torch.nn.Parameter(owner._parameters[leaf].to("meta"), requires_grad=False)

    return hook


def _owner(unit: Any, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return unit.get_submodule(path), leaf


@contextmanager
def observed(model: Any, routes: dict[int, Route]) -> Iterator[None]:
    """Note what the routers choose, by layer."""

    def router(layer: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            logits, _, chosen = output
            routes[layer] = Route(logits.detach().float().cpu(), chosen.detach().cpu())

        return hook

    handles = [
        module.register_forward_hook(router(i))
        for i, layer in enumerate(getattr(model.base_model, "layers", ()))  # all that have routers call them so
        for module in layer.modules()
        if type(module).__name__.endswith("Router")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
