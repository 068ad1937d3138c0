"""What a text tells about a dense model, one layer in memory at a time: which neurons go together, where routers point.

    guide = calibrated(source, settings, layout, layers=[0, 1, ...])
    guide.cuts[3]            # (neurons of the shared expert, neurons of each routed one)
    guide.routers[3]         # rows of the router

`clustering` looks at the weights alone (rows of gate); `co-activation` at how strongly neurons fire on the same tokens;
`gradient` at |h dL/dh| of every neuron, summed over the tokens of every cluster of the mlp's inputs (LLaMA-MoE v2, Qu
et al. 2411.15708; v1, Zhu et al. 2406.16554).  Routers see the mlp's input, so that is what centres are taken of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.containers.text import read_yaml
from surgery.errors import ConfigError, UsageError, show
from surgery.files import read_small
from surgery.formats import Checkpoint
from surgery.upcycling import clusters
from surgery.upcycling.layerwise import backward, forward
from surgery.upcycling.resolve import Layout
from surgery.upcycling.settings import Settings

if TYPE_CHECKING:
    import torch

TOKENS = 2048  # of the text, at most
LENGTH = 128
TEXT_LIMIT = 16 << 20
GUIDED_ORDERS = ("clustering", "co-activation", "gradient")
GUIDED_ROUTERS = ("kmeans", "prompts", "domains")
STD = 0.02  # what rows are as long as: those of a normal router with this standard deviation

Cut = tuple[Sequence[int], Sequence[Sequence[int]]]


@dataclass
class Guide:
    """By layer: the neurons of the shared and of the routed experts, and rows for the router (one per group)."""

    cuts: dict[int, Cut] = field(default_factory=dict)
    routers: dict[int, torch.Tensor] = field(default_factory=dict)


def calibrated(source: Checkpoint, wanted: Settings, layout: Layout, layers: Sequence[int]) -> Guide | None:
    """None if nothing that was asked for needs it.  Raises UsageError, ConfigError and what reading texts raises."""
    start = wanted.router_kind[0]
    if wanted.order not in GUIDED_ORDERS and start not in GUIDED_ROUTERS:
        return None
    guide = Guide()
    rows = layout.copies if layout.grouped else layout.experts
    if wanted.order == "clustering":
        for layer in layers:
            guide.cuts[layer] = _by_weights(source, wanted, layout, layer)
    if start == "kmeans" or wanted.order in ("co-activation", "gradient"):
        _by_text(source, wanted, layout, layers, rows, guide)
    if start in ("prompts", "domains"):
        _by_prompts(source, wanted, layers, rows, guide)
    return guide


def _pieces(layout: Layout) -> int:
    """How many different sets of neurons there are."""
    return {"partition": layout.experts, "virtual-group": layout.granularity}.get(layout.strategy, 1)


def _by_weights(source: Checkpoint, wanted: Settings, layout: Layout, layer: int) -> Cut:
    gate = source.parts[f"layers.{layer}.mlp.gate"].full()
    label = clusters.balanced(gate[layout.s :] if not layout.whole_shared else gate, _pieces(layout), wanted.seed)
    first = 0 if layout.whole_shared else layout.s
    routed = [[int(i) + first for i in (label == c).nonzero().flatten()] for c in range(_pieces(layout))]
    return range(layout.s), routed


def _by_text(
    source: Checkpoint, wanted: Settings, layout: Layout, layers: Sequence[int], rows: int, guide: Guide
) -> None:
    import torch

    tokens = _tokens(source, wanted.text)
    kinds = _pieces(layout)

    def seen(layer: int, x: torch.Tensor, h: torch.Tensor, slope: torch.Tensor | None) -> None:
        """x [tokens, width] into the mlp, h [tokens, neurons] into `down`, and the loss's slope at h."""
        if layer not in layers:
            return
        if wanted.router_kind[0] == "kmeans":
            guide.routers[layer] = scaled_rows(clusters.kmeans(x, rows, wanted.seed)[0])
        if wanted.order == "co-activation":
            scores = h.abs().T  # [neurons, tokens]: what fires together
            first = 0 if layout.whole_shared else layout.s
            label = clusters.balanced(scores[first:], kinds, wanted.seed)
            routed = [[int(i) + first for i in (label == c).nonzero().flatten()] for c in range(kinds)]
            guide.cuts[layer] = range(layout.s), routed
        if wanted.order == "gradient":
            assert slope is not None
            label = clusters.kmeans(x, kinds, wanted.seed)[1]
            value = (h * slope).abs().double()
            scores = torch.zeros(kinds, h.shape[1], dtype=torch.float64).index_add_(0, label, value)
            guide.cuts[layer] = _by_importance(scores, layout, wanted.sharing)

    if wanted.order == "gradient":
        backward(source, tokens, seen)
        return
    forward(source, tokens, "float32", watch=_watch(seen))


