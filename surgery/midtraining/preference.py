"""Preferences (DPO and its kin): make the chosen completion likelier than the rejected one, against a frozen reference.

    preference = Preference("sigmoid", beta=0.1)
    loss, figures = preference.terms(logps, reference, tokens)       # rows: chosen, rejected, chosen, rejected, ...

With r the log-probability of a completion (summed over its tokens) less that of the reference, and m = r of the chosen
less r of the rejected one, a pair's loss is

    sigmoid   -(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)      s: label smoothing       (Rafailov 2305.18290)
    ipo       (m - 1 / (2 beta))^2, log-probabilities being means over tokens                     (Azar 2310.12036)
    hinge     max(0, 1 - beta m)                                                                  (Zhao 2305.10425)

as in trl's DPOTrainer (trl/trainer/dpo_trainer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from surgery.midtraining.loss import CHUNK, IGNORE
from surgery.midtraining.settings_data import Goal

Loss = Callable[[Tensor, float, float], Tensor]
LOSSES: Mapping[str, Loss] = {
    "sigmoid": lambda m, beta, s: -(1 - s) * logsigmoid(beta * m) - s * logsigmoid(-beta * m),
    "ipo": lambda m, beta, s: (m - 1 / (2 * beta)).square(),
    "hinge": lambda m, beta, s: (1 - beta * m).relu(),
}
FIGURES = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "kl", "length/chosen",
           "length/rejected")  # fmt: skip


@dataclass(frozen=True)
class Preference:
    """Which loss; its figures are those of `FIGURES`."""

    loss: str = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0

    def terms(self, logps: Tensor, reference: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all pairs together, and the figures' sums over pairs [len(FIGURES)], without a gradient.

        logps, reference [rows]: of completions      tokens [rows]: of each
        `kl` is the mean log-ratio of reference to model per token: an estimate of their KL divergence where completions
        are the reference's own.
        """
        gained = logps - reference
        ratio = gained / tokens if self.loss == "ipo" else gained
        chosen, rejected = ratio[0::2], ratio[1::2]
        loss = LOSSES[self.loss](chosen - rejected, self.beta, self.smoothing).sum()
        with torch.no_grad():
            good, bad = self.beta * chosen, self.beta * rejected
            kl = (-gained / tokens).view(-1, 2).mean(1)
            figures = (good, bad, good - bad, (good > bad).to(good.dtype), kl, tokens[0::2], tokens[1::2])
            return loss, torch.stack([figure.to(good.dtype).sum() for figure in figures])


def preference_of(goal: Goal) -> Preference | None:
    """What the run says; None if it learns tokens."""
    return Preference(goal.loss, goal.beta, goal.label_smoothing) if goal.name == "dpo" else None


def completion_logps(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of each row's labels, summed, with a gradient, and how many they are: fp32 [rows].

    hidden [rows, sequence, width], weight [vocabulary, width], labels [rows, sequence], -100 where there is none
    """
    row, place = (labels != IGNORE).nonzero(as_tuple=True)
    kept, wanted = hidden[row, place], labels[row, place]
    size = chunk or max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // weight.shape[0])
    pieces = [
        checkpoint(_logps, kept[i : i + size], weight, wanted[i : i + size], use_reentrant=False)
        for i in range(0, len(row), size)
    ]
    zeros = torch.zeros(len(labels), device=hidden.device)
    sums = zeros.index_add(0, row, torch.cat([zeros[:0], *pieces]))
    return sums, zeros.index_add(0, row, torch.ones_like(row, dtype=zeros.dtype)).clamp(min=1)


def _logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.to(hidden.dtype).t()).float()
    found: Tensor = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return found
