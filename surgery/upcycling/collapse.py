"""A mixture of experts becomes dense again: exactly where its experts are copies or virtual groups, else by averaging.

    made = collapsed(open_checkpoint("SmolLM2-moe"))
    made.checkpoint.spec.ffn, made.details["layers"], made.losses       # 1536, {"8 shards": 30}, ()

The chosen weights sum to a constant T.  If all experts are equal, the layer computes T times one of them.  If there are
G different ones, and the experts with equal rows in the router hold each of them equally often and are chosen together,
it computes T / G times their sum, which is one mlp of G times the width.  The shared expert stands in front.  Nothing
else is exact: `average` takes the mean of the experts, `by-router` the mean weighted by what the router gives each on a
text; both are refused unless they are forced.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.containers.text import read_json
from surgery.conversion.request import MEMORY
from surgery.errors import ConfigError, UsageError
from surgery.formats.base import PROVENANCE, Checkpoint
from surgery.formats.hf.config import choose_family, misfits
from surgery.model.spec import Spec
from surgery.running.device import CPU, Device
from surgery.tensors.gather import BLOCK, MATRICES, blocks, scaled
from surgery.tensors.lazy import ITEMSIZE, Concat, Fill, Lazy, Map, boxes, bytes_of, same_bits
from surgery.upcycling.edit_experts.experts import Changed, router_classes

if TYPE_CHECKING:
    import torch

ORDER = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo", "olmo3")
Shares = Mapping[int, tuple[Sequence[float], float]]  # by layer: share of each expert (sum 1), mean sum of weights


@dataclass(frozen=True)
class Dense:
    """What a layer with experts becomes: the shared expert if it counts, and some of the routed ones side by side.

    experts   of each different shard one: () if the routed ones add nothing     shards   how many different ones
    weights   None, or the weights of a mean over all experts, which is no exact collapse
    factor    on `down` of the routed part      shared   on that of the shared one, 0: it is left out
    why       of a mean: why it is not exact
    """

    experts: tuple[int, ...]
    factor: float
    shared: float
    weights: tuple[float, ...] | None = None
    why: str = ""

    @property
    def shards(self) -> int:
        return len(self.experts)

    def width(self, spec: Spec) -> int:
        return (spec.shared_ffn if self.shared else 0) + spec.expert_ffn * (1 if self.weights else len(self.experts))


def collapsed(
    source: Checkpoint, by: str = "exact", force_lossy: bool = False, tokens: int = 256, on: Device = CPU,
    memory: int = MEMORY,
) -> Changed:  # fmt: skip
    """Reads the experts once, to compare them.  `tokens` of text are run for `by-router`, within `memory` bytes.

    Raises ConfigError for a dense model, UsageError if it is not exact and that was not allowed.
    """
    spec = source.spec
    if not spec.experts:
        raise ConfigError("the model has no experts: it is dense already")
    moe = [i for i in range(spec.layers) if spec.is_moe(i)]
    found = {i: _exact(source, i, on) for i in moe}
    inexact = [i for i in moe if found[i].why]
    losses = [f"layer {i}: {found[i].why}" for i in inexact[:1]] + (
        [f"{len(inexact) - 1} more layers like that"] if len(inexact) > 1 else []
    )
    if inexact and (by == "exact" or not force_lossy):
        raise UsageError(
            f"the dense model would compute another function: {'; '.join(losses)}",
            hint="--collapse average or --collapse by-router takes means, with --force-lossy",
        )
    if inexact and by == "by-router":
        shares = router_shares(source, tokens, on, memory)
        found |= {i: replace(found[i], weights=tuple(shares[i][0]), factor=shares[i][1]) for i in inexact}
    dense = _dense(source, found, losses)
    kinds = Counter(f"mean ({d.why})" if d.weights else f"{d.shards} shards" for d in found.values())
    rounds = any(math.frexp(x)[0] != 0.5 for d in found.values() for x in (d.factor, d.shared) if x)
    details = {"by": by if inexact else "exact", "width": dense.spec.ffn, "layers": dict(kinds)}
    return Changed(dense, (source,), f"collapse, {details['by']}", tuple(losses), details, rounds)


def _exact(source: Checkpoint, layer: int, on: Device) -> Dense:
    """How a layer collapses; with `weights` and `why` if not exactly."""
    spec = source.spec
    shards, idle = _shards(source, layer, on)
    classes = router_classes(source, layer)
    total, why = _total(spec, len(set(classes)) == 1)
    kinds = sorted(set(shards), key=shards.index)
    shared, gated = _shared(source, layer)
    if idle and shared:
        return Dense((), 0.0, shared, None, gated)
    if not why and len(kinds) > 1:
        why = _ungrouped(shards, classes, spec.top_k)
    if why or gated:
        return Dense((), total, shared, (1 / spec.experts,) * spec.experts, why or gated)
    return Dense(tuple(shards.index(kind) for kind in kinds), total / len(kinds), shared)


def _shards(source: Checkpoint, layer: int, on: Device) -> tuple[list[bytes], bool]:
    """A digest of every expert's weights, and whether every `down` is zero."""
    digests, idle = [], True
    for e in range(source.spec.experts):
        digest = hashlib.sha256()
        for which in MATRICES:
            part = source.parts.get(f"layers.{layer}.experts.{e}.{which}")
            for data in blocks(part) if part is not None else ():
                digest.update(bytes_of(data.contiguous()))
                on.advance(data.nbytes)
                idle = idle and not (which == "down" and bool(data.any()))
        digests.append(digest.digest())
    return digests, idle


