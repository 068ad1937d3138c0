"""OLMo-core's tensors.

    table(Variant(interleaved=True))       # how they lie, which names and shapes do not tell

Names and layouts: OLMo-core `nn/transformer/model.py`, `nn/attention/__init__.py`, `nn/moe/mlp.py`.  Norms keep their
names when a reordered block moves them behind attention and mlp.  Three things cannot be seen in names or shapes and
come from the config: `complex` rotary embeddings turn neighbours (`half two`), in the norms of q and k too; experts of
the kind `default` lie transposed; fused attention packs q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import ConfigError
from surgery.formats.olmo_core.config import Variant
from surgery.formats.table import Row, Table, row

_B = "blocks.{l}."
_A = _B + "attention."
_E = _B + "feed_forward_moe.experts.mlp."

ROWS: tuple[Row, ...] = (
    row("embeddings.weight", "embed"),
    row(_B + "attention_norm.weight", "attn_norm"),
    row(_B + "attention_norm.bias", "attn_norm.bias"),
    row(_B + "attention_norm.weight", "attn_post_norm"),
    row(_A + "w_out.weight", "attn.o"),
    row(_A + "w_out.bias", "attn.o.bias"),
    row(_B + "feed_forward_norm.weight", "mlp_norm"),
    row(_B + "feed_forward_norm.bias", "mlp_norm.bias"),
    row(_B + "feed_forward_norm.weight", "mlp_post_norm"),
    row(_B + "feed_forward.w1.weight", "mlp.gate"),
    row(_B + "feed_forward.w1.bias", "mlp.gate.bias"),
    row(_B + "feed_forward.w2.weight", "mlp.down"),
    row(_B + "feed_forward.w2.bias", "mlp.down.bias"),
    row(_B + "feed_forward.w3.weight", "mlp.up"),
    row(_B + "feed_forward.w3.bias", "mlp.up.bias"),
    row(_B + "feed_forward_moe.router.weight", "router", layout="(e h)"),
    row(_B + "feed_forward_moe.router.score_bias", "router.bias"),
    row(_E + "w2", "experts.{e}.down", layout="(e m) h"),
    row("lm_head.norm.weight", "final_norm"),
    row("lm_head.norm.bias", "final_norm.bias"),
    row("lm_head.w_out.weight", "lm_head"),
    row("lm_head.w_out.weight", "embed", copy=True, when=lambda spec, _: spec.tied),
)
EXPERTS: Mapping[str, tuple[Row, ...]] = {
    "dropless": (
        row(_E + "w1", "experts.{e}.gate", layout="(e m) h"),
        row(_E + "w3", "experts.{e}.up", layout="(e m) h"),
    ),
    "default": (
        row(_E + "w1", "experts.{e}.gate", layout="(e h) m"),
        row(_E + "w3", "experts.{e}.up", layout="(e h) m"),
    ),
}
HALVES: tuple[Row, ...] = (
    row(_A + "w_q.weight", "attn.q"),
    row(_A + "w_q.bias", "attn.q.bias"),
    row(_A + "w_k.weight", "attn.k"),
    row(_A + "w_k.bias", "attn.k.bias"),
    row(_A + "w_v.weight", "attn.v"),
    row(_A + "w_v.bias", "attn.v.bias"),
)
NEIGHBOURS: tuple[Row, ...] = (
    row(_A + "w_q.weight", "attn.q", layout="(g n half two) h"),
    row(_A + "w_q.bias", "attn.q.bias", layout="(g n half two)"),
    row(_A + "w_k.weight", "attn.k", layout="(g half two) h"),
    row(_A + "w_k.bias", "attn.k.bias", layout="(g half two)"),
    row(_A + "w_v.weight", "attn.v"),
    row(_A + "w_v.bias", "attn.v.bias"),
)
FUSED: tuple[Row, ...] = (
    row(_A + "w_qkv.weight", "attn.q", "attn.k", "attn.v", layout="* h"),
    row(_A + "w_qkv.bias", "attn.q.bias", "attn.k.bias", "attn.v.bias", layout="*"),
)
NORMS: Mapping[bool, tuple[Row, ...]] = {
    False: (
        row(_A + "q_norm.weight", "attn.q_norm"),
        row(_A + "k_norm.weight", "attn.k_norm"),
        row(_A + "q_norm.weight", "attn.q_head_norm"),
        row(_A + "k_norm.weight", "attn.k_head_norm"),
    ),
    True: (
        row(_A + "q_norm.weight", "attn.q_norm", layout="(g n half two)"),
        row(_A + "k_norm.weight", "attn.k_norm", layout="(g half two)"),
        row(_A + "q_norm.weight", "attn.q_head_norm", layout="(half two)"),
        row(_A + "k_norm.weight", "attn.k_head_norm", layout="(half two)"),
    ),
}


def table(variant: Variant) -> Table:
    if variant.interleaved and variant.fused:
        raise ConfigError("complex rotary embeddings with a fused attention are not supported")
    attention = FUSED if variant.fused else NEIGHBOURS if variant.interleaved else HALVES
    return Table("olmo-core", (*ROWS, *attention, *NORMS[variant.interleaved], *EXPERTS[variant.experts]))
