"""From a dense checkpoint to a mixture of experts: parts -> parts, all of them lazy.

result = upcycled(open_checkpoint("SmolLM2-135M"), Settings(experts=64, top_k=8))
result.checkpoint.spec.experts, result.layout.losses, result.target.family
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.errors import ConfigError, UsageError, shown
from surgery.formats.base import Checkpoint
from surgery.model.spec import PARTS, Spec, template_of
from surgery.model.wording import in_words
from surgery.running.device import CPU, Device
from surgery.tensors.axes import shape_of
from surgery.tensors.gather import scaled, taken
from surgery.tensors.lazy import Fill, Lazy, Map, boxes, same_bits
from surgery.upcycling.dense_to_moe.measures import Measured, measured
from surgery.upcycling.dense_to_moe.noise import Noisy, Redrawn
from surgery.upcycling.dense_to_moe.resolve import Layout, resolve
from surgery.upcycling.dense_to_moe.routers import check_router, router
from surgery.upcycling.dense_to_moe.settings import Settings
from surgery.upcycling.dense_to_moe.strategies import Piece, pieces, redrawn_places
from surgery.upcycling.dense_to_moe.targets import Target, fitted
from surgery.upcycling.edit_experts.experts import mean
from surgery.upcycling.proof import Claim, refuse_losses

_PLACE = re.compile(r"layers\.(\d+)\.(?:experts\.(\d+)\.|shared\.)?(\w+)$")
NEURONS = {"gate": 0, "up": 0, "down": 1}  # the dimension of each matrix that its neurons lie along
COMPARED = 4 << 20  # bytes of fp32 that are compared at once


@dataclass(frozen=True)
class Upcycled:
    """The result before it is written, and everything that was decided on the way."""

    checkpoint: Checkpoint
    settings: Settings
    layout: Layout
    target: Target
    pieces: Mapping[int, tuple[Piece | None, Sequence[Piece]]]  # by layer: the shared expert and the routed ones
    models: Sequence[Checkpoint]  # the dense models that the pieces come from

    @property
    def exact(self) -> bool:
        return not self.layout.losses

    @property
    def family(self) -> str:
        return self.target.family

    def claim(self) -> Claim:
        group = self.layout.granularity if self.layout.grouped else 1
        layout = self.layout
        return Claim(layout.strategy, self.checkpoint.spec, self.exact, layout.rounds, group, self.intact)

    def intact(self, result: Checkpoint) -> float:
        """The share of the routed experts' neurons, in the first and the last layer that has some, whose row of gate,
        row of up and column of down are all the source's, bit for bit (times the factor)."""
        import torch

        whole = good = 0
        for layer in {min(self.pieces), max(self.pieces)}:
            for e, piece in enumerate(self.pieces[layer][1]):
                same = torch.ones(len(piece.neurons), dtype=torch.bool)
                for which, dim in NEURONS.items():
                    dense = taken(self.models[piece.source].parts[f"layers.{layer}.mlp.{which}"], dim, piece.neurons)
                    want = scaled(dense, getattr(piece, which))
                    got = result.parts[f"layers.{layer}.experts.{e}.{which}"]
                    for box in boxes(want.shape, 4, COMPARED):
                        ours, theirs = want.read(box), got.read(box)
                        if not same_bits(ours, theirs):
                            same[slice(*box[dim])] &= (ours == theirs).all(1 - dim)
                whole += len(same)
                good += int(same.sum())
        return good / max(1, whole)

    def to_json(self) -> dict[str, Any]:
        """What surgery.json says about it."""
        layout, spec = self.layout, self.checkpoint.spec
        return {
            "settings": self.settings.to_json(),
            "strategy": layout.strategy,
            "target": self.target.family,
            "experts": layout.experts,
            "top_k": layout.top_k,
            "granularity": layout.granularity,
            "copies": layout.copies,
            "expert_width": layout.m,
            "shared_width": spec.shared_ffn,
            "dense_layers": list(layout.dense),
            "factors": {"gate": layout.gate, "up": layout.up, "down": layout.down, "router": layout.weight},
            "exact": self.exact,
            "losses": list(layout.losses),
            "parameters": {"total": spec.parameters(), "active": spec.parameters(active=True)},
        }


def upcycled(source: Checkpoint, wanted: Settings, others: Sequence[Checkpoint] = (), on: Device = CPU) -> Upcycled:
    """`others` are the further models of a mix, opened; `on` is where the model runs, if the settings need that.

    Raises UsageError if the settings do not fit the model, ConfigError if no family holds the result, and
    UsageError with the reasons if the function would change and that was not allowed."""
    dense = source.spec
    check_mix(source, wanted, others)
    layout = resolve(wanted, dense)
    check_router(wanted, layout)
    spec, target = fitted(layout, dense, wanted.target, wanted.normalise)
    refuse_losses(layout.losses, wanted.force_lossy)
    found = measured(source, wanted, layout, on)
    cut = {i: pieces(layout, wanted, i, dense.ffn, found) for i in range(dense.layers) if spec.is_moe(i)}
    maker = _Maker((source, *others), spec, layout, wanted, cut, found)
    parts = {name: maker.part(name) for name in spec.part_names()}
    notes = [*source.notes, *layout.notes, *notes_of(dense, spec, layout, target)]
    made = replace(source, spec=spec, parts=parts, notes=tuple(dict.fromkeys(notes)))
    return Upcycled(made, wanted, layout, target, cut, (source, *others))


