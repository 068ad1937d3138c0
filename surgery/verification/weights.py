"""A loaded transformers model seen as canonical parts that can be tried in another form and put back.

    weights = Weights(model, spec)
    with weights.tried({"layers.0.attn.q": tensor}):
        ...                                           # the model computes with this tensor

`HYPOTHESES` are the known ways to get a layout wrong, as data: what lies in the model is read as if it were laid
out in another way, and brought into the canonical one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.formats.hf.table import table
from surgery.formats.table import row as make_row
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import gather, spread, unweave, weave
from surgery.model.spec import PARTS, Spec, full_template
from surgery.tensors.axes import Axes, Named, flat, parse
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import Lazy, Map, walk

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


class Weights:
    """The parts of a model in memory; `tried` changes some of them for a while, `keep` for good."""

    def __init__(self, model: Any, spec: Spec) -> None:
        """Raises LayoutError if the model's parameters are not those of `spec`."""
        stored = model.state_dict().keys()  # statistics of routers are buffers, tables of angles are not stored
        held = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in stored}}
        self.parameters: dict[str, torch.Tensor] = held
        self.spec = spec
        rows = table(spec.family, self.parameters)
        stored = {name: InMemory(tensor.detach()) for name, tensor in self.parameters.items()}
        self.parts = gather(rows, {Rank(): stored}, spec, Topology()).parts
        self._changed: dict[str, torch.Tensor] = {}
        leaves = {name: self._leaf(name) for name in self.parts}
        owner = {id(leaf): name for name, leaf in leaves.items()}
        self._woven = {
            name: s.tensor for name, s in spread(rows, leaves, spec, Topology())[Rank()].items() if name in stored
        }
        self._users: dict[str, list[str]] = {}
        for name, tensor in self._woven.items():
            for node in walk(tensor):
                if id(node) in owner:
                    self._users.setdefault(owner[id(node)], []).append(name)

    def _leaf(self, name: str) -> Lazy:
        part = self.parts[name]
        return Map(lambda: self._changed.get(name, part.full()), (), part.dtype, part.shape, whole=True)

    def keep(self, changes: Tensors) -> dict[str, torch.Tensor]:
        """Put tensors in the place of parts; returns the parameters as they were before."""
        import torch

        self._changed = {n: t.reshape(self.parts[n].shape).float().clone() for n, t in changes.items()}
        names = dict.fromkeys(user for part in changes for user in self._users[part])
        fresh = {name: self._woven[name].full().clone() for name in names}
        before = {name: self.parameters[name].detach().clone() for name in names}
        with torch.no_grad():
            for name, tensor in fresh.items():
                self.parameters[name].copy_(tensor)
        self._changed = {}
        return before

    @contextmanager
    def tried(self, changes: Tensors) -> Iterator[None]:
        """The model with other tensors for some parts; put back at the end."""
        import torch

        before = self.keep(changes)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    self.parameters[name].copy_(tensor)


# ---------------------------------------------------------------------------------------- known mistakes, as data

Change = Callable[[Weights, int], dict[str, "torch.Tensor"]]  # the changed parts of one layer


@dataclass(frozen=True)
class Hypothesis:
    """A mistake that the weights may hold: `change` gives the parts of a layer with the mistake undone, {} if the
    model has no such parts."""

    cause: str
    change: Change


def _relabelled(layouts: Mapping[str, str], inverse: bool) -> Change:
    """Parts that lie in another layout than they should; `inverse`: that layout was undone once too often."""

    def change(weights: Weights, layer: int) -> dict[str, torch.Tensor]:
        out = {}
        for template, wrong in layouts.items():
            full = full_template(template)
            name = full.format(l=layer)
            if name in weights.parts:
                right = PARTS[full].layout
                out[name] = _moved(weights.parts[name], parse(wrong), right, weights.spec, inverse)
        return out

    return change


def _moved(part: Lazy, wrong: Axes, right: Axes, spec: Spec, inverse: bool) -> torch.Tensor:
    """Read a tensor as if it were laid out as `wrong` and bring it to `right`, or the other way round."""
    source, target = (right, wrong) if inverse else (wrong, right)
    return Named(InMemory(part.full()), source, spec.sizes).to(target).data.full()


def _swapped(*pairs: tuple[str, str]) -> Change:
    """Parts that took each other's places."""

    def change(weights: Weights, layer: int) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for one, other in pairs:
            for expert in range(weights.spec.experts if "{e}" in one else 1):
                a, b = (full_template(t).format(l=layer, e=expert) for t in (one, other))
                if a in weights.parts and b in weights.parts and weights.parts[a].shape == weights.parts[b].shape:
                    out |= {a: weights.parts[b].full(), b: weights.parts[a].full()}
        return out

    return change


def _retaken(wrong: str, right: str, inverse: bool) -> Change:
    """Query, key and value of a fused tensor that was taken apart as `wrong`, where it is `right`; biases too."""
    tables = []
    for end, columns in (("", " h"), (".bias", "")):
        parts = [f"attn.{x}{end}" for x in "qkv"]
        layouts = (right, wrong) if inverse else (wrong, right)
        tables.append(tuple(make_row("", *parts, layout=rows + columns) for rows in layouts))

    def change(weights: Weights, layer: int) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for put, take in tables:
            names = [part.format(l=layer) for part in put.parts]
            if all(name in weights.parts for name in names):
                held = {name: InMemory(weights.parts[name].full()) for name in names}
                whole = weave(put, {"l": layer}, held, weights.spec, weights.spec.sizes)
                same = Named(whole.data, take.layout, whole.sizes)
                out |= {n: t.full() for n, t in unweave(take, {"l": layer}, same, weights.spec)}
        return out

    return change


