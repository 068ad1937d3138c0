"""Experts by Triton kernels, run on a CPU by Triton's interpreter: `make test-kernels` installs what that needs.

The products of grouped_gemm and the index kernels of megablocks are CUDA extensions.  The former are stood in for by
torch here, the latter are not used.  Where Triton or the packages are not installed, these tests are skipped.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from importlib.util import find_spec

import pytest
import torch

from surgery.midtraining import experts
from tests.test_midtraining_experts import FP32, E, H, K, distance, module_of, problem, results, transformers_loop

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or not find_spec("triton"),
    reason="make test-kernels: needs Triton and TRITON_INTERPRET=1",
)


@pytest.fixture
def extensions(monkeypatch):
    """What megablocks imports and cannot be built without a GPU; grouped_gemm/ops.py says what gmm does."""

    def gmm(a, b, batch_sizes, trans_b=False):
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert (batch_sizes.dtype, batch_sizes.device.type) == (torch.int64, "cpu")
        matrices = b.transpose(1, 2) if trans_b else b
        return torch.cat([rows @ w for rows, w in zip(a.split(batch_sizes.tolist()), matrices, strict=True)])

    for name in ("megablocks_ops", "grouped_gemm"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["grouped_gemm"].ops = types.SimpleNamespace(gmm=gmm)
    sys.modules["grouped_gemm"].backend = None
    from megablocks.backend import kernels

    for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])  # nothing can be timed, so there is one way only


SHAPES = [("mixtral", {}), ("mixtral", {"hidden_act": "gelu"}), ("nemotron_h", {})]


@pytest.mark.skipif(not find_spec("megablocks"), reason="megablocks is not installed")
@pytest.mark.parametrize(("kind", "keys"), SHAPES)
def test_megablocks_permutes_as_the_loop_does(kind, keys, extensions):
    module = module_of(kind, **keys)
    assert experts.EXPERTS["megablocks"].refuses(module) == "grouped_gemm multiplies bfloat16 alone, not float32"
    got = results(experts.EXPERTS["megablocks"].run, module, *problem())  # the kernels that are Triton's take fp32 too
    want = results(transformers_loop, module, *problem())
    assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < FP32


@pytest.mark.skipif(not find_spec("megablocks"), reason="megablocks is not installed")
def test_megablocks_in_bf16_and_with_experts_that_have_no_token(extensions):
    chosen = torch.tensor([4, 1, 2]).expand(19, K)
    module = module_of("mixtral")
    want = results(transformers_loop, module, *problem(tokens=19, chosen=chosen))
    low = module.bfloat16()
    assert experts.EXPERTS["megablocks"].refuses(low) == ""
    inputs = [
        t.detach().bfloat16().requires_grad_() if t.is_floating_point() else t for t in problem(19, chosen=chosen)
    ]
    loop = results(experts.EXPERTS["loop"].run, low, *inputs)
    got = results(experts.EXPERTS["megablocks"].run, low, *inputs)
    for mine, theirs, exact in zip(got, loop, want, strict=True):
        assert distance(mine, exact) < 1.5 * distance(theirs, exact)


@pytest.mark.skipif(not find_spec("scattermoe"), reason="scattermoe is in no package index; see docs/experts.md")
@pytest.mark.parametrize(("kind", "keys"), [*SHAPES, ("gpt_oss", {})])
def test_scattermoe_equals_the_loop(kind, keys):
    """Ours, since scattermoe's import puts its own code in the place of transformers' gpt_oss."""
    module = module_of(kind, **keys)
    assert experts.EXPERTS["scattermoe"].refuses(module) == ""
    got = results(experts.EXPERTS["scattermoe"].run, module, *problem())
    want = results(experts.EXPERTS["loop"].run, module, *problem())
    assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < FP32


@pytest.mark.skipif(not find_spec("scattermoe"), reason="scattermoe is in no package index; see docs/experts.md")
def test_scattermoe_with_experts_of_other_ranks():
    module = module_of("mixtral", num_local_experts=4)
    module._is_expert_parallel = True
    inputs = problem()
    want = results(experts.EXPERTS["loop"].run, module, *inputs)
    got = results(experts.EXPERTS["scattermoe"].run, module, *inputs)
    assert (inputs[1] >= 4).any()
    assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < FP32
    assert "bfloat16" in experts.EXPERTS["scattermoe"].refuses(module.bfloat16())


def test_sizes_differ():
    assert len({E, K, H, 40, 37}) == 5
