"""What the routers do, in numbers: load, entropy, dead experts, pairs chosen together, drift since the start.

    telemetry = RouterTelemetry([m.layer for m in mixtures], sources=["web", "code"])
    telemetry.add(routed, source)                   # every micro-batch; nothing is read back from the device
    reading = telemetry.read(reduce)                # where a line is logged: plain lists, and the window starts anew
    summary(reading)                                # {"max_load": 1.31, ...} of the worst layer, for a log
    alarms(reading)                                 # ["layer 3: the busiest expert has 4.2 times the mean load", ...]

A reading has `layers`, the numbers of the L layers with experts, and a list over them of each of these (E experts; of a
model with experts in its mlp and in its attention each kind has telemetry of its own):

    load          [L][E]  share of the choices, 1 / E where even      max_load      [L]  the busiest expert's, times E
    load_cv       [L]     standard deviation / mean of the load       load_entropy  [L]  1 even, 0 all on one expert
    dead          [L]     share of the experts without a token        gate_entropy  [L]  of a token's probabilities
    logit_rms     [L]     root mean square of the logits              together      [L][E][E]  see below
    by_source     {name: [L][E]}  load by the source of the tokens    tokens, dropped   of the window; dropped is 0

`together[i][j]` is the share of the tokens of expert i that also chose expert j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.midtraining.balance import Reduce, alone
from surgery.midtraining.routers import Mixture, Routed

Reading = dict[str, Any]
MAX_LOAD = 4.0  # times the mean
MOST = 0.75  # of the way from the mean to the load that is possible, E / top_k: few experts cannot reach MAX_LOAD
DEAD = 0.1


class RouterTelemetry:
    """Sums over the micro-batches of a window, on the device of the routers."""

    def __init__(self, layers: Sequence[int], sources: Sequence[str] = ()) -> None:
        self.layers, self.sources = tuple(layers), tuple(sources)
        self._sums: dict[str, Tensor] = {}
        self._top_k = 1

    @torch.no_grad()
    def add(self, routed: Sequence[Routed], source: Tensor | None = None) -> None:
        """source: int64 [T], the number of each token's source in `sources`; needed if there are any."""
        experts, self._top_k = routed[0].logits.shape[-1], routed[0].experts.shape[-1]
        parts: dict[str, list[Tensor]] = {"tokens": [], "together": [], "entropy": [], "squares": [], "by_source": []}
        for r in routed:
            chosen = torch.zeros_like(r.logits, dtype=torch.float32).scatter_(-1, r.experts, 1.0)  # [T, E]
            chances = r.probabilities()
            parts["tokens"].append(chosen.new_tensor(len(chosen)))
            with torch.autocast(chosen.device.type, enabled=False):  # bf16 counts to 256
                parts["together"].append(chosen.T @ chosen)  # its diagonal is the load
            parts["entropy"].append(-torch.xlogy(chances, chances).sum() / math.log(experts))
            parts["squares"].append(r.logits.float().square().mean(-1).sum())
            if self.sources:
                assert source is not None, "whose tokens are they?"
                empty = chosen.new_zeros(len(self.sources), experts)
                parts["by_source"].append(empty.index_add_(0, source.reshape(-1), chosen))
        for name, values in parts.items():
            if values:
                new = torch.stack(values).double()
                self._sums[name] = self._sums[name] + new if name in self._sums else new

    def counts(self) -> Tensor:
        """int64 [L, E]: the choices of the window, on this rank."""
        return self._sums["together"].diagonal(dim1=1, dim2=2).long()

    def read(self, reduce: Reduce = alone) -> Reading:
        """The window's numbers over all ranks, `reduce` being a sum; {} if nothing was added.  A new window begins."""
        sums, self._sums = {name: reduce(value).cpu() for name, value in self._sums.items()}, {}
        return {"layers": list(self.layers), **_reading(sums, self._top_k, self.sources)} if sums else {}


