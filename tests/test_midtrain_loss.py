"""The chunked loss against the whole logits in float64: values, both gradients, masks, divisors, memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.midtraining.loss import DIVISORS, IGNORE, chunked_loss

TOKENS, WIDTH, VOCAB = 23, 12, 41


def problem(dtype: torch.dtype = torch.float32, masked: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(1, TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (1, TOKENS), generator=generator)
    labels[torch.rand(1, TOKENS, generator=generator) < masked] = IGNORE
    return hidden, weight, labels


def whole(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, divisor: float, z_coef: float) -> list:
    """ce, z and the gradients, by all logits at once in float64."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = (h @ w.t()).reshape(-1, VOCAB)
    wanted = labels.reshape(-1)
    ce = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum") / divisor
    z = z_coef * logits.logsumexp(-1)[wanted != IGNORE].square().sum() / divisor
    return [ce.detach(), z.detach(), *torch.autograd.grad(3 * (ce + z), (h, w))]


@pytest.mark.parametrize("chunk", [1, 4, 7, 100, None])
@pytest.mark.parametrize("z_coef", [0.0, 0.01])
def test_values_and_gradients_are_those_of_the_whole(chunk, z_coef):
    hidden, weight, labels = problem()
    loss, ce, z = chunked_loss(hidden, weight, labels, 17, z_coef=z_coef, chunk=chunk)
    (3 * loss).backward()
    assert not ce.requires_grad and not z.requires_grad
    found = [ce, z, hidden.grad, weight.grad]
    for got, wanted in zip(found, whole(hidden, weight, labels, 17, z_coef), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-7)


def test_gradients_in_float64_are_exact():
    hidden, weight, labels = problem(torch.float64)
    torch.autograd.gradcheck(lambda h, w: chunked_loss(h, w, labels, 9, z_coef=0.1, chunk=5)[0], (hidden, weight))


def test_pieces_of_a_step_add_up_but_means_of_means_do_not():
    hidden, weight, labels = problem()
    count = int((labels != IGNORE).sum())
    all_of_it = chunked_loss(hidden, weight, labels, count)[0]
    parts = [slice(0, 9), slice(9, None)]
    pieces = sum(chunked_loss(hidden[:, p], weight, labels[:, p], count)[0] for p in parts)
    means = [chunked_loss(hidden[:, p], weight, labels[:, p], int((labels[:, p] != IGNORE).sum()))[0] for p in parts]
    torch.testing.assert_close(pieces, all_of_it)
    assert abs(float((sum(means) / 2 - all_of_it).detach())) > 1e-3


def test_nothing_to_learn_is_a_loss_of_zero_with_a_gradient():
    hidden, weight, labels = problem(masked=1.1)
    loss, _, _ = chunked_loss(hidden, weight, labels, 1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad is not None and not hidden.grad.any() and not weight.grad.any()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = problem()
    chunked_loss(hidden, weight.requires_grad_(False), labels, 3)[0].backward()
    assert weight.grad is None and hidden.grad is not None


def test_under_autocast_products_are_bf16_and_sums_fp32():
    hidden, weight, labels = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, ce, _ = chunked_loss(hidden, weight, labels, 17)
    loss.backward()
    wanted = whole(hidden, weight, labels, 17, 0.0)
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(ce.double(), wanted[0], rtol=5e-3, atol=0)
    torch.testing.assert_close(weight.grad.double() * 3, wanted[3], rtol=0.05, atol=0.02)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_the_logits_are_never_held():
    hidden, weight, labels = torch.randn(512, 8), torch.randn(997, 8), torch.randint(0, 997, (512,))
    hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as seen:
        chunked_loss(hidden, weight, labels, 512, chunk=16)[0].backward()
    assert seen.numbers == 16 * 997


def test_divisors():
    assert {name: divide(70, 128) for name, divide in DIVISORS.items()} == {"labels": 70, "all_tokens": 128}