def _total(spec: Spec, uniform: bool) -> tuple[float, str]:
    """What the chosen weights sum to, and why that is no constant."""
    scale = spec.router_scale or 1.0
    softmax = spec.router_score == "softmax"
    if spec.top_k_renormalised or (softmax and spec.top_k == spec.experts):
        return scale, ""
    if softmax and uniform:
        return scale * spec.top_k / spec.experts, ""
    return scale * (
        spec.top_k / spec.experts if softmax else spec.top_k / 2
    ), "the chosen weights do not sum to a constant"


def _ungrouped(shards: Sequence[bytes], classes: Sequence[int], top_k: int) -> str:
    """Why experts that differ are not chosen in whole groups; empty if they are."""
    kinds = set(shards)
    members: dict[int, Counter[bytes]] = {}
    for shard, kind in zip(shards, classes, strict=True):
        members.setdefault(kind, Counter())[shard] += 1
    if any(set(m) != kinds or len(set(m.values())) > 1 for m in members.values()):
        return f"its {len(shards)} experts are no copies of each other, nor whole virtual groups"
    sizes = {sum(m.values()) for m in members.values()}
    if len(sizes) > 1 or top_k % sizes.pop():
        return f"top-{top_k} takes no whole virtual groups"
    return ""


def _shared(source: Checkpoint, layer: int) -> tuple[float, str]:
    """The factor on the shared expert's output (0: there is none, or it adds nothing), and why it is no constant."""
    down = source.parts.get(f"layers.{layer}.shared.down")
    if down is None or not any(bool(data.any()) for data in blocks(down)):
        return 0.0, ""
    gate = source.parts.get(f"layers.{layer}.shared_gate")
    if gate is None:
        return 1.0, ""
    return 0.5, "the shared expert is gated by the token" if bool(gate.full().any()) else ""


# -------------------------------------------------------------------------------------------------------- parts


def _dense(source: Checkpoint, found: Mapping[int, Dense], losses: Sequence[str]) -> Checkpoint:
    spec, notes = source.spec, list(source.notes)
    widths = {i: found[i].width(spec) if i in found else spec.ffn for i in range(spec.layers)}
    f = max(widths.values())
    if set(widths.values()) != {f}:
        notes.append(f"mlps of {min(widths.values())} neurons are padded to {f} with neurons that are zero")
    made = spec.replace(experts=0, expert_ffn=0, shared_ffn=0, ffn=f, moe_layers=(), top_k=0,
                        top_k_renormalised=False, router_bias=False,
                        router_score="softmax", router_scale=None, shared_gate=False)  # fmt: skip
    if made.qkv_bias and _zero_biases(source):
        made = made.replace(qkv_bias=False)
        notes.append("biases of queries, keys and values, which are all zero, are left out")
    if not made.tied and _equal(source.parts["embed"], source.parts["lm_head"]):
        made = made.replace(tied=True)
        notes.append("the output head is the embedding, bit for bit: they are tied")
    order = ORDER if spec.width % spec.heads == 0 else ORDER[1:]  # transformers' Llama insists on whole heads
    made = made.replace(family=next((n for n in order if not misfits(made, n)), None) or choose_family(made))
    if losses:
        notes.append("the result computes another function: " + "; ".join(losses))
    undo = _recorded_up(source)
    parts = {}
    for name in made.part_names():
        at, _, which = name.rpartition(".mlp.")
        if which in MATRICES:
            layer = int(at.split(".")[1])
            part = _matrix(source, layer, which, found[layer], undo) if layer in found else source.parts[name]
            parts[name] = _padded(part, 1 if which == "down" else 0, f)
        else:
            parts[name] = source.parts[name]
    return replace(source, spec=made, parts=parts, notes=tuple(notes))