def _reading(sums: Mapping[str, Tensor], top_k: int, sources: Sequence[str]) -> Reading:
    tokens, pairs = sums["tokens"], sums["together"]
    counts = pairs.diagonal(dim1=1, dim2=2)
    dropped = int(tokens.sum()) * top_k - int(counts.sum())
    assert dropped == 0, f"{dropped} choices of experts are lost"
    load = counts / counts.sum(-1, keepdim=True)
    reading = {
        "load": load,
        "max_load": load.amax(-1) * load.shape[1],
        "load_cv": load.std(-1, correction=0) * load.shape[1],
        "load_entropy": -torch.xlogy(load, load).sum(-1) / math.log(load.shape[1]),
        "dead": (counts == 0).double().mean(-1),
        "gate_entropy": sums["entropy"] / tokens,
        "logit_rms": (sums["squares"] / tokens).sqrt(),
        "together": pairs / counts.clamp(min=1).unsqueeze(-1),
    }
    out: Reading = {name: value.float().tolist() for name, value in reading.items()}
    if sources:
        by = sums["by_source"]
        shares = (by / by.sum(-1, keepdim=True).clamp(min=1)).float()
        out["by_source"] = {name: shares[:, i].tolist() for i, name in enumerate(sources)}
    return {**out, "tokens": int(tokens[0]), "dropped": dropped, "top_k": top_k}


WORST: Mapping[str, Callable[[Sequence[float]], float]] = {
    "max_load": max, "load_cv": max, "load_entropy": min, "dead": max, "gate_entropy": min, "logit_rms": max,
    "weight_drift": max, "agreement": min,
}  # fmt: skip


def summary(reading: Reading) -> dict[str, float]:
    """One number of each kind for a log, that of the worst layer: {"max_load": ...}."""
    return {name: round(worst(reading[name]), 6) for name, worst in WORST.items() if name in reading}


def alarms(reading: Reading) -> list[str]:
    """Sentences about layers whose experts are used too unevenly; [] if all is well."""
    if not reading:
        return []
    experts = len(reading["load"][0])
    most = min(MAX_LOAD, 1 + MOST * (experts / reading["top_k"] - 1))
    said = []
    for layer, load, dead in zip(reading["layers"], reading["max_load"], reading["dead"], strict=True):
        if load > most:
            said.append(f"layer {layer}: the busiest expert has {load:.1f} times the mean load (more than {most:.1f})")
        if dead > DEAD:
            said.append(f"layer {layer}: {dead:.0%} of {experts} experts had no token (more than {DEAD:.0%})")
    return said


# --------------------------------------------------------------------------------------------- drift since the start


@torch.no_grad()
def snapshot(mixtures: Sequence[Mixture], routed: Sequence[Routed]) -> dict[str, Tensor]:
    """The routers' weights and their choices on a fixed batch, to be kept with the run's state: on the CPU."""
    weights = {f"{m.name}.weight": _whole(m.weight) for m in mixtures}
    return weights | {f"{m.name}.experts": r.experts.cpu() for m, r in zip(mixtures, routed, strict=True)}


@torch.no_grad()
def drift(start: Mapping[str, Tensor], mixtures: Sequence[Mixture], routed: Sequence[Routed]) -> Reading:
    """What changed since `snapshot`, `routed` being of the same batch.

    weight_drift [L]: |now - start| / |start| of the weights; agreement [L]: the share of the choices that are the same.
    """
    weight_drift, agreement = [], []
    for mixture, now in zip(mixtures, routed, strict=True):
        before, weight = start[f"{mixture.name}.weight"], _whole(mixture.weight)
        weight_drift.append(float((weight - before).norm() / before.norm().clamp(min=1e-12)))
        chosen, experts = start[f"{mixture.name}.experts"], now.experts.cpu()
        same = (chosen.unsqueeze(-1) == experts.unsqueeze(-2)).any(-1)
        agreement.append(float(same.double().mean()))
    return {"weight_drift": weight_drift, "agreement": agreement}


def _whole(weight: Tensor) -> Tensor:
    """A copy in fp32 on the CPU, of a sharded one too (then every rank must call)."""
    full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full.detach().to("cpu", torch.float32, copy=True)