def notes_of(dense: Spec, spec: Spec, layout: Layout, target: Target) -> list[str]:
    """What has to be said of the model that is made, and of the programs that read it."""
    out = []
    if dense.tied and not spec.tied:
        out.append(f"the output head is written out: readers of {spec.family} do not tie it to the embedding")
    if spec.qkv_bias and not dense.qkv_bias:
        out.append(f"queries, keys and values get biases of zero, which readers of {spec.family} expect")
    if spec.shared_ffn and not layout.s:
        out.append(
            f"a {spec.family} always has a shared expert: it gets {spec.shared_ffn} neurons whose output is zero"
        )
    if target.spoilt:
        out.append(target.spoilt)
    if target.undivided and spec.top_k_renormalised:
        out.append(f"{target.undivided} does not divide the chosen weights of a {spec.family} by their sum, as the "
                   "config and transformers have it: there the result computes something else")  # fmt: skip
    return out


class _Maker:
    """Makes the parts of the result, one by one."""

    def __init__(
        self,
        models: Sequence[Checkpoint],
        spec: Spec,
        layout: Layout,
        wanted: Settings,
        cut: Mapping[int, tuple[Piece | None, Sequence[Piece]]],
        found: Measured | None = None,
    ) -> None:
        self.models, self.spec, self.layout, self.wanted, self.cut = models, spec, layout, wanted, cut
        self.source, self.found = models[0], found

    def part(self, name: str) -> Lazy:
        """A part of the result by its name."""
        match = _PLACE.match(name)
        template = template_of(name)
        if match and ".experts." in name:
            return self.expert(int(match[1]), int(match[2]), match[3])
        if match and ".shared." in name:
            return self.shared(int(match[1]), match[3])
        if template == "layers.{l}.router" and match:
            dtype = self.source.parts[f"layers.{match[1]}.mlp.gate"].dtype
            return router(self.wanted, self.layout, int(match[1]), self.spec.width, dtype, self.found)
        if name == "lm_head" and name not in self.source.parts:
            name = "embed"
        return self.common(name) if name in self.source.parts else self.zeros(name, template)

    def common(self, name: str) -> Lazy:
        """A part that is no expert's: the source's own, or the mean of the models of a mix."""
        parts = [model.parts[name] for model in self.models]
        if len(parts) == 1 or self.wanted.attention == "first":
            return parts[0]
        return Map(mean, parts)

    def zeros(self, name: str, template: str) -> Lazy:
        """Parts of the family that change nothing: the router's bias, q, k and v biases, the shared expert's gate."""
        if not template.endswith((".router.bias", ".q.bias", ".k.bias", ".v.bias", ".shared_gate")):
            raise ConfigError(f"the model has no {name}")
        shape = shape_of(PARTS[template].layout, self.spec.sizes)
        dtype = "float32" if template.endswith(".router.bias") else self.source.parts["layers.0.attn.q"].dtype
        return Fill(shape, dtype)

    def expert(self, layer: int, number: int, which: str) -> Lazy:
        """gate, up or down of a routed expert."""
        piece, name, wanted = self.cut[layer][1][number], f"layers.{layer}.experts.{number}.{which}", self.wanted
        found = self.taken(layer, piece, which)
        if self.layout.strategy == "drop" and wanted.reinit:
            places = redrawn_places(wanted, layer, number, which, self.layout.m)
            found = Redrawn(found, NEURONS[which], places, name, wanted.seed)
        if wanted.noise:
            found = Noisy(found, wanted.noise, f"{name}.noise", wanted.seed)
        return _times(found, getattr(piece, which))

    def taken(self, layer: int, piece: Piece, which: str) -> Lazy:
        """The neurons of a piece, as they are in its model."""
        return taken(self.models[piece.source].parts[f"layers.{layer}.mlp.{which}"], NEURONS[which], piece.neurons)

    def shared(self, layer: int, which: str) -> Lazy:
        """gate, up or down of the shared expert; a gate of zero lets half of it through."""
        piece = self.cut[layer][0] or Piece(range(self.spec.shared_ffn), down=0.0)
        if self.spec.shared_gate:
            piece = replace(piece, down=2.0 * piece.down)
        return _times(self.taken(layer, piece, which), getattr(piece, which))


def _times(src: Lazy, factor: float) -> Lazy:
    return Fill(src.shape, src.dtype) if factor == 0.0 else scaled(src, factor)


def check_mix(source: Checkpoint, wanted: Settings, others: Sequence[Checkpoint]) -> None:
    """Raise UsageError if there is nothing to mix, ConfigError for a model that is not shaped like the first."""
    if (wanted.strategy == "mix") != bool(wanted.sources):
        raise UsageError(
            "--strategy mix and --source MODEL belong together", hint="give every further model by --source"
        )
    if wanted.strategy == "mix" and wanted.experts < 1 + len(wanted.sources):
        raise UsageError(f"--experts {wanted.experts} cannot come from {1 + len(wanted.sources)} models")
    if wanted.strategy == "mix" and wanted.shared != "0":
        raise UsageError("--shared does not go with --strategy mix")
    for other in others:
        gaps = source.spec.changes(other.spec)
        dtypes = [n for n, part in source.parts.items() if n in other.parts and other.parts[n].dtype != part.dtype]
        if gaps:
            raise ConfigError(
                f"it is another model than {shown(source.path)}: that has {in_words(gaps)}", file=other.path
            )
        if dtypes:
            raise ConfigError(f"its weights are {other.dtype}, those of {shown(source.path)} {source.dtype}",
                              file=other.path, hint="--dtype casts all of them")  # fmt: skip
