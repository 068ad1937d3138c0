"""AdamW over groups of parameters: which kinds decay, which learn more slowly, which are frozen.

    kinds = kinds_of(model)                                   # {"model.norm.weight": "norm", ...}
    freeze(model, ["router", "model.layers.0.*"])
    groups = grouped(model, DECAYS["llama"], weight_decay=0.1, lr_scale={"router": 0.5})
    optimizer = adamw(groups, betas=(0.9, 0.95), eps=1e-8)
    set_rate(optimizer, 3e-4)                                 # times each group's scale

Kinds of parameters: `embedding` (the head too, where it is tied), `head`, `router`, `norm`, `bias`, `matrix`, and
`vector` for what has one dimension and is none of these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError, some

if TYPE_CHECKING:
    import torch

KINDS = ("embedding", "head", "router", "norm", "bias", "matrix", "vector")
# What each preset decays.
DECAYS: Mapping[str, frozenset[str]] = {
    "all": frozenset(KINDS),
    "llama": frozenset({"matrix", "head"}),
    "olmo": frozenset(KINDS) - {"embedding"},  # OLMo 2 and OLMo-core
    "megatron": frozenset({"matrix", "head", "router", "embedding"}),  # what has two dimensions
    "hf": frozenset(
        {"matrix", "head", "router", "embedding", "vector"}
    ),  # transformers' Trainer: all but norms, biases
}


def kinds_of(model: Any) -> dict[str, str]:
    """The kind of every parameter, by name; a tied head has no name of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    kinds = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            kinds[name] = _kind(path, module, leaf, parameter, embedding, head)
    return {name: kinds[name] for name, _ in model.named_parameters()}


def _kind(path: str, module: Any, leaf: str, parameter: torch.Tensor, embedding: Any, head: Any) -> str:
    if leaf.endswith("bias"):
        return "bias"
    if module is embedding or type(module).__name__ == "Embedding":
        return "embedding"
    if module is head:
        return "head"
    if type(module).__name__.endswith("Router") or path.endswith("router"):
        return "router"
    if "Norm" in type(module).__name__:
        return "norm"
    return "matrix" if parameter.ndim >= 2 else "vector"


def matching(names: Mapping[str, str], wanted: Iterable[str]) -> set[str]:
    """The parameters that kinds ("router") or patterns of names ("model.layers.0.*") mean.

    `names` are parameters with their kinds.  Raises ConfigError for what means none.
    """
    found: set[str] = set()
    for each in wanted:
        hits = {n for n, kind in names.items() if kind == each or fnmatchcase(n, each)}
        if not hits:
            what = f"{each!r} is no kind of parameter that the model has, and matches no name"
            raise ConfigError(what, hint=f"kinds: {', '.join(sorted(set(names.values())))}; names: {some(names, 3)}")
        found |= hits
    return found


def freeze(model: Any, wanted: Sequence[str]) -> list[str]:
    """Let parameters of these kinds or names get no gradient.  Returns their names; raises ConfigError."""
    frozen = matching(kinds_of(model), wanted)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("every parameter is frozen: nothing would be trained")
    return sorted(frozen)


def grouped(
    model: Any,
    decays: Collection[str],
    weight_decay: float,
    no_decay: Sequence[str] = (),
    lr_scale: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with its `weight_decay`, `lr_scale`, `names` and `params` (in the model's order).

    decays     kinds that decay                     no_decay   kinds or patterns that do not, whatever their kind
    lr_scale   of kinds or patterns; 1 for the rest
    """
    kinds = {n: k for n, k in kinds_of(model).items() if model.get_parameter(n).requires_grad}
    spared = matching(kinds, no_decay)
    scales = {name: scale for pattern, scale in (lr_scale or {}).items() for name in matching(kinds, [pattern])}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, kind in kinds.items():
        decay = weight_decay if kind in decays and name not in spared else 0.0
        key = (decay, scales.get(name, 1.0))
        group = groups.setdefault(key, {"params": [], "names": [], "weight_decay": decay, "lr_scale": key[1]})
        group["params"].append(model.get_parameter(name))
        group["names"].append(name)
    return list(groups.values())


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """torch's AdamW in its fused form; the rate is set at every step."""
    import torch

    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of this step, in every group times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """What is trained: names and tensors that hold gradients."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
