"""Which of transformers' attention functions a model in training uses.

name = attention_for("sdpa", "cpu", Precision("autocast", ""))       # "surgery_sdpa_fp32"

On a CPU torch's fused attention takes up to twice as long in bf16 as in fp32 (backward, short rows) and never less, so
where products are bf16 it is done in fp32 there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.midtraining.precision import Precision

FP32 = "surgery_sdpa_fp32"


def attention_for(wanted: str, device: str, precision: Precision) -> str:
    """The name that transformers knows it by."""
    if wanted != "sdpa" or device != "cpu" or precision.name == "fp32":
        return wanted
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(FP32, sdpa_in_fp32)
    AttentionMaskInterface.register(FP32, sdpa_mask)
    return FP32


def sdpa_in_fp32(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa_attention_forward, in fp32 whatever autocast says."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wide = (t.float() for t in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(module, *wide, attention_mask, **more)
    return out.to(query.dtype), None