def _matrix(source: Checkpoint, layer: int, which: str, dense: Dense, undo: float) -> Lazy:
    """gate, up or down of the collapsed layer."""
    at = f"layers.{layer}."
    strands = []
    if dense.shared:
        shared = source.parts[f"{at}shared.{which}"]
        strands.append(scaled(shared, dense.shared) if which == "down" else shared)
    factor = {"up": 1 / undo, "down": dense.factor * undo}.get(which, 1.0)
    if dense.weights:
        every = [source.parts[f"{at}experts.{e}.{which}"] for e in range(source.spec.experts)]
        strands.append(scaled(Map(_weighted(dense.weights), every), factor))
    else:
        strands += [scaled(source.parts[f"{at}experts.{e}.{which}"], factor) for e in dense.experts]
    return strands[0] if len(strands) == 1 else Concat(strands, 1 if which == "down" else 0)


def _weighted(weights: Sequence[float]) -> Any:
    """The weighted mean of as many tensors, in fp32, rounded once."""

    def mix(*tensors: torch.Tensor) -> torch.Tensor:
        out = tensors[0].float() * weights[0]
        for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
            out = out + tensor.float() * weight
        return out.to(tensors[0].dtype)

    return mix


def _padded(part: Lazy, dim: int, width: int) -> Lazy:
    missing = width - part.shape[dim]
    if not missing:
        return part
    shape = [missing if i == dim else n for i, n in enumerate(part.shape)]
    return Concat([part, Fill(shape, part.dtype)], dim)


def _zero_biases(source: Checkpoint) -> bool:
    return not any(
        bool(part.full().any())
        for name, part in source.parts.items()
        if name.endswith((".q.bias", ".k.bias", ".v.bias"))
    )


def _equal(a: Lazy, b: Lazy) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(same_bits(a.read(box), b.read(box)) for box in boxes(a.shape, ITEMSIZE[a.dtype], BLOCK))


def _recorded_up(source: Checkpoint) -> float:
    """The factor on `up` that an upcycling noted in surgery.json, to be moved back to `down`; 1 without one.

    Only powers of two are moved: they change no bit but the exponents, and the product stays the same.
    """
    path = source.path / PROVENANCE
    record = read_json(path, PROVENANCE) if path.is_file() else {}
    made = record.get("upcycling") if isinstance(record, dict) else None
    factors = made.get("factors") if isinstance(made, dict) else None
    value: Any = factors.get("up") if isinstance(factors, dict) else None
    fits = type(value) in (int, float) and 0 < value < 1e6 and math.frexp(value)[0] == 0.5
    return float(value) if fits else 1.0


# ---------------------------------------------------------------------------------------------- what a router does


def router_shares(source: Checkpoint, tokens: int, on: Device = CPU, memory: int = MEMORY) -> Shares:
    """By layer, the share of the router's weight that each expert gets on a text, and a token's mean sum of weights."""
    from surgery.running.before_head import before_head, room_for
    from surgery.running.tokens import prose_tokens

    spec, ids = source.spec, prose_tokens(source, tokens)[0]
    room, out = room_for([source], ids.numel(), memory, f"running {ids.numel():,} tokens"), {}
    for layer, route in before_head(source, ids, "float32", on, room=room).routes.items():
        chances = route.logits.softmax(-1) if spec.router_score == "softmax" else route.logits.sigmoid()
        weight = chances.gather(-1, route.chosen)
        if spec.top_k_renormalised:
            weight = weight / weight.sum(-1, keepdim=True)
        mass = weight.new_zeros(spec.experts).index_add(0, route.chosen.reshape(-1), weight.reshape(-1)).double()
        shares = [float(x) for x in mass / mass.sum()]
        out[layer] = (shares, float(mass.sum()) / len(weight) * (spec.router_scale or 1.0))
    return out
