"""Models of transformers with sparse attention: each head sees only some of the earlier tokens.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(...)                              # with a cache, as ever

config.json says the kind and its numbers: `sparse_attention: {kind: spattention, reference_len: 1024}`; what they mean
is told in sparse_patterns.py beside this file.  Without `trust_remote_code` transformers computes full attention.
It needs torch and transformers (>= 5).

Places count from the beginning of each document, behind padding, and go on with a cache, so a token sees the same
whether it is computed alone, in a row with other documents, or with all that comes before it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .sparse_patterns import KINDS, Pattern, mask, pattern_of

NAME = "sparse"  # of the attention, for transformers
BLOCK = 128  # flex_attention leaves out blocks of so many queries and keys


def pattern_in(config: Any) -> Pattern:
    """What config.json says.  Raises ValueError for what is not known."""
    said = dict(config.sparse_attention)
    kind, length = said.pop("kind"), said.pop("reference_len")
    found = pattern_of(kind, length, config.num_attention_heads, said)
    if KINDS[kind].absolute and _has_window(config):
        raise ValueError(f"{kind} attention cannot be combined with layers that have a sliding window")
    return found


def _has_window(config: Any) -> bool:
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    used = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(used) and "sliding_attention" in types


def places(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Of every query, from the earlier tokens [batch, 1, queries, keys] that it could see: its place in its document,
    and the index of its own key; int64 [batch, 1, queries, 1]."""
    own = seen.shape[-1] - 1 - seen.flip(-1).byte().argmax(-1, keepdim=True)
    return (seen.sum(-1, keepdim=True) - 1).clamp(min=0), own


def sparse_mask(
    batch_size: int, q_length: int, kv_length: int, *, config: Any, attention_mask: Tensor | None = None,
    device: Any = "cpu", **more: Any,
) -> Any:  # fmt: skip
    """What heads see, bool [batch, heads, queries, keys]; for whole rows on a GPU, flex_attention's blocks of it."""
    more["allow_is_causal_skip"] = False
    seen = sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, device=device, **more)
    pattern, device = pattern_in(config), torch.device(device)
    place, own = places(seen)
    if device.type == "cuda" and q_length == kv_length >= BLOCK and attention_mask is None:
        return _blocks(pattern, place[:, 0, :, 0], own[:, 0, :, 0] - place[:, 0, :, 0], device)
    if not KINDS[pattern.kind].absolute and q_length == kv_length:
        return seen & mask(pattern, kv_length, str(device))
    h = torch.arange(pattern.heads, device=device)[:, None, None]
    keys = torch.arange(kv_length, device=device)
    return seen & pattern.sees(h, place, place - own + keys)


def _blocks(pattern: Pattern, place: Tensor, start: Tensor, device: torch.device) -> BlockMask:
    """Of rows of documents: `place` and `start` [batch, length] are a token's place in its document, and where that
    begins in the row."""

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= start[b, q]) & pattern.sees(h, place[b, q], k - start[b, q])

    rows, length = place.shape
    return create_block_mask(
        sees, rows, pattern.heads, length, length, device=device, BLOCK_SIZE=BLOCK, _compile=device.type == "cuda"
    )


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """flex_attention, which torch compiles once for every length."""
    return torch.compile(flex_attention, dynamic=False)


def sparse_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention under `sparse_mask`; a query that sees nothing gets zeros, and gives no gradient.

    query [batch, heads, queries, width], key and value [batch, key/value heads, keys, width]
    """
    if isinstance(attention_mask, BlockMask):
        run = _compiled() if query.is_cuda else flex_attention
        grouped = query.shape[1] != key.shape[1]
        out = run(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is None:
        raise ValueError("sparse attention was called without a mask")
    some = attention_mask.any(-1, keepdim=True)
    wide = (t.float() if query.device.type == "cpu" else t for t in (query, key, value))
    with torch.autocast(query.device.type, enabled=query.device.type != "cpu" and torch.is_autocast_enabled()):
        out, _ = sdpa_attention_forward(module, *wide, attention_mask | ~some, dropout=dropout, scaling=scaling)
    shape = some.expand(*query.shape[:3], 1).transpose(1, 2)
    return torch.where(shape, out, 0).to(query.dtype), None


def register() -> str:
    """Tell transformers; returns the name by which it knows the attention."""
    AttentionInterface.register(NAME, sparse_attention)
    AttentionMaskInterface.register(NAME, sparse_mask)
    return NAME


class Sparse:
    """What makes a model of transformers one with sparse attention."""

    def __init__(self, config: Any, *args: Any, **more: Any) -> None:
        pattern_in(config)
        config._attn_implementation = register()
        super().__init__(config, *args, **more)  # type: ignore[call-arg]

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the weights are named as the built-in model's, and transformers renames them as it does there."""
        return False


def __getattr__(name: str) -> type:
    """SparseLlamaForCausalLM is transformers' LlamaForCausalLM with the attention of its config; so are all others."""
    if not name.startswith("Sparse"):
        raise AttributeError(name)
    base = getattr(transformers, name.removeprefix("Sparse"))
    return type(base.__name__, (Sparse, base), {"__module__": __name__})
