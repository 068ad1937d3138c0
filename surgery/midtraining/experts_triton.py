"""Experts by two packages whose kernels are Triton's: megablocks and scattermoe.

    y_TH = scattermoe(module, x_TH, experts_TK, weights_TK)         # see experts_torch.py

megablocks (0.10, BSD) permutes tokens by Triton kernels and multiplies by those of the package grouped_gemm, which are
CUTLASS's and bf16 only: megablocks/ops/gather.py, scatter.py, grouped_gemm_util.py.  Both packages are built against an
installed torch.  scattermoe (0.3, Apache) is in no package index; parallel_linear in scattermoe/parallel_experts.py
does permutation and product in one kernel.  docs/experts.md says how to install them.

Under TRITON_INTERPRET=1 Triton's kernels run on a CPU, which is how the tests run them without a GPU.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from surgery.midtraining.experts_layout import activated, computation_dtype, expert_weights, here, ordered


def megablocks(module: Any, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Dropless: a row for every pair, none padded.  The numbers of tokens are read back, as grouped_gemm wants them."""
    gmm, gather, scatter = _megablocks()
    experts, weights = here(module, experts, weights)
    w, pairs = expert_weights(module), ordered(experts, module.num_experts)
    sizes = torch.diff(pairs.ends, prepend=pairs.ends.new_zeros(1)).long().cpu()
    assert int(sizes.sum()) == experts.numel(), "a choice of an expert is lost"
    order, numbers = pairs.order.int(), pairs.experts.int()
    rows = gather(x.to(w.up.dtype).contiguous(), order, numbers, pairs.ends, pairs.top_k)
    rows = activated(module, _grouped(gmm, rows, w.up, sizes)).contiguous()
    rows = _grouped(gmm, rows, w.down, sizes)
    out: Tensor = scatter(rows, order, numbers, weights.reshape(-1), pairs.ends, pairs.top_k)
    return out.to(x.dtype)


def scattermoe(module: Any, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Dropless: tokens are gathered inside the first product and summed after the second one."""
    from scattermoe import parallel_linear

    experts, weights = here(module, experts, weights)
    w, pairs = expert_weights(module), ordered(experts, module.num_experts)
    where = (pairs.experts, pairs.order, pairs.ends.long())
    rows: Tensor = parallel_linear(
        x.to(w.up.dtype), w.up, pairs.top_k, *where, expert_biases=w.up_bias, grouped_out=True
    )
    gates = weights.to(w.down.dtype)
    rows = parallel_linear(activated(module, rows), w.down, 1, *where, expert_biases=w.down_bias, gates=gates,
                           grouped_in=True)  # fmt: skip
    return rows.to(x.dtype)


def _megablocks() -> tuple[Any, Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns on import of what is missing; no_megablocks says it better
        from megablocks import grouped_gemm_util
        from megablocks.ops.gather import gather
        from megablocks.ops.scatter import scatter
    return grouped_gemm_util.ops.gmm, gather, scatter


def _grouped(gmm: Any, rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """weight [E, in, out], perhaps a view of [E, out, in], which the kernel wants to be told."""
    if weight.is_contiguous():
        out: Tensor = gmm(rows, weight, sizes)
    else:
        out = gmm(rows, weight.transpose(1, 2).contiguous(), sizes, trans_b=True)
    return out


# ------------------------------------------------------------------------------------------- why not, "" if they can


def no_megablocks(module: Any) -> str:
    if module.has_bias or module.has_post_expert_norm:
        return "its products have no biases and no norm behind them"
    dtype = computation_dtype(module.down_proj)
    if dtype != torch.bfloat16:
        return f"grouped_gemm multiplies bfloat16 alone, not {dtype}".replace("torch.", "")
    return _no_kernels(module, ("megablocks", "megablocks_ops", "grouped_gemm"), "the extra [gpu]: see docs/experts.md")


def no_scattermoe(module: Any) -> str:
    if module.has_post_expert_norm:
        return "it has no norm behind its experts"
    if module.down_proj.device.type != "cuda" and computation_dtype(module.down_proj) == torch.bfloat16:
        return "without a CUDA device Triton multiplies the bits of bfloat16 as if they were integers"
    return _no_kernels(module, ("scattermoe",), "github.com/shawntan/scattermoe: see docs/experts.md")


def _no_kernels(module: Any, packages: tuple[str, ...], source: str) -> str:
    missing = [p for p in ("triton", *packages) if find_spec(p) is None]
    if missing:
        return f"{' and '.join(missing)} not installed ({source})"
    if module.down_proj.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels need a CUDA device"
    return ""
