"""Say what a checkpoint is, in a second, without loading it.

    describe(open_checkpoint("Llama-2-7b"))["parameters"]["total"]

`describe` is plain data, for `--json`; `scan` reads every weight once and counts NaN, Inf and zero rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from surgery.formats.base import Checkpoint
from surgery.model.spec import Spec
from surgery.tensors.lazy import ITEMSIZE, boxes

Json = dict[str, Any]
_NORMS = {"rms": "RMSNorm", "layer": "LayerNorm", "none": "LayerNorm without weights"}


def describe(checkpoint: Checkpoint, *, tensors: bool = False, pickles: bool = False) -> Json:
    """Everything that names, shapes and configs say.  Sizes in bytes."""
    spec, parts = checkpoint.spec, checkpoint.parts
    kinds = Counter[str]()
    for part in parts.values():
        kinds[part.dtype] += math.prod(part.shape)
    found = checkpoint.tokenizer
    out: Json = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": spec.family,
        "parameters": {"total": spec.parameters(), "active": spec.parameters(active=True)},
        "dtypes": dict(kinds.most_common()),
        "sizes": sizes(spec),
        "choices": choices(spec),
        "parallel": {k: v for k, v in asdict(checkpoint.topology).items() if isinstance(v, int)},
        "files": {str(p.relative_to(checkpoint.path)): p.stat().st_size for p in checkpoint.files},
        "bytes": sum(p.stat().st_size for p in checkpoint.files),
        "tokenizer": found.summary if found else None,
        "padding_rows": padding_rows(checkpoint),
        "tied": spec.tied,
        "ignored": dict(checkpoint.ignored),
        "notes": list(checkpoint.notes),
        "details": dict(checkpoint.details),
    }
    if tensors:
        out["parts"] = {n: {"shape": list(p.shape), "dtype": p.dtype, "bytes": p.nbytes} for n, p in parts.items()}
    if pickles:
        out["globals"] = list(checkpoint.globals)
    return out


def sizes(spec: Spec) -> Json:
    """The measures of the model, in words."""
    named = {
        "layers": spec.layers, "model width": spec.width, "attention heads": spec.heads,
        "key/value heads": spec.kv_heads,
        "head width": spec.head_dim, "vocabulary": spec.vocab, "ffn width": spec.ffn, "experts": spec.experts,
        "experts per token": spec.top_k, "expert ffn width": spec.expert_ffn, "shared expert width": spec.shared_ffn,
        "layers with experts": len(spec.moe_layers), "learned positions": spec.learned_positions,
        "context": spec.context,
    }  # fmt: skip
    return {k: v for k, v in named.items() if v}


def choices(spec: Spec) -> Json:
    """What the function depends on besides the weights, in words; what is absent is not listed."""
    rope = spec.rope
    scaling = "" if rope is None or not rope.scaling else f", {_scaling(dict(rope.scaling))}"
    part = "" if rope is None or rope.fraction == 1 else f", {rope.fraction:g} of a head"
    windows = sorted({w for w in spec.windows if w})
    layers = sum(1 for w in spec.windows if w)
    named = {
        "norm": f"{_NORMS.get(spec.norm, spec.norm)}"
        f", {'before' if spec.norm_at == 'pre' else 'after'} attention and mlp, eps {spec.norm_eps:g}",
        "query/key norm": {"head": "per head", "full": "over all heads", "": ""}[spec.qk_norm],
        "rope": "" if rope is None else f"base {rope.base:g}{part}{scaling}",
        "sliding window": f"{', '.join(map(str, windows))} in {layers} of {spec.layers} layers" if windows else "",
        "activation": f"{spec.act}{', gated' if spec.glu else ''}",
        "biases": ", ".join(
            n for n, b in (("qkv", spec.qkv_bias), ("attention output", spec.o_bias), ("mlp", spec.mlp_bias)) if b
        ),
        "residual": "attention and mlp in parallel" if spec.parallel else "",
        "clip qkv": spec.clip_qkv,
        "experts' weights": ("renormalised over the chosen" if spec.top_k_renormalised else "as the softmax gives them")
        if spec.experts
        else "",
        "embeddings": "tied" if spec.tied else "",
    }
    return {k: v for k, v in named.items() if v}


def _scaling(scaling: Json) -> str:
    kind = scaling.pop("type", "")
    numbers = (f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in scaling.items())
    return f"{kind} scaling ({', '.join(numbers)})"


def padding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the vocabulary that no token uses; None if the tokenizer does not say."""
    found = checkpoint.tokenizer
    tokens = checkpoint.spec.true_vocab or (found.vocab_size if found else None)
    return None if tokens is None else max(0, checkpoint.spec.vocab - tokens)


def scan(checkpoint: Checkpoint, max_memory: int, progress: Callable[[int], None] | None = None) -> Json:
    """Read every weight once: how many are NaN or infinite, part by part where there are any, and the largest."""
    import torch

    bad: Json = {}
    largest = 0.0
    block = max(1 << 20, max_memory // 16)
    for name, part in checkpoint.parts.items():
        nans = infs = 0
        for box in boxes(part.shape, ITEMSIZE[part.dtype], block):
            data = part.read(box)
            values = data.float() if data.is_floating_point() else data
            nans += int(torch.isnan(values).sum())
            infs += int(torch.isinf(values).sum())
            finite = values[torch.isfinite(values)]
            largest = max(largest, float(finite.abs().max())) if finite.numel() else largest
            if progress:
                progress(data.nbytes)
        if nans or infs:
            bad[name] = {"nan": nans, "inf": infs}
    return {"nan_or_inf": bad, "largest": largest}
