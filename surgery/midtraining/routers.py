"""The routers of a model: found by their structure, asked what they do, listened to.

    mixtures = find_mixtures(model)               # () if the model is dense
    with RouterLog(mixtures) as log:
        hidden = model.model(ids, use_cache=False).last_hidden_state
    routed = log.take()                           # of every layer: logits with their gradient, and the experts chosen

A mixture is a module with two children: experts that transformers runs through its experts interface, and a router with
`weight` [experts, width] and `top_k`, which returns (logits, weights of the chosen, numbers of the chosen).  What a
router makes of logits is found by trying a copy of it with random weights.  An attention with a router of groups of
heads is one too, of another kind: its experts are other in number, so each kind is balanced and measured by itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from surgery.errors import ConfigError, LayoutError, some
from surgery.midtraining.attention_experts import HeadRouter

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.float().softmax(-1),
    "sigmoid": lambda logits: logits.float().sigmoid(),
}
BIAS = "e_score_correction_bias"  # added to the scores when experts are chosen, not to the weights
PROBES = 64  # tokens that a copy of the router is tried with
MLP, ATTENTION = "mlp", "attention"  # kinds of mixtures: what their experts are made of


class OfKind(Protocol):
    @property
    def kind(self) -> str: ...


Kind = TypeVar("Kind", bound=OfKind)


def by_kind(items: Sequence[Kind]) -> dict[str, tuple[Kind, ...]]:
    """Mixtures, or what their routers said, of each kind that there is."""
    kinds = [kind for kind in (MLP, ATTENTION) if any(item.kind == kind for item in items)]
    return {kind: tuple(item for item in items if item.kind == kind) for kind in kinds}


@dataclass(frozen=True)
class Mixture:
    """A layer with experts.  `experts`: their module, None if they are groups of heads; `scores`: a name of `SCORES`;
    `bias_path`: of the selection bias, below the router."""

    name: str
    layer: int
    router: Any
    experts: Any
    num_experts: int
    top_k: int
    scores: str
    bias_path: str = ""
    kind: str = MLP

    @property
    def weight(self) -> Tensor:
        """[experts, width]"""
        weight: Tensor = self.router.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The parameter or buffer, of a number per expert; None if experts are chosen by their scores alone."""
        return _at(self.router, self.bias_path) if self.bias_path else None


@dataclass(frozen=True)
class Routed:
    """What a router said of T tokens: logits [T, E] with their gradient, experts [T, K]; `scores` as in Mixture."""

    logits: Tensor
    experts: Tensor
    scores: str
    kind: str = MLP

    def where(self, kept: Tensor) -> Routed:
        """Of the tokens that are `kept`, bool [T]."""
        return replace(self, logits=self.logits[kept], experts=self.experts[kept])

    def probabilities(self) -> Tensor:
        """fp32 [T, E]: the scores of every token, made to sum to one."""
        scores = SCORES[self.scores](self.logits)
        return scores if self.scores == "softmax" else scores / scores.sum(-1, keepdim=True)

    def by_scores(self) -> Routed:
        """As if experts were chosen by their scores alone, without the selection bias that some routers have."""
        return replace(self, experts=self.logits.topk(self.experts.shape[-1], -1).indices)

    def counts(self) -> Tensor:
        """int64 [E]: how many tokens chose each expert."""
        flat = self.experts.reshape(-1)
        return flat.new_zeros(self.logits.shape[-1]).scatter_add_(0, flat, torch.ones_like(flat))


# ------------------------------------------------------------------------------------------------------------- finding


def find_mixtures(model: Any) -> tuple[Mixture, ...]:
    """All mixtures of a model, in the order of its layers.

    Raises ConfigError for routers or experts that are not understood: they would be trained without a balance loss.
    """
    found, inside = [], []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        experts = [child for child in children.values() if _runs_experts(child)]
        heads = [child for child in children.values() if isinstance(child, HeadRouter)]
        if experts or heads:
            found.append(_mixture(name, children, experts, ATTENTION if heads else MLP))
            inside.append(f"{name}." if name else "")
    missed = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if re.search("router|experts", f"{name.rpartition('.')[2]} {type(module).__name__}", re.IGNORECASE)
        and not name.startswith(tuple(inside))
    ]
    if missed:
        hint = "its load could be neither balanced nor watched; train a family of docs/experts.md, or a dense model"
        raise ConfigError(f"these parts of a mixture of experts are not understood: {some(missed, 3)}", hint=hint)
    if any(len({(m.num_experts, m.top_k) for m in alike}) > 1 for alike in by_kind(found).values()):
        raise ConfigError("layers differ in their numbers of experts, which is not supported")
    return tuple(found)


def _runs_experts(module: Any) -> bool:
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "num_experts")


