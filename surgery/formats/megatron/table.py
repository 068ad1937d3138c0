"""Megatron's tables: legacy files (local or Transformer Engine names), pre-core classes, and `torch_dist` keys.

    table("te", "te_grouped")              # legacy names of a TE run with TEGroupedMLP
    dist_table("te", names, spec)          # torch_dist: every key stacked over the layers, or numbered, as stored

Names and layouts: megatron/core `models/gpt/gpt_layer_specs.py`, `transformer/attention.py` (rows of `linear_qkv` are
grouped per query group: its queries, its key, its value), `transformer/mlp.py` (`linear_fc1` of a rank is its gate over
its up), `transformer/moe/experts.py`; megatron/legacy `model/language_model.py`, `model/transformer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from surgery.formats.table import Row, Table, row
from surgery.formats.topology import Topology
from surgery.model.spec import Spec
from surgery.tensors.axes import pattern

_L = "decoder.layers.{l}."


def _plain(spec: Spec, _: Topology) -> bool:
    return not spec.glu


def _dense(spec: Spec, layer: int) -> bool:
    return not spec.is_moe(layer)


def _sparse(spec: Spec, layer: int) -> bool:
    return spec.is_moe(layer)


OUTSIDE: tuple[Row, ...] = (
    row("embedding.word_embeddings.weight", "embed", cut="v", pad="v"),
    row("embedding.position_embeddings.weight", "positions"),
    row("decoder.final_layernorm.weight", "final_norm", stage=-1),
    row("decoder.final_layernorm.bias", "final_norm.bias", stage=-1),
    row("output_layer.weight", "lm_head", cut="v", pad="v", stage=-1),
)
# The last of several stages has no embedding of its own to compute a tied model's logits with.
TIED_COPY = row("output_layer.weight", "embed", cut="v", pad="v", stage=-1, copy=True,
                when=lambda spec, topology: spec.tied and topology.pp > 1)  # fmt: skip

LAYERS: tuple[Row, ...] = (
    row(_L + "self_attention.linear_qkv.weight", "attn.q", "attn.k", "attn.v", layout="(g * d) h", cut="g"),
    row(_L + "self_attention.linear_qkv.bias", "attn.q.bias", "attn.k.bias", "attn.v.bias", layout="(g * d)", cut="g"),
    row(_L + "self_attention.q_layernorm.weight", "attn.q_head_norm"),
    row(_L + "self_attention.k_layernorm.weight", "attn.k_head_norm"),
    row(_L + "self_attention.linear_proj.weight", "attn.o", cut="g"),
    row(_L + "self_attention.linear_proj.bias", "attn.o.bias"),
    row(_L + "mlp.linear_fc1.weight", "mlp.gate", "mlp.up", layout="(* f) h", cut="f"),
    row(_L + "mlp.linear_fc1.bias", "mlp.gate.bias", "mlp.up.bias", layout="(* f)", cut="f"),
    row(_L + "mlp.linear_fc1.weight", "mlp.up", cut="f", when=_plain),
    row(_L + "mlp.linear_fc1.bias", "mlp.up.bias", cut="f", when=_plain),
    row(_L + "mlp.linear_fc2.weight", "mlp.down", cut="f"),
    row(_L + "mlp.linear_fc2.bias", "mlp.down.bias"),
    row(_L + "mlp.router.weight", "router"),
    row(_L + "mlp.router.expert_bias", "router.bias"),
    row(_L + "mlp.shared_experts.linear_fc1.weight", "shared.gate", "shared.up", layout="(* s) h", cut="s"),
    row(_L + "mlp.shared_experts.linear_fc1.weight", "shared.up", cut="s", when=_plain),
    row(_L + "mlp.shared_experts.linear_fc2.weight", "shared.down", cut="s"),
    row(_L + "mlp.shared_experts.gate_weight", "shared_gate"),
)

_QKV_NORM = _L + "self_attention.linear_qkv.layer_norm_"
_FC1_NORM = _L + "mlp.linear_fc1.layer_norm_"
_MLP_NORM = _L + "pre_mlp_layernorm."

# Transformer Engine fuses a norm with the linear layer behind it; in front of experts there is no such layer.
NORMS: Mapping[str, tuple[Row, ...]] = {
    "local": (
        row(_L + "input_layernorm.weight", "attn_norm"),
        row(_L + "input_layernorm.bias", "attn_norm.bias"),
        row(_MLP_NORM + "weight", "mlp_norm"),
        row(_MLP_NORM + "bias", "mlp_norm.bias"),
    ),
    "te": (
        row(_QKV_NORM + "weight", "attn_norm"),
        row(_QKV_NORM + "bias", "attn_norm.bias"),
        row(_FC1_NORM + "weight", "mlp_norm", layers=_dense),
        row(_FC1_NORM + "bias", "mlp_norm.bias", layers=_dense),
        row(_MLP_NORM + "weight", "mlp_norm", layers=_sparse),
        row(_MLP_NORM + "bias", "mlp_norm.bias", layers=_sparse),
    ),
    # the local spec renames its norms when it saves torch_dist, those in front of experts too
    "local_dist": (
        row(_QKV_NORM + "weight", "attn_norm"),
        row(_QKV_NORM + "bias", "attn_norm.bias"),
        row(_FC1_NORM + "weight", "mlp_norm"),
        row(_FC1_NORM + "bias", "mlp_norm.bias"),
    ),
}


def _experts(fc1: str, fc2: str) -> tuple[Row, ...]:
    """One tensor per expert and layer."""
    return (
        row(_L + fc1, "experts.{e}.gate", "experts.{e}.up", layout="(* m) h", cut="m"),
        row(_L + fc1, "experts.{e}.up", cut="m", when=_plain),
        row(_L + fc2, "experts.{e}.down", cut="m"),
    )


_W1 = _L + "mlp.experts.weight1"
_ALL = "mlp.experts.experts.linear_fc"

EXPERTS: Mapping[str, tuple[Row, ...]] = {
    "sequential": _experts("mlp.experts.local_experts.{e}.linear_fc1.weight",
                           "mlp.experts.local_experts.{e}.linear_fc2.weight"),
    "te_grouped": _experts("mlp.experts.linear_fc1.weight{e}", "mlp.experts.linear_fc2.weight{e}"),
    # GroupedMLP: the parameter claims to be a matrix of h rows, its memory holds one expert after the other
    "grouped": (
        row(_W1, "experts.{e}.gate", "experts.{e}.up", layout="e h (* m)", cut="m", shape="h (e * m)"),
        row(_W1, "experts.{e}.up", layout="e h m", cut="m", shape="h (e m)", when=_plain),
        row(_L + "mlp.experts.weight2", "experts.{e}.down", layout="(e m) h", cut="m"),
    ),
    # torch_dist has one key for all three
    "dist": (
        row(_L + _ALL + "1.weight", "experts.{e}.gate", "experts.{e}.up", layout="e (* m) h", cut="m"),
        row(_L + _ALL + "1.weight", "experts.{e}.up", layout="e m h", cut="m", when=_plain),
        row(_L + _ALL + "2.weight", "experts.{e}.down", layout="e h m", cut="m"),
    ),
}  # fmt: skip

# torch_dist with singleton_local_shards: gate and up, and every expert, under keys of their own
_EACH = "mlp.experts.experts.{e}.linear_fc"
SINGLETON: tuple[Row, ...] = (
    row(_L + "mlp.linear_fc1.weight_w", "mlp.gate"),
    row(_L + "mlp.linear_fc1.weight_v", "mlp.up"),
    row(_L + "mlp.linear_fc1.bias_w", "mlp.gate.bias"),
    row(_L + "mlp.linear_fc1.bias_v", "mlp.up.bias"),
    row(_L + "mlp.shared_experts.linear_fc1.weight_w", "shared.gate"),
    row(_L + "mlp.shared_experts.linear_fc1.weight_v", "shared.up"),
    row(_L + _EACH + "1.weight_w", "experts.{e}.gate"),
    row(_L + _EACH + "1.weight_v", "experts.{e}.up"),
    row(_L + _EACH + "1.weight", "experts.{e}.up", when=_plain),
    row(_L + _EACH + "2.weight", "experts.{e}.down"),
)

IGNORED = (
    (r"\._extra_state\d*$", "Transformer Engine's own state (FP8 scales), no weight"),
    (r"\.router\.(local|global)_tokens_per_expert$", "a counter of the load balancing, no weight"),
    (r"rotary_pos_emb\.inv_freq$", "a buffer that is computed from the rope base"),
)


def table(norms: str, experts: str, vocab_multiple: int = 1) -> Table:
    """Legacy files: norms local or te; experts sequential, grouped or te_grouped."""
    rows = (*OUTSIDE, TIED_COPY, *LAYERS, *NORMS[norms], *EXPERTS[experts])
    return Table("megatron", rows, IGNORED, vocab_multiple)


# ------------------------------------------------------------------------------------------------ pre-core classes

PRECORE = "megatron (pre-core)"
_P = "language_model.encoder.layers.{l}."
# rows of query_key_value by checkpoint_version: 0 all queries, keys, values; 1.0 q, k, v side by side in every row
QKV_ORDER = {0: "(* g d)", 1: "(g d *)", 2: "(g * d)"}
# spellings of older releases -> the last one
OLD_NAMES = (
    (r"^language_model\.transformer\.", "language_model.encoder."),
    (r"\.layers\.(\d+)\.attention\.", r".layers.\1.self_attention."),
    (r"\.layers\.(\d+)\.input_layernorm\.", r".layers.\1.input_norm."),
    (r"\.layers\.(\d+)\.post_attention_layernorm\.", r".layers.\1.post_attention_norm."),
    (r"\.encoder\.final_layernorm\.", ".encoder.final_norm."),
)


def precore_table(version: int) -> Table:
    """Models saved by `--use-legacy-models`, and before megatron.core; read only."""
    qkv = QKV_ORDER[version]
    rows = (
        row("language_model.embedding.word_embeddings.weight", "embed", cut="v", pad="v"),
        row("language_model.embedding.position_embeddings.weight", "positions"),
        row(_P + "input_norm.weight", "attn_norm"),
        row(_P + "input_norm.bias", "attn_norm.bias"),
        row(_P + "self_attention.query_key_value.weight", "attn.q", "attn.k", "attn.v", layout=f"{qkv} h", cut="g"),
        row(_P + "self_attention.query_key_value.bias", "attn.q.bias", "attn.k.bias", "attn.v.bias", layout=qkv,
            cut="g"),
        row(_P + "self_attention.dense.weight", "attn.o", cut="g"),
        row(_P + "self_attention.dense.bias", "attn.o.bias"),
        row(_P + "post_attention_norm.weight", "mlp_norm"),
        row(_P + "post_attention_norm.bias", "mlp_norm.bias"),
        row(_P + "mlp.dense_h_to_4h.weight", "mlp.gate", "mlp.up", layout="(* f) h", cut="f"),
        row(_P + "mlp.dense_h_to_4h.bias", "mlp.gate.bias", "mlp.up.bias", layout="(* f)", cut="f"),
        row(_P + "mlp.dense_h_to_4h.weight", "mlp.up", cut="f", when=_plain),
        row(_P + "mlp.dense_h_to_4h.bias", "mlp.up.bias", cut="f", when=_plain),
        row(_P + "mlp.dense_4h_to_h.weight", "mlp.down", cut="f"),
        row(_P + "mlp.dense_4h_to_h.bias", "mlp.down.bias"),
        row("language_model.encoder.final_norm.weight", "final_norm", stage=-1),
        row("language_model.encoder.final_norm.bias", "final_norm.bias", stage=-1),
        row("language_model.output_layer.weight", "lm_head", cut="v", pad="v", stage=-1),
        row("word_embeddings_for_head.weight", "embed", cut="v", pad="v", stage=-1, copy=True,
            when=lambda spec, topology: spec.tied and topology.pp > 1),
    )  # fmt: skip
    return Table(PRECORE, rows, IGNORED)


# ------------------------------------------------------------------------------------------------------ torch_dist


def stacked(r: Row) -> Row:
    """The row with all layers in one tensor: the layer leaves the name and becomes the first axis."""
    if "l" not in r.keys:
        return r
    layout = row("x", "embed", layout=f"l {pattern(r.layout)}").layout
    return replace(r, name=r.name.replace(".layers.{l}.", ".layers."), layout=layout)


def dist_table(norms: str, stored: Collection[str] = (), vocab_multiple: int = 1, *, numbered: bool = False) -> Table:
    """torch_dist: norms local_dist or te.  Each key is spelled as `stored` has it, else numbered or stacked."""
    usual = LAYERS + NORMS[norms] + EXPERTS["dist"]
    spelled = {_template(name) for name in stored}
    found = [v for r in usual + SINGLETON for v in (stacked(r), r) if v.name in spelled]
    held = {part for r in found for part in r.parts}
    rest = [r if numbered else stacked(r) for r in usual if not held.issuperset(r.parts)]
    return Table("megatron-dist", (*OUTSIDE, *found, *rest), IGNORED, vocab_multiple)


def _template(name: str) -> str:
    return re.sub(r"\.experts\.\d+\.", ".experts.{e}.", re.sub(r"^decoder\.layers\.\d+\.", _L, name))
