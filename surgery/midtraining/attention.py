"""Which tokens see which in a model in training, and by which of transformers' functions that is computed.

    source, notes = attending(run, source, 4096)                     # its Spec says sparse, if the run does
    name = attention_for("sdpa", "cpu", Precision("autocast", ""))   # "surgery_sdpa_fp32"

On a CPU torch's fused attention takes up to twice as long in bf16 as in fp32 (backward, short rows) and never less, so
where products are bf16 it is done in fp32 there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surgery.errors import ConfigError
from surgery.formats.base import Checkpoint
from surgery.formats.hf.hub.sparse_patterns import KINDS, pattern_of
from surgery.formats.hf.sparse import sparse_of
from surgery.midtraining.precision import Precision
from surgery.midtraining.settings import Run
from surgery.model.spec import Spec

FP32 = "surgery_sdpa_fp32"
QUERIES = 512  # of a row that are looked at, evenly chosen where it has more


def attending(run: Run, source: Checkpoint, length: int) -> tuple[Checkpoint, list[str]]:
    """The source with the attention that the run wants, and what has to be said of it; rows have `length` tokens.

    Raises ConfigError for a number that its kind does not have.
    """
    wanted, spec = run.attention, source.spec
    numbers = wanted.model_dump(include={"window", "globals", "stride", "buckets"}, exclude_none=True)
    if wanted.kind == "source" and (numbers or wanted.reference_len):
        raise ConfigError("attention has numbers, but no kind", hint="attention: {kind: spattention, ...}")
    if wanted.kind != "source":
        sparse = sparse_of(wanted.kind, wanted.reference_len or length, spec.heads, numbers)
        spec = spec.replace(sparse=sparse)
    if spec.sparse and run.model.attention != "sdpa":
        hint = "leave it out: sparse attention is computed by flex_attention on a GPU, else by sdpa"
        raise ConfigError(f"model.attention: {run.model.attention} is for full attention, this is sparse", hint=hint)
    if spec.sparse and KINDS[spec.sparse.kind].absolute and any(spec.windows):
        raise ConfigError(f"attention: {spec.sparse.kind} cannot be combined with this model's sliding windows")
    return replace(source, spec=spec), said_of(spec, length)


def said_of(spec: Spec, length: int) -> list[str]:
    """What sparse attention means for a row of one document: how much of full attention it is, and who sees nothing."""
    if spec.sparse is None:
        return []
    kind = KINDS[spec.sparse.kind]
    pattern = pattern_of(spec.sparse.kind, spec.sparse.reference_len, spec.heads, spec.sparse.numbers)
    queries = torch.arange(length) if length <= QUERIES else torch.linspace(0, length - 1, QUERIES).long()
    seen = pattern.sees(torch.arange(spec.heads)[:, None, None], queries[:, None], torch.arange(length))
    seen = seen.expand(spec.heads, -1, -1)
    rows = spec.heads * length
    blind = round(float((~seen.any(-1)).float().mean()) * rows)
    share = float(seen.sum()) / (spec.heads * float((queries + 1).sum()))
    about = "about " if length > QUERIES else ""
    inferred = "; no source of it was found, its definition is inferred" if kind.inferred else ""
    return [f"attention: {spec.sparse}: {about}{share:.1%} of what full attention sees in a row of {length:,} tokens; "
            f"{about}{blind:,} of {rows:,} queries of all heads see nothing and give zeros{inferred}"]  # fmt: skip


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
