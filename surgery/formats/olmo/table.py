"""OLMo's tensors.

    table("sequential")         # blocks of type sequential and moe fuse q, k and v; those of type llama do not

Names and layouts: allenai/OLMo `olmo/model.py`; experts: megablocks as used on the branch of OLMoE.  `ff_proj` holds
up above gate (silu is applied to its second half), `att_proj` q, k and v one above the other; rotary halves lie
apart, as in Hugging Face.  The norms keep their names when `norm_after` moves them behind attention and mlp.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.formats.table import Row, Table, row

_B = "transformer.blocks.{l}."

ROWS: tuple[Row, ...] = (
    row("transformer.wte.weight", "embed"),
    row("transformer.wpe.weight", "positions"),
    row(_B + "attn_norm.weight", "attn_norm"),
    row(_B + "attn_norm.bias", "attn_norm.bias"),
    row(_B + "attn_norm.weight", "attn_post_norm"),
    row(_B + "q_norm.weight", "attn.q_norm"),
    row(_B + "k_norm.weight", "attn.k_norm"),
    row(_B + "attn_out.weight", "attn.o"),
    row(_B + "ff_norm.weight", "mlp_norm"),
    row(_B + "ff_norm.bias", "mlp_norm.bias"),
    row(_B + "ff_norm.weight", "mlp_post_norm"),
    row(_B + "ff_proj.weight", "mlp.up", "mlp.gate", layout="(* f) h"),
    row(_B + "ff_proj.weight", "mlp.up", when=lambda spec, _: not spec.glu),
    row(_B + "ff_out.weight", "mlp.down"),
    row(_B + "ffn.router.layer.weight", "router"),
    row(_B + "ffn.experts.mlp.w1", "experts.{e}.gate", layout="(e m) h"),
    row(_B + "ffn.experts.mlp.v1", "experts.{e}.up", layout="(e m) h"),
    row(_B + "ffn.experts.mlp.w2", "experts.{e}.down", layout="(e m) h"),
    row("transformer.ln_f.weight", "final_norm"),
    row("transformer.ln_f.bias", "final_norm.bias"),
    row("transformer.ff_out.weight", "lm_head"),
    row("transformer.ff_out.weight", "embed", optional=True, when=lambda spec, _: spec.tied),
)
_FUSED = (row(_B + "att_proj.weight", "attn.q", "attn.k", "attn.v", layout="* h"),)
ATTENTION: Mapping[str, tuple[Row, ...]] = {
    "sequential": _FUSED,
    "moe": _FUSED,
    "llama": (
        row(_B + "q_proj.weight", "attn.q"),
        row(_B + "k_proj.weight", "attn.k"),
        row(_B + "v_proj.weight", "attn.v"),
    ),
}
IGNORED = (
    (r"\.rotary_emb\.inv_freq$", "a buffer that is computed from the rope base"),
    (r"^transformer\.(causal_mask|alibi_attention_bias|causal_attention_bias)$", "a constant mask of old releases"),
)


def table(block: str) -> Table:
    return Table("olmo", (*ROWS, *ATTENTION[block]), IGNORED)
