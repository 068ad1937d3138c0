"""One step's gradients: every micro-batch forward and backward, its losses divided by what the whole step has.

    losses = gradients(model, rows, objective, world=world)
    losses["loss"], losses["ce"]                       # floats, of all ranks; gradients lie in the parameters

The model is called without an attention mask and without a cache: only so do positions that begin anew isolate the
documents of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.midtraining import parallel
from surgery.midtraining.balance import RULES, Rule, balance_loss, router_z_loss
from surgery.midtraining.batching import MicroBatch
from surgery.midtraining.loss import DIVISORS, chunked_loss
from surgery.midtraining.parallel import World
from surgery.midtraining.precision import Precision
from surgery.midtraining.router_telemetry import RouterTelemetry
from surgery.midtraining.routers import RouterLog
from surgery.midtraining.sharding import trunk

PARTS = ("loss", "ce", "z", "balance", "router_z")


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how it is computed; coefficients are those of `rule`."""

    precision: Precision
    z_loss: float = 0.0
    divisor: str = "labels"
    chunk: int | None = None
    across: bool = False  # do tokens see earlier documents of their row?
    balance: float = 0.0
    router_z: float = 0.0
    rule: Rule = RULES["ours"]
    routers: RouterLog | None = field(default=None, compare=False)  # None: a dense model
    telemetry: RouterTelemetry | None = field(default=None, compare=False)


def gradients(model: Any, parts: Sequence[MicroBatch], objective: Objective, world: World) -> dict[str, float]:
    """Add the gradients of a step to the parameters; returns its losses, and how many `labels` and `tokens` it had.

    `parts` are this rank's micro-batches.
    """
    mine = [float(sum(p.learnt for p in parts)), float(sum(p.tokens.numel() for p in parts))]
    labels, tokens = (int(n) for n in parallel.total(world, mine))
    divisor = DIVISORS[objective.divisor](labels, tokens)
    sums = torch.zeros(len(PARTS), device=world.device)
    for i, part in enumerate(parts):
        with parallel.micro_batch(model, last=i + 1 == len(parts)):
            terms = _terms(model, part, objective, world, max(divisor, 1), len(parts), labels)
            terms[0].backward()
            sums += torch.stack([term.detach().float() for term in terms])
    values = dict(zip(PARTS, parallel.total(world, sums.tolist()), strict=True))
    kept = PARTS if objective.routers else PARTS[:3]
    return {**{name: values[name] for name in kept}, "labels": labels, "tokens": tokens}


def _terms(
    model: Any, part: MicroBatch, objective: Objective, world: World, divisor: int, count: int, labels: int
) -> list[torch.Tensor]:
    """The scalars of `PARTS`, of one micro-batch; the first has a gradient."""
    with objective.precision.computing(world.device):
        with objective.routers or nullcontext():
            hidden = hidden_states(model, part, objective.across)
        head = model.get_output_embeddings().weight
        loss, ce, z = chunked_loss(hidden, head, part.labels, divisor, z_coef=objective.z_loss, chunk=objective.chunk)
    balance = router_z = torch.zeros((), device=loss.device)
    if objective.routers:
        routed = objective.routers.take()
        rule, ranks, reduce = objective.rule, world.size, parallel.summing(world)
        balance = balance_loss(routed, rule, micro_batches=count, ranks=ranks, labels=labels, reduce=reduce)
        router_z = router_z_loss(routed, rule, micro_batches=count, ranks=ranks, labels=labels)
        loss = loss + objective.balance * balance + objective.router_z * router_z
        if objective.telemetry:
            objective.telemetry.add(routed, part.source.repeat_interleave(part.tokens.shape[1]))
    return [loss, ce, z, balance, router_z]


def hidden_states(model: Any, part: MicroBatch, across: bool = False) -> torch.Tensor:
    """What the final norm gives, [rows, sequence, width].

    across   True: tokens see earlier documents of their row, by a mask of ones, which turns isolation off
    """
    mask = torch.ones_like(part.tokens) if across and part.positions is not None else None
    out = trunk(model)(input_ids=part.tokens, position_ids=part.positions, attention_mask=mask, use_cache=False)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden
