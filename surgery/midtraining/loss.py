"""Cross-entropy and z-loss from hidden states, a chunk of tokens at a time: the logits are never held.

    loss, ce, z = chunked_loss(hidden, head.weight, labels, divisor=120, z_coef=1e-5)
    loss.backward()                                    # hidden and weight get their gradients

`ce` and `z` are sums over the labels that count, over `divisor`, and `loss` is ce + z.  The divisor is that of the
whole step, over all micro-batches and ranks, so that losses and gradients of its pieces add up: the mean of means is
another number where labels are masked.  Trainers divide by (a name of `DIVISORS`):

    labels       the labels of the step that count             (ours, OLMo-core, transformers)
    all_tokens   its tokens, whether they are learnt or not    (OLMo's olmo/train.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

IGNORE = -100
DIVISORS: Mapping[str, Callable[[int, int], int]] = {
    "labels": lambda labels, tokens: labels,
    "all_tokens": lambda labels, tokens: tokens,
}
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 28}  # logits that are computed together


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    divisor: float,
    *,
    z_coef: float = 0.0,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, of which gradients flow, and its two parts, of which none do: scalars, fp32 or wider.

    hidden   [..., width], as the final norm gives it     weight  [vocabulary, width] of the head
    labels   int64 [...], the id to predict at each place, or -100
    z_coef   times the square of logsumexp, of every label that counts
    chunk    tokens at a time; None: as many as fit into some megabytes
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    index = (wanted != IGNORE).nonzero().reshape(-1)
    kept = flat.index_select(0, index) if len(index) < len(wanted) else flat
    size = chunk or max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // weight.shape[0])
    loss, ce, z = _ChunkedLoss.apply(kept, weight, wanted[index], 1 / divisor, z_coef, size)  # type: ignore[no-untyped-call]
    return loss, ce, z


class _ChunkedLoss(torch.autograd.Function):
    """Both gradients are computed in the forward pass, while the logits of a chunk are there; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, z_coef: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        device = hidden.device.type
        work = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head, wide = weight.to(work), torch.promote_types(work, torch.float32)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(labels), chunk):
                rows = hidden[start : start + chunk].to(work)
                wanted = labels[start : start + chunk, None]
                logits = (rows @ head.t()).to(wide)
                log_chances = torch.log_softmax(logits, -1)
                said = log_chances.gather(1, wanted)
                lse = logits.gather(1, wanted) - said
                sums += torch.stack([-said.sum(), lse.square().sum()])
                grad = log_chances.exp_()  # the softmax, in place
                grad *= scale * (1 + 2 * z_coef * lse) if z_coef else scale
                grad.scatter_add_(1, wanted, torch.full_like(lse, -scale))
                grad = grad.to(work)
                if d_hidden is not None:
                    d_hidden[start : start + chunk] = grad @ head
                if d_weight is not None:
                    d_weight.addmm_(grad.t(), rows) if work == wide else d_weight.add_(grad.t() @ rows)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ce, z = sums[0] * scale, sums[1] * (scale * z_coef)
        ctx.mark_non_differentiable(ce, z)
        return ce + z, ce, z

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        by = grads[0]
        return (
            None if d_hidden is None else d_hidden * by.to(d_hidden.dtype),
            None if d_weight is None else d_weight * by.to(d_weight.dtype),
            *[None] * 4,
        )