_Q = {"attn.q": "(g n half two) h", "attn.q.bias": "(g n half two)"}
_K = {"attn.k": "(g half two) h", "attn.k.bias": "(g half two)"}
_NORMS = {"attn.q_norm": "(g n half two)", "attn.k_norm": "(g half two)", "attn.q_head_norm": "(half two)",
          "attn.k_head_norm": "(half two)"}  # fmt: skip
_Q_HEADS = {"attn.q": "(n g d) h", "attn.q.bias": "(n g d)", "attn.q_norm": "(n g d)"}
_O_HEADS = {"attn.o": "h (n g d)"}
_PAIRS = "pairs lie side by side, as Meta stores them"
_ACROSS = "query heads lie across the key/value groups"
_LAYOUTS: tuple[tuple[str, Mapping[str, str]], ...] = (
    (f"rotary layout of q and k: {_PAIRS}", {**_Q, **_K}),
    (f"rotary layout of q, k and their norms: {_PAIRS}", {**_NORMS, **_Q, **_K}),
    (f"rotary layout of q: {_PAIRS}", _Q),
    (f"rotary layout of k: {_PAIRS}", _K),
    (f"rotary layout of the norms of q and k: {_PAIRS}", _NORMS),
    (f"GQA order of q and o: {_ACROSS}", {**_Q_HEADS, **_O_HEADS}),
    (f"GQA order of q: {_ACROSS}", _Q_HEADS),
    (f"GQA order of o: {_ACROSS}", _O_HEADS),
)
_FUSED = (
    "query, key and value were split as three blocks off a tensor that is woven by head group",
    "query, key and value were taken as woven by head group out of a tensor of three blocks",
)

ATTENTION: tuple[Hypothesis, ...] = (
    *(Hypothesis(cause, _relabelled(layouts, False)) for cause, layouts in _LAYOUTS),
    *(Hypothesis(f"{cause} (the inverse)", _relabelled(layouts, True)) for cause, layouts in _LAYOUTS),
    Hypothesis("k and v are swapped", _swapped(("attn.k", "attn.v"), ("attn.k.bias", "attn.v.bias"))),
    Hypothesis(_FUSED[0], _retaken("(* g d)", "(g * d)", False)),
    Hypothesis(_FUSED[1], _retaken("(* g d)", "(g * d)", True)),
)
MLP: tuple[Hypothesis, ...] = (
    Hypothesis(
        "gate and up are swapped",
        _swapped(("mlp.gate", "mlp.up"), ("experts.{e}.gate", "experts.{e}.up"), ("shared.gate", "shared.up")),
    ),
)
NORMS: tuple[Hypothesis, ...] = (
    Hypothesis(
        "the two norms of a layer are swapped",
        _swapped(("attn_norm", "mlp_norm"), ("attn_norm.bias", "mlp_norm.bias"), ("attn_post_norm", "mlp_post_norm")),
    ),
    Hypothesis("the norms of q and k are swapped", _swapped(("attn.q_head_norm", "attn.k_head_norm"))),
)

# Axes along which the slices of a part may lie in another order.
_ORDERS: tuple[tuple[str, str], ...] = (("key/value heads", "g"), ("query heads", "g n"))


def head_order(weights: Weights, layer: int, a_parts: Mapping[str, Lazy]) -> tuple[str, dict[str, torch.Tensor]] | None:
    """If heads of a layer are A's in another order: the order, and the parts put right.  Found by comparing with A."""
    out: dict[str, torch.Tensor] = {}
    orders: dict[str, str] = {}
    for template in ("attn.q", "attn.q.bias", "attn.k", "attn.k.bias", "attn.v", "attn.v.bias", "attn.o"):
        name = full_template(template).format(l=layer)
        if name not in weights.parts or name not in a_parts:
            continue
        ours, theirs = weights.parts[name].full(), a_parts[name].full().float()
        for label, axes in _ORDERS:
            order = _order(ours, theirs, PARTS[full_template(template)].layout, weights.spec, axes)
            if order is not None and order != sorted(order):
                out[name] = theirs
                orders[f"{label} of {template.removeprefix('attn.')}"] = f"B has A's {order}"
                break
    text = "; ".join(f"{what}: {order}" for what, order in orders.items())
    return (text, out) if out else None


def _order(ours: torch.Tensor, theirs: torch.Tensor, layout: Axes, spec: Spec, names: str) -> list[int] | None:
    """Which slice of theirs each of our slices is, along the product of some axes; None unless all are found once."""
    import torch

    if ours.shape != theirs.shape or not set(names.split()) <= set(flat(layout)):
        return None
    slices = []
    for tensor in (ours, theirs):
        named = Named(InMemory(tensor), layout, spec.sizes)
        wanted = tuple(names.split())
        rest = tuple(a for a in flat(layout) if a not in wanted)
        slices.append(named.to((wanted, rest)).data.full())
    found = [[j for j, b in enumerate(slices[1]) if torch.equal(a, b)] for a in slices[0]]
    order = [js[0] for js in found if len(js) == 1]
    return order if len(set(order)) == len(found) else None


def moved_padding(weights: Weights, name: str) -> dict[str, torch.Tensor]:
    """A vocabulary with rows of zeros in between: the same with those rows at the end; {} if there are none."""
    import torch

    table_ = weights.parts[name].full()
    used = table_.ne(0).any(1)
    if bool(used.all()) or not bool(used.any()) or bool(used[: int(used.sum())].all()):
        return {}
    return {name: torch.cat([table_[used], table_[~used]])}
