"""Run a Hugging Face folder through transformers in fp32 on fixed tokens, and note what every module answers.

    model = load(folder)
    trace = run(model, tokens)                  # logits, and each module's input and output
    alone = run(model, tokens, forced=trace)    # every module is given the inputs that it had in `trace`

With `forced`, an error does not travel: a module whose answer differs is itself the place.  Modules are named as in
`layers.3.attention`, `layers.3.mlp`, `layers.3.input_layernorm`, `layers.3` (all of it), `embed`, `final_norm`,
`lm_head`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError, LayoutError, SurgeryError, show, some
from surgery.units import human

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


def load(folder: Path) -> Any:
    """A model in fp32 on the CPU, from local safetensors only.

    Raises ConfigError if transformers cannot load it, LayoutError if a weight is missing or has another shape.
    """
    with explained("transformers cannot load the model", folder), quiet():
        import torch
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    for key, what in (("missing_keys", "are missing"), ("mismatched_keys", "have the wrong shape")):
        if names := info.get(key):
            listed = sorted(show(n if isinstance(n, str) else n[0]) for n in names)
            raise LayoutError(f"{len(listed)} weights {what}: {some(listed)}", file=folder)
    return model.eval()


def fits(parameters: int) -> bool:
    """Whether a model of this size in fp32 fits into the free memory; True where the system does not tell."""
    free = free_memory()
    return free is None or _need(parameters) <= free


def check_memory(parameters: int, folder: Path) -> None:
    """Raise SurgeryError if a model of this size in fp32 does not fit into the free memory."""
    if not fits(parameters):
        need, free = human(_need(parameters)), human(free_memory() or 0)
        raise SurgeryError(
            f"running it in fp32 needs about {need} of memory, {free} are free",
            file=folder,
            hint="without --logits the weights and configs are compared in little memory",
        )


def _need(parameters: int) -> int:
    return parameters * 4 * 5 // 4  # a quarter for the largest weights in their own dtype, and for activations


def free_memory() -> int | None:
    """Bytes that can be had; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def run(model: Any, tokens: torch.Tensor, forced: Trace | None = None) -> Trace:
    """One forward pass.  With `forced`, every module gets the input that it had there, where the shapes agree."""
    import torch

    trace = Trace(torch.empty(0))
    handles = []
    for name, module in _modules(model).items():
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
    for i, layer in enumerate(base.layers):
        for name, child in layer.named_children():
            if "dropout" not in name:
                found[f"layers.{i}.{_RENAMED.get(name, name)}"] = child
        found[f"layers.{i}"] = layer
    final = getattr(base, "norm", getattr(base, "final_layer_norm", None))
    if final is not None:
        found["final_norm"] = final
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


@contextlib.contextmanager
def explained(what: str, folder: Path) -> Iterator[None]:
    """Whatever transformers raises on a bad folder (it may be anything) becomes one clear ConfigError."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{what}: {type(error).__name__}: {show(text, 300)}", file=folder) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and progress bars of transformers while we work; its settings are put back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