def _routes(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and isinstance(getattr(module, "top_k", None), int)


def _mixture(name: str, children: Mapping[str, Any], experts: Sequence[Any], kind: str) -> Mixture:
    routers = [child for child in children.values() if _routes(child)]
    if len(routers) != 1 or len(experts) != (kind == MLP):
        raise ConfigError(f"{name} has {len(routers)} routers and {len(experts)} groups of experts, not one of each")
    router, layer = routers[0], re.search(r"\d+", name)
    copied = _random_copy(router)
    bias = _bias_path(copied)
    return Mixture(name, int(layer[0]) if layer else 0, router, next(iter(experts), None), len(router.weight),
                   router.top_k, _tried(name, copied, bias), bias, kind)  # fmt: skip


def _random_copy(router: Any) -> Any:
    """The same router with random weights in fp32 on the CPU, also of one that has none yet or is sharded."""
    fresh: dict[int, Tensor] = {id(p): torch.nn.Parameter(torch.zeros(p.shape)) for p in router.parameters()}
    fresh |= {id(b): torch.zeros(b.shape) for b in router.buffers()}
    copied = copy.deepcopy(router, fresh)
    copied._forward_hooks.clear()
    copied._forward_pre_hooks.clear()
    with torch.no_grad():
        copied.weight.normal_(std=copied.weight.shape[1] ** -0.5, generator=torch.Generator().manual_seed(0))
    return copied


def _bias_path(router: Any) -> str:
    names = [n for n, _ in (*router.named_parameters(), *router.named_buffers())]
    return next((n for n in names if n.rpartition(".")[2] == BIAS), "")


def _tried(name: str, router: Any, bias: str) -> str:
    """The name of its scores; raises ConfigError if it does not keep the contract."""
    what = f"{name}: {type(router).__name__}"
    hint = "only routers that return (logits, weights, experts) of every token are understood"
    x = torch.randn(PROBES, router.weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        try:
            logits, weights, experts = router(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{what} does not run on tokens alone: {error}", hint=hint) from None
        expected = x @ router.weight.T
        if not _keeps_shapes(router, logits, weights, experts) or not torch.allclose(logits, expected, atol=1e-5):
            raise ConfigError(f"{what} does not return what is expected of a router", hint=hint)
        if bias:
            _at(router, bias).view(-1)[0] = 1e4
            if not bool((router(x)[2] == 0).any(-1).all()):
                raise ConfigError(f"{what} has a {BIAS} that does not choose experts", hint=hint)
    for scores, function in SCORES.items():
        if _proportional(weights, function(logits).gather(-1, experts)):
            return scores
    raise ConfigError(
        f"{what} makes weights of its logits in a way that is not understood", hint=f"known: {', '.join(SCORES)}"
    )


def _at(module: Any, name: str) -> Tensor:
    """The parameter or buffer of that dotted name."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), leaf)
    return tensor


def _keeps_shapes(router: Any, logits: Any, weights: Any, experts: Any) -> bool:
    shapes = ((PROBES, len(router.weight)), (PROBES, router.top_k), (PROBES, router.top_k))
    tensors = (logits, weights, experts)
    return all(isinstance(t, Tensor) and t.shape == s for t, s in zip(tensors, shapes, strict=True)) and (
        experts.dtype == torch.int64
    )


def _proportional(weights: Tensor, scores: Tensor) -> bool:
    """Whether weights [T, K] are scores [T, K] times a number of each token, or of all where K is 1.

    A router that gives its only expert the weight 1 is as much of one kind as of another: its scores then order experts
    and do nothing else.
    """
    ratio = weights / scores
    if weights.shape[1] == 1:
        return bool((ratio.max() - ratio.min() <= 1e-4 * ratio.max()) | (weights.max() - weights.min() < 1e-6))
    return bool((ratio.amax(-1) - ratio.amin(-1) <= 1e-4 * ratio.amax(-1)).all())


# ----------------------------------------------------------------------------------------------------------- listening


class RouterLog(AbstractContextManager["RouterLog"]):
    """Hears the routers while it is entered, and no longer: not when activation checkpointing runs a layer again.

    Enter it again for every forward pass, `take` after each; `remove` takes the hooks off.  Where no gradient is
    wanted: `with torch.no_grad(), log`, in this order.
    """

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        self.mixtures = tuple(mixtures)
        self._heard: list[list[Routed]] = [[] for _ in mixtures]
        self._open = self._trains = False
        self._handles = [m.router.register_forward_hook(self._listener(i)) for i, m in enumerate(mixtures)]

    def _listener(self, index: int) -> Callable[[Any, Any, Any], None]:
        mixture = self.mixtures[index]

        def hear(_module: Any, _args: Any, output: Any) -> None:
            if self._open:
                logits, _, experts = output
                self._heard[index].append(Routed(logits, experts, mixture.scores, mixture.kind))

        return hear

    def __enter__(self) -> RouterLog:
        self._heard = [[] for _ in self.mixtures]
        self._open, self._trains = True, torch.is_grad_enabled()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False

    def take(self) -> tuple[Routed, ...]:
        """What every router said in the one forward pass.

        Raises LayoutError if one was silent, or spoke twice, or if no gradient would reach one that is trained.
        """
        heard, self._heard = self._heard, [[] for _ in self.mixtures]
        wrong = [f"{m.name}: {len(h)} times" for m, h in zip(self.mixtures, heard, strict=True) if len(h) != 1]
        if wrong:
            raise LayoutError(f"routers ran not once in a forward pass: {some(wrong, 3)}")
        routed = tuple(h[0] for h in heard)
        deaf = [
            m.name
            for m, r in zip(self.mixtures, routed, strict=True)
            if self._trains and m.weight.requires_grad and not r.logits.requires_grad
        ]
        if deaf:
            hint = "checkpoint activations with use_reentrant=False"
            raise LayoutError(f"no gradient would reach the routers of {some(deaf, 3)}", hint=hint)
        return routed

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Fp32Routers:
    """Routers compute in fp32, whatever autocast says: their weights are made fp32, and autocast is off inside them.

    Make it before the optimizer (weights of another dtype are replaced), and shard routers without a lower precision of
    their parameters.  `remove` takes the hooks off.
    """

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        self._off: list[torch.autocast] = []
        self._handles = []
        for mixture in mixtures:
            mixture.router.float()
            self._handles.append(mixture.router.register_forward_pre_hook(self._enter))
            self._handles.append(mixture.router.register_forward_hook(self._leave, always_call=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, _module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        off = torch.autocast(args[0].device.type, enabled=False)
        off.__enter__()
        self._off.append(off)
        return (args[0].float(), *args[1:])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, _module: Any, _args: Any, _output: Any) -> None:
        self._off.pop().__exit__(None, None, None)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
