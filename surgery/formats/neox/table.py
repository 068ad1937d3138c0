"""GPT-NeoX's tensors: the rows of its table, in all the ways in which its releases have spelled them.

    table(spec, Spelling(mlp="linear", qkv="C", tp=2, prefix="sequential."))

Names and layouts after GPT-NeoX megatron/model/transformer.py, gpt2_model.py and word_embeddings.py, of main and of
the branch llemma: ranks cut column-parallel weights along their rows, row-parallel ones along their columns.  Under a
parallel residual every rank adds its own row-parallel bias, so the model's is their sum.  Layer 0 of the numbering is
the embedding, transformer layers begin at 2, the last norm is L + 3 and the output layer L + 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from surgery.formats.table import Row, Table, row
from surgery.formats.topology import Topology
from surgery.model.spec import Spec


def _layer_norm(spec: Spec, _: Topology) -> bool:
    return spec.norm == "layer"


def _rms_norm(spec: Spec, _: Topology) -> bool:
    return spec.norm == "rms"


def _parallel(spec: Spec, _: Topology) -> bool:
    return spec.parallel


def _serial(spec: Spec, _: Topology) -> bool:
    return not spec.parallel


def _gated(spec: Spec, _: Topology) -> bool:
    return spec.glu


def _plain(spec: Spec, _: Topology) -> bool:
    return not spec.glu


# How q, k and v lie in one tensor: layout of its rows, what ranks divide, and how the parts are seen.  t are the
# ranks and y the key/value heads of each; x is the share of k or v that goes to each of the n query heads of a group.
QKV: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "A": ("(g * d)", "g", ()),
    "B": ("(g n *)", "g", ("(g n d)", "(g n x)", "(g n x)")),
    "C": ("(t *)", "t", ("(t y n d)", "(t y d)", "(t y d)")),
}

LAYER: tuple[Row, ...] = (
    row("input_layernorm.weight", "attn_norm", when=_layer_norm),
    row("input_layernorm.bias", "attn_norm.bias"),
    row("input_layernorm.scale", "attn_norm", when=_rms_norm),
    row("attention.dense.weight", "attn.o", cut="g"),
    row("attention.dense.bias", "attn.o.bias", summed=True, when=_parallel),
    row("attention.dense.bias", "attn.o.bias", when=_serial),
    row("post_attention_layernorm.weight", "mlp_norm", when=_layer_norm),
    row("post_attention_layernorm.bias", "mlp_norm.bias"),
    row("post_attention_layernorm.scale", "mlp_norm", when=_rms_norm),
)


def _mlp(up: str, down: str) -> tuple[Row, ...]:
    """An mlp of two tensors; a gated one stores, per rank, up over gate in the first."""
    return (
        row(f"mlp.{up}.weight", "mlp.up", cut="f", when=_plain),
        row(f"mlp.{up}.bias", "mlp.up.bias", cut="f", when=_plain),
        row(f"mlp.{up}.weight", "mlp.up", "mlp.gate", layout="(* f) h", cut="f", when=_gated),
        row(f"mlp.{up}.bias", "mlp.up.bias", "mlp.gate.bias", layout="(* f)", cut="f", when=_gated),
        row(f"mlp.{down}.weight", "mlp.down", cut="f"),
        row(f"mlp.{down}.bias", "mlp.down.bias", summed=True, when=_parallel),
        row(f"mlp.{down}.bias", "mlp.down.bias", when=_serial),
    )


MLP: Mapping[str, tuple[Row, ...]] = {
    "linear": _mlp("linear1", "linear2"),
    "dense": _mlp("dense_h_to_4h", "dense_4h_to_h"),
    "w": (
        row("mlp.w1.weight", "mlp.gate", cut="f"),
        row("mlp.w3.weight", "mlp.up", cut="f"),
        row("mlp.w2.weight", "mlp.down", cut="f"),
    ),
}

EMBEDDING = (
    row("word_embeddings.weight", "embed", cut="v", pad="v"),
    row("position_embeddings.weight", "positions"),
)
FINAL_NORM = (
    row("norm.weight", "final_norm", when=_layer_norm),
    row("norm.bias", "final_norm.bias"),
    row("norm.scale", "final_norm", when=_rms_norm),
)
HEAD: Mapping[str, tuple[Row, ...]] = {
    "v": (row("final_linear.weight", "lm_head", cut="v", pad="v"),),
    "h": (row("final_linear.weight", "lm_head", cut="h"),),
}

IGNORED = (
    (r"rotary_emb\.inv_freq$", "a buffer that is computed from the rope base"),
    (r"\._extra_state$", "Transformer Engine's scales for fp8"),
)


@dataclass(frozen=True)
class Spelling:
    """Which of the format's variants a checkpoint is written in."""

    mlp: str
    qkv: str
    tp: int
    prefix: str = ""
    head: str = "v"
    averaged: bool = False
    vocab_multiple: int = 1


def table(spec: Spec, how: Spelling) -> Table:
    """The rows of a variant, under the numbers that this model's layers have."""
    layout, cut, views = QKV[how.qkv]
    sizes = {"t": how.tp, "y": max(spec.kv_heads // how.tp, 1), "x": max(spec.head_dim // spec.group, 1)}
    qkv = (
        row("attention.query_key_value.weight", "attn.q", "attn.k", "attn.v", layout=f"{layout} h", cut=cut,
            views=[f"{v} h" for v in views], sizes=sizes),
        row("attention.query_key_value.bias", "attn.q.bias", "attn.k.bias", "attn.v.bias", layout=layout, cut=cut,
            views=views, sizes=sizes),
    )  # fmt: skip
    numbered = ((0, EMBEDDING), (spec.layers + 3, FINAL_NORM), (spec.layers + 4, HEAD[how.head]))
    rows = [replace(r, name=f"{how.prefix}{i}.{r.name}") for i, group in numbered for r in group]
    rows += [replace(r, name=f"{how.prefix}{{l}}.{r.name}", first=2) for r in (*LAYER, *qkv, *MLP[how.mlp])]
    if how.averaged:
        rows = [replace(r, averaged=not r.cut and not r.summed) for r in rows]
    return Table("neox", tuple(rows), IGNORED, how.vocab_multiple)
