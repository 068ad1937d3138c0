"""Experts on a CPU: rows of each padded to a multiple of 32, one autograd.Function from the tokens to their sums.

    y_TH = padded(module, x_TH, experts_TK, weights_TK)

Two things make it faster than the same products one by one.  oneDNN, which multiplies bf16 matrices, compiles a program
for every shape that it meets, and the number of tokens of an expert is another one at every step: rounded up to 32 few
shapes remain, and they are met again.  And where gather, experts and sum are one function, its gradient needs no
scattered additions, and writes each weight's gradient once.  The activation is computed again, not kept.

Under autocast large experts are cast one by one, when they are multiplied: no copy of all of them in bf16 is made, or
kept for the backward pass, and their gradients are written in fp32.  Small ones are cast together, in fewer calls.

Padding rows repeat token 0 with weight 0: they are in no sum, and their gradients are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surgery.midtraining.experts_layout import activated, computation_dtype, expert_weights, here

ROWS = 32
AT_ONCE = 1 << 20  # numbers in the down projections of all experts: up to here they are cast together, not one by one


def padded(module: Any, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Letters: see experts_layout.py; S rows with their padding."""
    experts, weights = here(module, experts, weights)
    w = expert_weights(module, cast=module.down_proj.numel() <= AT_ONCE)
    blocks = blocked(experts, module.num_experts)
    tensors = (x.to(computation_dtype(w.up)), weights, w.up, w.down, w.up_bias, w.down_bias)
    y: Tensor = _Padded.apply(module, blocks, x.dtype, *tensors)  # type: ignore[no-untyped-call]
    return y


def no_padded(module: Any) -> str:
    return "a norm follows every expert, whose weight would get no gradient" if module.has_post_expert_norm else ""


@dataclass(frozen=True)
class Blocks:
    """token [S]: the token of every row; slot [T * K]: the row of every pair; spans: (expert, first row, rows)."""

    token: Tensor
    slot: Tensor
    spans: tuple[tuple[int, int, int], ...]
    shape: tuple[int, int]


def blocked(experts: Tensor, count: int) -> Blocks:
    """Rows of each expert, one after another, every block a multiple of `ROWS`.  experts: [T, K]."""
    flat, top_k = experts.reshape(-1), experts.shape[-1]
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=count)
    sizes = (counts + ROWS - 1) // ROWS * ROWS
    starts = sizes.cumsum(0) - sizes
    shift = (starts - (counts.cumsum(0) - counts)).repeat_interleave(counts)
    slot = torch.empty_like(flat)
    slot[order] = torch.arange(len(flat), device=flat.device) + shift
    token = flat.new_zeros(int(sizes.sum()))
    token[slot] = torch.arange(len(flat), device=flat.device) // top_k
    assert len(counts) == count and int(counts.sum()) == len(flat), "an expert's number is out of range"
    spans = tuple((e, a, n) for e, (a, n) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)) if n)
    return Blocks(token, slot, spans, (len(experts), top_k))


class _Padded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        module: Any,
        blocks: Blocks,
        dtype: torch.dtype,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        rows = x.index_select(0, blocks.token)
        inner = _products(rows, up, blocks, up_bias)
        outer = _products(activated(module, inner), down, blocks, down_bias)
        scale = x.new_zeros(len(rows), 1)
        scale[blocks.slot, 0] = weights.reshape(-1).to(x.dtype)
        ctx.save_for_backward(rows, inner, outer, scale, weights, up, down, up_bias, down_bias)
        ctx.module, ctx.blocks = module, blocks
        chosen: Tensor = (outer * scale).index_select(0, blocks.slot).unflatten(0, blocks.shape)
        return chosen.sum(1, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, inner, outer, scale, weights, up, down, up_bias, down_bias = ctx.saved_tensors
        module, blocks, trains = ctx.module, ctx.blocks, ctx.needs_input_grad[5:]
        with torch.enable_grad():
            inner = inner.detach().requires_grad_()
            act = activated(module, inner)
        d_outer = grad.to(rows.dtype).index_select(0, blocks.token)
        d_scale = (outer * d_outer).sum(1, dtype=torch.float32)
        d_outer.mul_(scale)
        d_act = _products(d_outer, down.transpose(1, 2), blocks)
        (d_inner,) = torch.autograd.grad(act, inner, d_act)
        d_rows = _products(d_inner, up.transpose(1, 2), blocks)
        return (
            *(None, None, None),
            d_rows.index_select(0, blocks.slot).unflatten(0, blocks.shape).sum(1),
            d_scale.index_select(0, blocks.slot).view(blocks.shape).to(weights.dtype),
            _outer_products(rows, d_inner, up, blocks) if trains[0] else None,
            _outer_products(act.detach(), d_outer, down, blocks) if trains[1] else None,
            _sums(d_inner, up_bias, blocks) if trains[2] else None,
            _sums(d_outer, down_bias, blocks) if trains[3] else None,
        )


def _products(rows: Tensor, weight: Tensor, blocks: Blocks, bias: Tensor | None = None) -> Tensor:
    """[S, in] and [E, in, out] -> [S, out]: every block by its expert, whose weight is cast to the rows' dtype."""
    out = rows.new_empty(len(rows), weight.shape[2])
    for e, a, n in blocks.spans:
        torch.mm(rows[a : a + n], weight[e].to(rows.dtype), out=out[a : a + n])
        if bias is not None:
            out[a : a + n] += bias[e]
    return out


def _outer_products(rows: Tensor, grads: Tensor, weight: Tensor, blocks: Blocks) -> Tensor:
    """The gradient of a weight [E, in, out], in its dtype and with its strides: rows.T @ grads of every block."""
    out = torch.empty_like(weight)
    for e in set(range(len(weight))) - {e for e, _, _ in blocks.spans}:
        out[e].zero_()
    for e, a, n in blocks.spans:
        if rows.dtype == weight.dtype:
            torch.mm(rows[a : a + n].t(), grads[a : a + n], out=out[e])
        else:
            out[e].t().copy_(grads[a : a + n].t() @ rows[a : a + n])
    return out


def _sums(rows: Tensor, bias: Tensor, blocks: Blocks) -> Tensor:
    """The gradient of a bias [E, out]."""
    out = torch.zeros_like(bias)
    for e, a, n in blocks.spans:
        out[e] = rows[a : a + n].sum(0)
    return out
