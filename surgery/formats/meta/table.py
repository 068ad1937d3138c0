"""The tensors of Meta's Llama releases.

    table("width")           # how ranks cut the embedding: width (Llama 1, 2, Code Llama) or vocab (Llama 3)

Layout after llama-models `models/llama3/model.py` and, for Llama 1 and 2, llama `llama/model.py`: column-parallel
weights are cut along their rows, row-parallel ones along their columns.  Rotary pairs lie side by side in `wq` and
`wk` (`half two`), where Hugging Face keeps the halves apart.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.formats.table import Row, Table, row

_L = "layers.{l}."
ROWS: tuple[Row, ...] = (
    row(_L + "attention.wq.weight", "attn.q", layout="(g n half two) h", cut="g"),
    row(_L + "attention.wk.weight", "attn.k", layout="(g half two) h", cut="g"),
    row(_L + "attention.wv.weight", "attn.v", cut="g"),
    row(_L + "attention.wo.weight", "attn.o", cut="g"),
    row(_L + "feed_forward.w1.weight", "mlp.gate", cut="f"),
    row(_L + "feed_forward.w2.weight", "mlp.down", cut="f"),
    row(_L + "feed_forward.w3.weight", "mlp.up", cut="f"),
    row(_L + "attention_norm.weight", "attn_norm"),
    row(_L + "ffn_norm.weight", "mlp_norm"),
    row("norm.weight", "final_norm"),
    row("output.weight", "lm_head", cut="v"),
)
# A tied model stores its embedding under both names.
EMBEDDING: Mapping[str, tuple[Row, ...]] = {
    "width": (
        row("tok_embeddings.weight", "embed", cut="h"),
        row("output.weight", "embed", cut="v", copy=True, when=lambda spec, _: spec.tied),
    ),
    "vocab": (
        row("tok_embeddings.weight", "embed", cut="v"),
        row("output.weight", "embed", cut="v", copy=True, when=lambda spec, _: spec.tied),
    ),
}
IGNORED = ((r"(^|\.)rope\.freqs$", "a buffer that is computed from the rope base"),)


def table(embedding: str) -> Table:
    return Table("meta", (*EMBEDDING[embedding], *ROWS), IGNORED)
