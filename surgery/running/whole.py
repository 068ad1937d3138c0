"""Run a whole model on fixed tokens and note what every module reads and answers; how far two runs are apart.

    model = load(folder)                        # see loading.py
    trace = run(model, tokens)                  # logits, and each module's input and output
    alone = run(model, tokens, forced=trace)    # every module is given the inputs that it had in `trace`

With `forced`, an error does not travel: a module whose answer differs is itself the place.  Modules are named as in
`layers.3.attention`, `layers.3.mlp`, `layers.3.input_layernorm`, `layers.3` (all of it), `embed`, `final_norm`,
`lm_head`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import some
from surgery.running.loading import explained

if TYPE_CHECKING:
    import torch

_RENAMED = {"self_attn": "attention"}


@dataclass
class Trace:
    """What a model said: logits [batch, token, vocabulary], and input and output by module, in the order of the run."""

    logits: torch.Tensor
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


def fixed_tokens(vocabulary: int, batch: int = 2, length: int = 32) -> torch.Tensor:
    """Token ids below `vocabulary`, always the same ones."""
    import torch

    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(20240229))


def run(model: Any, tokens: torch.Tensor, forced: Trace | None = None, outline: bool = False) -> Trace:
    """One forward pass.  With `forced`, every module gets the input that it had there, where the shapes agree.

    An `outline` has the outputs of embedding, layers, final norm and head alone, and no inputs.
    """
    import torch

    trace = Trace(torch.empty(0))
    handles = []
    for name, module in _modules(model).items():
        if outline:
            if name.count(".") < 2:
                handles.append(module.register_forward_hook(_taker(name, trace)))
            continue
        handles.append(module.register_forward_pre_hook(_giver(name, trace, forced), with_kwargs=True))
        handles.append(module.register_forward_hook(_taker(name, trace)))
    try:
        with explained("transformers cannot run the model", Path(model.name_or_path or ".")), torch.inference_mode():
            trace.logits = model(input_ids=tokens, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _modules(model: Any) -> dict[str, Any]:
    """The modules that are observed, by our names."""
    base = model.base_model
    found = {"embed": model.get_input_embeddings()}
    for i, layer in enumerate(base.h if hasattr(base, "h") else base.layers):  # GPT-2 calls them so
        for name, child in layer.named_children():
            if "dropout" not in name:
                found[f"layers.{i}.{_RENAMED.get(name, name)}"] = child
        found[f"layers.{i}"] = layer
    final = next((name for name in ("norm", "final_layer_norm", "ln_f") if hasattr(base, name)), None)
    if final is not None:
        found["final_norm"] = getattr(base, final)
    found["lm_head"] = model.get_output_embeddings()
    return found


def _giver(name: str, trace: Trace, forced: Trace | None) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = args[0] if args else kwargs.get("hidden_states")
        if given is None or name == "embed":
            return args, kwargs
        wanted = forced.inputs.get(name) if forced else None
        if wanted is not None and wanted.shape == given.shape:
            if args:
                args = (wanted, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": wanted}
        elif forced is None:
            trace.inputs[name] = given.detach()
        return args, kwargs

    return hook


def _taker(name: str, trace: Trace) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        trace.outputs[name] = (output[0] if isinstance(output, tuple) else output).detach()

    return hook


def place(name: str) -> str:
    """ "layers.3.mlp" -> "layer 3, mlp": the name of a module for people."""
    if not name.startswith("layers."):
        return {"embed": "the embedding", "final_norm": "the final norm", "lm_head": "the head"}.get(name, name)
    _, number, *rest = name.split(".")
    return f"layer {number}" + (f", {rest[0]}" if rest else "")


def places(names: Iterable[str]) -> list[str]:
    """Many modules, those of the same kind as one: "attention of layers 0 to 5"."""
    kinds: dict[str, list[int]] = {}
    for name in names:
        at = name.split(".")
        kinds.setdefault(at[-1] if at[0] == "layers" else name, []).extend([int(at[1])] if at[0] == "layers" else [])
    return [f"{kind} of {numbers(layers)}" if layers else place(kind) for kind, layers in kinds.items()]


def numbers(layers: Sequence[int]) -> str:
    """ "layer 3", "layers 1, 4" or "layers 0 to 5"."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {some(layers, 12)}"


def link(folder: Path, files: Iterable[Path], into: Path) -> Path:
    """A folder with nothing but links to the config and these weight files (and their index) of another."""
    into.mkdir(parents=True, exist_ok=True)
    index = folder / "model.safetensors.index.json"
    for path in (folder / "config.json", *files, *([index] if index.is_file() else [])):
        (into / path.name).symlink_to(path.resolve())
    return into


def gaps(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """For every module of both, in the order of `a`: max |a - b| over the standard deviation of `a`."""
    return {name: gap(x, b[name]) for name, x in a.items() if name in b}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| over the standard deviation of `a`; infinite for other shapes and for NaN."""
    if a.shape != b.shape:
        if a.shape[:-1] != b.shape[:-1]:
            return float("inf")
        width = min(a.shape[-1], b.shape[-1])
        a, b = a[..., :width], b[..., :width]
    return farthest(a, b) / max(float(a.std()), 1e-30)


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b|; infinite if either holds NaN."""
    if a.equal(b):
        return 0.0
    found = float((a - b).abs().max())
    return float("inf") if math.isnan(found) else found
