"""Run a dense checkpoint over a text, one layer in memory at a time, and look into its mlps.

    each_layer(checkpoint, tokens, look)                      # look(3, inputs, hidden), [tokens, h] and [tokens, f]
    each_layer(checkpoint, tokens, look, gradients=True)      # look(3, inputs, hidden, grad of the loss by hidden)

`inputs` are what a router would see (the mlp's input, after the norm), `hidden` what `down` reads: act(gate x) * up x.
With gradients, the inputs of all layers are kept from the forward pass (in memory up to a budget, then in a file), and
the layers are run again from the last to the first, each for itself: the loss is that of the next token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError
from surgery.formats.base import Checkpoint
from surgery.running.device import CPU, Device
from surgery.running.layerwise import empty_model, layer_by_layer
from surgery.running.loading import explained, logits_divisor, quiet

if TYPE_CHECKING:
    import torch

Look = Callable[..., None]
KEPT = 512 << 20  # bytes of activations that stay in memory


def each_layer(
    source: Checkpoint,
    tokens: torch.Tensor,
    look: Look,
    gradients: bool = False,
    kept: int = KEPT,
    on: Device = CPU,
) -> None:
    """Show `look` the activations of every dense mlp: forwards, or with gradients from the last layer to the first.

    The model runs on a device; what `look` sees is on the CPU.

    Raises ConfigError if transformers cannot run the model.
    """
    import torch

    with explained("transformers cannot run the model", source.path), quiet():
        model, tokens = empty_model(source, "float32", on), on.holds(tokens)
        with layer_by_layer(model, source, "float32", on):
            if not gradients:
                with torch.no_grad(), _watched(model, lambda i, x, h: look(i, _rows(x), _rows(h))):
                    model.base_model(input_ids=tokens, use_cache=False)
                return
            _backwards(model, tokens, look, kept, on)


def _rows(activations: torch.Tensor) -> torch.Tensor:
    """[tokens, width] on the CPU."""
    return activations.detach().flatten(0, -2).cpu()


def layer_inputs(source: Checkpoint, tokens: torch.Tensor, on: Device = CPU) -> list[torch.Tensor]:
    """The hidden states [batch, length, h] that go into every layer."""
    import torch

    with explained("transformers cannot run the model", source.path), quiet(), torch.no_grad():
        model = empty_model(source, "float32", on)
        seen: list[torch.Tensor] = []
        with layer_by_layer(model, source, "float32", on), _calls(model, lambda x, _: seen.append(x.cpu())):
            model.base_model(input_ids=on.holds(tokens), use_cache=False)
        return seen


@contextmanager
def _watched(model: Any, look: Callable[[int, Any, Any], None]) -> Iterator[None]:
    """See input and hidden of every mlp, when its last matrix is reached."""
    inputs: dict[int, Any] = {}
    handles = []

    def entering(layer: int) -> Any:
        def hook(_: Any, args: Any) -> None:
            inputs[layer] = args[0]

        return hook

    def inside(layer: int) -> Any:
        def hook(_: Any, args: Any) -> None:
            look(layer, inputs.pop(layer), args[0])

        return hook

    for i, layer in enumerate(model.base_model.layers):
        if not hasattr(layer, "mlp") or not hasattr(layer.mlp, "down_proj"):
            raise ConfigError(f"layer {i} has no mlp that can be looked into")
        handles.append(layer.mlp.register_forward_pre_hook(entering(i)))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(inside(i)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _calls(model: Any, note: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Note what every layer is called with."""

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        note(args[0] if args else kwargs["hidden_states"], {k: v for k, v in kwargs.items() if k != "hidden_states"})

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.base_model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _backwards(model: Any, tokens: torch.Tensor, look: Look, kept: int, on: Device) -> None:
    """Forwards once, keeping every layer's input; then backwards, layer by layer."""
    import torch

    base = model.base_model
    with Store(kept) as store:
        calls: list[dict[str, Any]] = []

        def note(hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
            store.put(hidden)
            calls.append(kwargs)

        with torch.no_grad(), _calls(model, note):
            last: list[torch.Tensor] = []
            handle = base.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
            base(input_ids=tokens, use_cache=False)
            handle.remove()
        grad = _loss_gradient(model, last.pop(), tokens)
        for i in reversed(range(len(base.layers))):
            grad = _one_layer_back(model, i, on.holds(store.get(i)), calls[i], grad, look)


def _loss_gradient(model: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of the mean loss of the next token, by the last hidden state: one sequence at a time, logits are large."""
    import torch

    out = torch.zeros_like(hidden)
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    for i, ids in enumerate(tokens):
        x = hidden[i : i + 1].detach().requires_grad_()
        logits = model.lm_head(model.base_model.norm(x))[0] / logits_divisor(model)
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum") / predicted
        out[i : i + 1] = torch.autograd.grad(loss, x)[0]
    return out


def _one_layer_back(
    model: Any, i: int, hidden: torch.Tensor, call: dict[str, Any], grad: torch.Tensor, look: Look
) -> torch.Tensor:
    """Run layer `i` again with gradients, show them, and give the gradient by its input."""
    import torch

    x = hidden.detach().requires_grad_()
    seen: list[tuple[Any, Any]] = []
    with _watched(model, lambda _, inputs, h: seen.append((inputs, h))):
        out = model.base_model.layers[i](x, **call)
    out = out[0] if isinstance(out, tuple) else out
    inputs, h = seen[0]
    by_input, by_h = torch.autograd.grad(out, (x, h), grad)
    look(i, *(_rows(t) for t in (inputs, h, by_h)))
    return by_input


class Store:
    """Tensors in a row: in memory up to a budget, the rest in a file without a name."""

    def __init__(self, budget: int) -> None:
        self.budget, self.held = budget, 0
        self.places: list[Any] = []
        self.file: Any = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def put(self, tensor: torch.Tensor) -> None:
        from surgery.tensors.lazy import bytes_of

        tensor = tensor.detach().cpu().contiguous()
        if self.held + tensor.nbytes <= self.budget:
            self.held += tensor.nbytes
            self.places.append(tensor.clone())
            return
        self.file = self.file or tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__
        at = self.file.seek(0, 2)
        self.file.write(bytes_of(tensor))
        self.places.append((at, tensor.shape, tensor.dtype))

    def get(self, i: int) -> torch.Tensor:
        import torch

        from surgery.tensors.lazy import bytes_of

        place = self.places[i]
        if isinstance(place, torch.Tensor):
            return place
        at, shape, dtype = place
        out = torch.empty(shape, dtype=dtype)
        self.file.seek(at)
        self.file.readinto(bytes_of(out))
        return out
