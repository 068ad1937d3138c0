"""Losses that keep a mixture of experts balanced, the bias that does without one, and what trainers differ in.

    routed = log.take()                                                # of one micro-batch, see routers.py
    loss = loss + 0.01 * balance_loss(routed, micro_batches=4) + 0.001 * router_z_loss(routed, micro_batches=4)
    translate(0.001, "transformers", top_k=8, layers=16)               # (0.008, "... times top_k ...")

Per layer, with f_e the share of all choices that fell on expert e and P_e its mean probability:

    balance = E * sum_e f_e P_e        1 if tokens spread evenly, E / top_k at worst; its gradient is that of P
    router z = mean(logsumexp(logits) ** 2)

Ours are means over layers and micro-batches.  The other trainers compute the same sums with other factors, which
`RULES` has as data, so that their runs can be repeated and their coefficients translated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from surgery.errors import UsageError
from surgery.midtraining.routers import Mixture, Routed

Reduce = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    """The sum over all ranks where there is one."""
    return tensor


@dataclass(frozen=True)
class Rule:
    """What a trainer makes of the two sums.

    one_pot          one value of the tokens of all layers together, instead of one of each layer
    times_top_k      f sums to top_k, not to 1
    sum_layers       over layers: the sum, not the mean
    sum_micro        over the micro-batches of a step: the sum, not the mean
    over_labels      divided by the labels of the whole step that count, not by the tokens of the micro-batch
    by_scores        f counts whom the scores alone would choose, whatever bias the router adds to choose
    source           where this was read
    """

    one_pot: bool = False
    times_top_k: bool = False
    sum_layers: bool = False
    sum_micro: bool = False
    over_labels: bool = False
    by_scores: bool = False
    source: str = ""


RULES: Mapping[str, Rule] = {
    "ours": Rule(),
    "transformers": Rule(
        one_pot=True,
        times_top_k=True,
        sum_micro=True,
        by_scores=True,
        source="models/mixtral/modeling_mixtral.py: load_balancing_loss_func; Trainer adds up micro-batches",
    ),
    "olmo_core": Rule(over_labels=True, sum_micro=True, source="olmo_core/nn/moe/loss.py, scale_loss_by_num_layers"),
    "megatron": Rule(
        sum_layers=True,
        source="megatron/core/transformer/moe/moe_utils.py, attached by router.py in every layer",
    ),
    "megablocks": Rule(source="megablocks/layers/moe.py: batched_load_balancing_loss"),
}


def balance_loss(
    routed: Sequence[Routed],
    rule: Rule = RULES["ours"],
    *,
    micro_batches: int = 1,
    ranks: int = 1,
    labels: int | Tensor | None = None,
    reduce: Reduce = alone,
) -> Tensor:
    """What a micro-batch adds to the balance loss of its step: fp32, with a gradient through the routers' logits.

    The values of all micro-batches and ranks of a step are to be added up.
    routed   of one kind of mixtures, with as many experts in every layer
    micro_batches, ranks   how many of them there are, a rank having so many micro-batches
    labels   of the whole step that count, on all ranks, for rules that divide by them
    reduce   sums an int64 tensor [layers, E] over the ranks: f is then that of the whole micro-batch, on every rank.
             Without it each rank balances its own tokens, and results depend on the number of ranks.
    """
    experts, top_k = routed[0].logits.shape[-1], routed[0].experts.shape[-1]
    counts = reduce(torch.stack([(r.by_scores() if rule.by_scores else r).counts() for r in routed]))
    chances = torch.stack([r.probabilities().mean(0) for r in routed])
    if rule.one_pot:
        counts, chances = counts.sum(0, keepdim=True), chances.mean(0, keepdim=True)
    shares = (counts / counts.sum(-1, keepdim=True)).to(chances.dtype)
    factor = experts * (top_k if rule.times_top_k else 1)
    return _share(routed, factor * (shares * chances).sum(-1), rule, micro_batches, ranks, labels)


def router_z_loss(
    routed: Sequence[Routed],
    rule: Rule = RULES["ours"],
    *,
    micro_batches: int = 1,
    ranks: int = 1,
    labels: int | Tensor | None = None,
) -> Tensor:
    """What a micro-batch adds to the router z-loss of its step; arguments as in `balance_loss`."""
    values = torch.stack([r.logits.float().logsumexp(-1).square().mean() for r in routed])
    values = values.mean(0, keepdim=True) if rule.one_pot else values
    return _share(routed, values, rule, micro_batches, ranks, labels)


def _share(
    routed: Sequence[Routed], values: Tensor, rule: Rule, micro_batches: int, ranks: int, labels: int | Tensor | None
) -> Tensor:
    """Of values per layer, this micro-batch's share of the step's loss."""
    value = values.sum() if rule.sum_layers else values.mean()
    if rule.over_labels:
        if labels is None:
            raise UsageError("this rule divides by the labels of the step", hint="give labels=")
        return value * (len(routed[0].logits) / labels)
    return value / (ranks if rule.sum_micro else ranks * micro_batches)


# ------------------------------------------------------------------------------------------------------- translations


def translate(
    coefficient: float, trainer: str, *, top_k: int, layers: int, micro_batches: int = 1, z_loss: bool = False
) -> tuple[float, str]:
    """Another trainer's coefficient as ours, of the balance loss or of the router z-loss, and a note for the user.

    layers          of the model that have experts
    micro_batches   of a step in the run that the coefficient is taken from
    Raises UsageError for a trainer that is not in `RULES`.
    """
    if trainer not in RULES:
        raise UsageError(f"no rule for the trainer {trainer!r}", hint=f"known: {', '.join(RULES)}")
    rule = RULES[trainer]
    factors = {
        "top_k": top_k if rule.times_top_k and not z_loss else 1,
        "layers": layers if rule.sum_layers else 1,
        "micro-batches": micro_batches if rule.sum_micro and not rule.over_labels else 1,
    }
    ours = coefficient
    for factor in factors.values():
        ours *= factor
    said = [f"{name} ({number})" for name, number in factors.items() if number != 1]
    note = f"{coefficient:g} of {trainer} is {ours:g} here" + (f": times {' and '.join(said)}" if said else "")
    if rule.one_pot:
        note += "; one value over all layers there, one of each layer here: equal while layers are alike"
    if rule.over_labels:
        note += "; divided by the labels that count there, by all tokens here"
    return ours, note


# ------------------------------------------------------------------------------------------------------ selection bias


def check_biases(mixtures: Sequence[Mixture]) -> None:
    """Raise UsageError for routers without a bias that chooses experts."""
    without = [m.name for m in mixtures if m.bias is None]
    if without:
        hint = "leave out moe.bias_rate and use the balance loss; glm4_moe and ernie4_5_moe have the bias"
        raise UsageError(f"the router of {without[0]} has no bias that chooses experts", hint=hint)


@torch.no_grad()
def nudge_biases(mixtures: Sequence[Mixture], counts: Tensor, rate: float = 1e-3) -> None:
    """Balance without a loss (Wang et al. 2408.15664; DeepSeek-V3): call it after a step.

    Experts that were chosen less often than the mean become easier to choose by `rate`, the others harder.

    counts: int64 [layers, E], of the whole step and of all ranks.  Raises UsageError for routers without such a bias.
    """
    check_biases(mixtures)
    for mixture, chosen in zip(mixtures, counts, strict=True):
        bias = mixture.bias
        assert bias is not None
        step = (rate * (chosen.double().mean() - chosen).sign()).to(bias.dtype).view(bias.shape)
        bias.add_(distribute_tensor(step, bias.device_mesh, bias.placements) if isinstance(bias, DTensor) else step)