def _by_importance(scores: torch.Tensor, layout: Layout, sharing: bool) -> Cut:
    if layout.whole_shared or not layout.s:
        return range(layout.s), clusters.assigned(scores, layout.m, sharing)
    always = clusters.residual(scores, min(layout.m, scores.shape[1]), layout.s)
    rest = [i for i in range(scores.shape[1]) if i not in set(always)]
    found = clusters.assigned(scores[:, rest], layout.m, sharing)
    return always, [[rest[i] for i in mine] for mine in found]


def _watch(seen: Callable[[int, Any, Any, Any], None]) -> Callable[[str, Any, Any], None]:
    """Calls `seen` with what went into the mlp and into `down` of every layer."""
    held: dict[int, Any] = {}

    def watch(name: str, given: Any, _: Any) -> None:
        layer, module = int(name.split(".")[1]), name.split(".", 2)[2]
        if module == "mlp.down_proj":
            held[layer] = given.flatten(0, -2).float()
        elif module == "mlp" and layer in held:
            seen(layer, given.flatten(0, -2).float(), held.pop(layer), None)

    return watch


def scaled_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows as long as those of a normal router."""
    import torch

    return torch.nn.functional.normalize(rows.float(), dim=1) * (STD * rows.shape[1] ** 0.5)


# --------------------------------------------------------------------------------------------------------------- texts


def _tokens(source: Checkpoint, path: str) -> torch.Tensor:
    """Ids [batch, length] of the text, or of the built-in prose."""
    import torch

    from surgery.upcycling.proof import encoded, prose_tokens

    if not path:
        return prose_tokens(source, 512)[0]
    ids = encoded(source, _read(path))
    if ids is None:
        raise ConfigError("the model has no tokenizer.json, so that texts cannot be read", file=source.path)
    length = min(LENGTH, len(ids))
    batch = min(TOKENS, len(ids)) // length
    return torch.tensor(ids[: batch * length]).reshape(batch, length)


def _read(path: str) -> str:
    try:
        return read_small(path, TEXT_LIMIT, "text").decode()
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", file=path) from None


def _by_prompts(source: Checkpoint, wanted: Settings, layers: Sequence[int], rows: int, guide: Guide) -> None:
    """Each row is the mean direction of the mlp's inputs on one expert's texts, less that on its negative ones."""
    import torch

    from surgery.upcycling.proof import encoded

    start, path = wanted.router_kind
    texts = _prompts(start, path, rows)
    sums = {layer: torch.zeros(rows, source.spec.h) for layer in layers}
    for row, (positive, negative) in enumerate(texts):
        for text, sign in [*((t, 1.0) for t in positive), *((t, -1.0) for t in negative)]:
            ids = encoded(source, text)
            if ids is None:
                raise ConfigError("the model has no tokenizer.json, so that prompts cannot be read", file=source.path)

            def watch(name: str, given: Any, _: Any, row: int = row, sign: float = sign) -> None:
                if name.endswith(".mlp") and int(name.split(".")[1]) in sums:
                    mean = torch.nn.functional.normalize(given.flatten(0, -2).float(), dim=1).mean(0)
                    sums[int(name.split(".")[1])][row] += sign * mean

            forward(source, torch.tensor(ids[:LENGTH])[None], "float32", watch=watch)
    for layer, found in sums.items():
        guide.routers[layer] = scaled_rows(found - found.mean(0))  # what all of them have in common routes nothing


def _prompts(start: str, path: str, rows: int) -> list[tuple[list[str], list[str]]]:
    """Positive and negative texts of every row.  Raises UsageError and ConfigError."""
    if not path:
        raise UsageError(f"--router {start} needs a file", hint=f"--router {start}:FILE.yaml, a list of {rows} entries")
    entries = read_yaml(path, start)
    if not isinstance(entries, list) or len(entries) != rows:
        raise ConfigError(f"should be a list of {rows} entries, one for each expert (or virtual group)", file=path)
    out = []
    for entry in entries:
        given: Mapping[str, Any] = entry if isinstance(entry, dict) else {"positive": entry}
        both = [given.get(key, []) for key in ("positive", "negative")]
        lists = [[t] if isinstance(t, str) else t for t in both]
        if set(given) - {"positive", "negative"} or not lists[0]:
            raise ConfigError(f"entry {show(entry)} is neither texts nor positive: and negative: texts", file=path)
        if not all(isinstance(t, list) and all(isinstance(x, str) for x in t) for t in lists):
            raise ConfigError(f"entry {show(entry)} holds something that is no text", file=path)
        if start == "domains":
            lists = [[_read(str(Path(path).parent / name)) for name in names] for names in lists]
        out.append((lists[0], lists[1]))
    return out
