"""One step's gradients: every micro-batch forward and backward, its losses divided by what the whole step has.

    losses = gradients(model, rows, objective, world=world)
    losses["loss"], losses["ce"]                       # floats, of all ranks; gradients lie in the parameters

With a `preference` rows are pairs, what is minimised is a loss of pairs, and its figures stand in place of `ce`.

The model is called without an attention mask and without a cache: only so do positions that begin anew isolate the
documents of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from surgery.midtraining.preference import FIGURES, Preference, completion_logps
from surgery.midtraining.router_telemetry import RouterTelemetry
from surgery.midtraining.routers import RouterLog, by_kind
from surgery.midtraining.sharding import trunk
from surgery.running.loading import logits_divisor

TOKENS, ROUTERS = ("ce", "z"), ("balance", "router_z")  # the terms of a loss of tokens, and those of mixtures


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
    preference: Preference | None = None  # None: every label is to be predicted
    routers: RouterLog | None = field(default=None, compare=False)  # None: a dense model
    telemetry: Mapping[str, RouterTelemetry] = field(default_factory=dict, compare=False)  # by the kind of mixture

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of a step's losses and figures."""
        of_labels = ("dpo", *FIGURES) if self.preference else TOKENS
        return ("loss", *of_labels, *(ROUTERS if self.routers else ()))


def gradients(model: Any, parts: Sequence[MicroBatch], objective: Objective, world: World) -> dict[str, float]:
    """Add the gradients of a step to the parameters; returns its losses, and how many `labels` and `tokens` it had.

    `parts` are this rank's micro-batches.
    """
    mine = [float(sum(p.learnt for p in parts)), float(sum(p.tokens.numel() for p in parts))]
    labels, tokens = (int(n) for n in parallel.total(world, mine))
    divisor = DIVISORS[objective.divisor](labels, tokens)
    if objective.preference:
        divisor = int(parallel.total(world, [float(sum(len(p.tokens) for p in parts))])[0]) // 2
    sums = torch.zeros(len(objective.terms), device=world.device)
    for i, part in enumerate(parts):
        with parallel.micro_batch(model, last=i + 1 == len(parts)):
            terms = _terms(model, part, objective, world, max(divisor, 1), len(parts), labels)
            terms[0].backward()
            sums += torch.stack([term.detach().float() for term in terms])
    values = dict(zip(objective.terms, parallel.total(world, sums.tolist()), strict=True))
    return {**values, "labels": labels, "tokens": tokens}


def _terms(
    model: Any, part: MicroBatch, objective: Objective, world: World, divisor: int, count: int, labels: int
) -> list[torch.Tensor]:
    """The scalars of `objective.terms`, of one micro-batch; the first has a gradient."""
    with objective.precision.computing(world.device):
        with objective.routers or nullcontext():
            hidden = hidden_states(model, part, objective.across)
        head = model.get_output_embeddings().weight
        loss, *terms = _of_labels(hidden, head, part, objective, divisor)
    if objective.routers:
        routed = objective.routers.take()
        source = part.source.repeat_interleave(part.tokens.shape[1])
        if part.padding is not None:
            real = ~part.padding.reshape(-1)
            routed, source = tuple(r.where(real) for r in routed), source[real]
        balance = router_z = torch.zeros((), device=world.device)
        rule, share = objective.rule, {"micro_batches": count, "ranks": world.size, "labels": labels}
        for kind, alike in by_kind(routed).items():
            balance = balance + balance_loss(alike, rule, reduce=parallel.summing(world), **share)
            router_z = router_z + router_z_loss(alike, rule, **share)
            if kind in objective.telemetry:
                objective.telemetry[kind].add(alike, source)
        loss = loss + objective.balance * balance + objective.router_z * router_z
        terms += [balance, router_z]
    return [loss, *terms]


def _of_labels(
    hidden: torch.Tensor, head: torch.Tensor, part: MicroBatch, objective: Objective, divisor: int
) -> list[torch.Tensor]:
    """The loss of a micro-batch's labels or pairs, which has a gradient, and what is told of it."""
    if objective.preference is None:
        terms = chunked_loss(hidden, head, part.labels, divisor, z_coef=objective.z_loss, chunk=objective.chunk)
        return list(terms)
    logps, lengths = completion_logps(hidden, head, part.labels, objective.chunk)
    reference = torch.zeros_like(logps) if part.reference is None else part.reference.to(logps.dtype)
    loss, figures = objective.preference.terms(logps, reference, lengths)
    return [loss / divisor, loss / divisor, *(figures / divisor)]


def hidden_states(model: Any, part: MicroBatch, across: bool = False) -> torch.Tensor:
    """What the head turns into logits, [rows, sequence, width]: what the final norm gives, over a Granite's divisor.

    across   True: tokens see earlier documents of their row, by a mask of ones, which turns isolation off
    """
    mask = torch.ones_like(part.tokens) if across and part.positions is not None else None
    out = trunk(model)(input_ids=part.tokens, position_ids=part.positions, attention_mask=mask, use_cache=False)
    hidden: torch.Tensor = out.last_hidden_state
    divisor = logits_divisor(model)
    return hidden if divisor == 1 else hidden / divisor
