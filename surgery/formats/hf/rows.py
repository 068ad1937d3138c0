"""The tensors of Hugging Face's families: rows for all that are like Llama, and what single families have besides.

    LLAMA_LIKE, EXPERTS          # `families` says which family has which

Names and layouts: transformers `models/<family>/modeling_<family>.py`; the layouts of the anatomy are these, so most
rows need no pattern.  Rows that a model has no parts for are silent, so one table serves all Llama-like families; the
position of the norms (`post_attention_layernorm` is the mlp's input norm in Llama and the attention's output norm in
OLMo2) is decided by the parts.  Experts are stored one by one under two spellings, or fused as transformers 5 has them.
"""

from __future__ import annotations

from dataclasses import replace

from surgery.formats.table import Row, row

_L = "model.layers.{l}."

LLAMA_LIKE: tuple[Row, ...] = (
    row("model.embed_tokens.weight", "embed", pad="v"),
    row(_L + "input_layernorm.weight", "attn_norm"),
    row(_L + "self_attn.q_proj.weight", "attn.q"),
    row(_L + "self_attn.q_proj.bias", "attn.q.bias"),
    row(_L + "self_attn.k_proj.weight", "attn.k"),
    row(_L + "self_attn.k_proj.bias", "attn.k.bias"),
    row(_L + "self_attn.v_proj.weight", "attn.v"),
    row(_L + "self_attn.v_proj.bias", "attn.v.bias"),
    row(_L + "self_attn.q_norm.weight", "attn.q_norm"),
    row(_L + "self_attn.k_norm.weight", "attn.k_norm"),
    row(_L + "self_attn.q_norm.weight", "attn.q_head_norm"),
    row(_L + "self_attn.k_norm.weight", "attn.k_head_norm"),
    row(_L + "self_attn.o_proj.weight", "attn.o"),
    row(_L + "self_attn.o_proj.bias", "attn.o.bias"),
    row(_L + "post_attention_layernorm.weight", "attn_post_norm"),
    row(_L + "post_attention_layernorm.weight", "mlp_norm"),
    row(_L + "mlp.gate_proj.weight", "mlp.gate"),
    row(_L + "mlp.gate_proj.bias", "mlp.gate.bias"),
    row(_L + "mlp.up_proj.weight", "mlp.up"),
    row(_L + "mlp.up_proj.bias", "mlp.up.bias"),
    row(_L + "mlp.down_proj.weight", "mlp.down"),
    row(_L + "mlp.down_proj.bias", "mlp.down.bias"),
    row(_L + "post_feedforward_layernorm.weight", "mlp_post_norm"),
    row("model.norm.weight", "final_norm"),
    row("lm_head.weight", "lm_head", pad="v"),
    row("lm_head.weight", "embed", optional=True, when=lambda spec, _: spec.tied),
)

ATTENTION_ROUTER = (row(_L + "self_attn.router.weight", "attn.router"),)  # of our own modeling_attention_moe.py

GATE_PROJ: tuple[Row, ...] = (
    row(_L + "mlp.gate.weight", "router"),
    row(_L + "mlp.experts.{e}.gate_proj.weight", "experts.{e}.gate"),
    row(_L + "mlp.experts.{e}.up_proj.weight", "experts.{e}.up"),
    row(_L + "mlp.experts.{e}.down_proj.weight", "experts.{e}.down"),
)
W1: tuple[Row, ...] = (
    row(_L + "block_sparse_moe.gate.weight", "router"),
    row(_L + "block_sparse_moe.experts.{e}.w1.weight", "experts.{e}.gate"),
    row(_L + "block_sparse_moe.experts.{e}.w3.weight", "experts.{e}.up"),
    row(_L + "block_sparse_moe.experts.{e}.w2.weight", "experts.{e}.down"),
)
FUSED: tuple[Row, ...] = (  # as transformers 5 has them in memory
    row(_L + "mlp.gate.weight", "router"),
    row(_L + "mlp.experts.gate_up_proj", "experts.{e}.gate", "experts.{e}.up", layout="e (* m) h"),
    row(_L + "mlp.experts.down_proj", "experts.{e}.down", layout="e h m"),
)
_GRANITE = _L + "block_sparse_moe."
GRANITE_SHARED: tuple[Row, ...] = (
    row(_L + "shared_mlp.input_linear.weight", "shared.gate", "shared.up", layout="(* s) h"),
    row(_L + "shared_mlp.output_linear.weight", "shared.down"),
)
GRANITE: tuple[Row, ...] = (
    row(_GRANITE + "router.layer.weight", "router"),
    row(_GRANITE + "input_linear.weight", "experts.{e}.gate", "experts.{e}.up", layout="e (* m) h"),
    row(_GRANITE + "output_linear.weight", "experts.{e}.down", layout="e h m"),
)
GRANITE_FUSED: tuple[Row, ...] = (
    row(_GRANITE + "router.weight", "router"),
    row(_GRANITE + "experts.gate_up_proj", "experts.{e}.gate", "experts.{e}.up", layout="e (* m) h"),
    row(_GRANITE + "experts.down_proj", "experts.{e}.down", layout="e h m"),
)

# Several ways to store the same parts, each with a pattern that some tensor's name shows; the first is what is written.
Spellings = tuple[tuple[str, tuple[Row, ...]], ...]
_IN_MEMORY = r"\.experts\.(gate_up_proj|down_proj)$"
EXPERTS: Spellings = (
    (r"\.experts\.\d+\.gate_proj\b", GATE_PROJ),
    (r"\.experts\.\d+\.w[123]\b", W1),
    (_IN_MEMORY, FUSED),
)
MIXTRAL: Spellings = (EXPERTS[1], EXPERTS[0], EXPERTS[2])
GRANITE_EXPERTS: Spellings = ((r"_moe\.input_linear\b", GRANITE), (_IN_MEMORY, GRANITE_FUSED))


def shared_experts(module: str) -> tuple[Row, ...]:
    """One expert that every token uses, under the name of its module."""
    return tuple(row(f"{_L}mlp.{module}.{x}_proj.weight", f"shared.{x}") for x in ("gate", "up", "down"))


QWEN2_MOE = (*shared_experts("shared_expert"), row(_L + "mlp.shared_expert_gate.weight", "shared_gate"))
GLM4_MOE = (*shared_experts("shared_experts"), row(_L + "mlp.gate.e_score_correction_bias", "router.bias"))


def _ernie_bias(module: str) -> tuple[Row, ...]:
    return (row(f"{_L}mlp.{module}.e_score_correction_bias", "router.bias", layout="u e"),)


# transformers 5 holds Ernie's statistics inside the router
ERNIE_BIAS: Spellings = ((r"mlp\.moe_statics\.", _ernie_bias("moe_statics")),
                         (r"mlp\.gate\.moe_statics\.", _ernie_bias("gate.moe_statics")))  # fmt: skip


def side_by_side(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a family whose rotary pairs lie side by side."""
    pairs = {"layers.{l}.attn.q": "(g n half two) h", "layers.{l}.attn.k": "(g half two) h"}
    return tuple(row(r.name, *r.parts, layout=pairs[r.parts[0]]) if r.parts[0] in pairs else r for r in rows)


_N = "gpt_neox.layers.{l}."

GPT_NEOX: tuple[Row, ...] = (
    row("gpt_neox.embed_in.weight", "embed", pad="v"),
    row(_N + "input_layernorm.weight", "attn_norm"),
    row(_N + "input_layernorm.bias", "attn_norm.bias"),
    row(_N + "attention.query_key_value.weight", "attn.q", "attn.k", "attn.v", layout="(g * d) h"),
    row(_N + "attention.query_key_value.bias", "attn.q.bias", "attn.k.bias", "attn.v.bias", layout="(g * d)"),
    row(_N + "attention.dense.weight", "attn.o"),
    row(_N + "attention.dense.bias", "attn.o.bias"),
    row(_N + "post_attention_layernorm.weight", "mlp_norm"),
    row(_N + "post_attention_layernorm.bias", "mlp_norm.bias"),
    row(_N + "mlp.dense_h_to_4h.weight", "mlp.up"),
    row(_N + "mlp.dense_h_to_4h.bias", "mlp.up.bias"),
    row(_N + "mlp.dense_4h_to_h.weight", "mlp.down"),
    row(_N + "mlp.dense_4h_to_h.bias", "mlp.down.bias"),
    row("gpt_neox.final_layer_norm.weight", "final_norm"),
    row("gpt_neox.final_layer_norm.bias", "final_norm.bias"),
)


def head(name: str) -> tuple[Row, ...]:
    """The output head, which old files of tied models hold again."""
    return (row(name, "lm_head", pad="v"), row(name, "embed", optional=True, when=lambda spec, _: spec.tied))


# transformers 5 calls it lm_head in memory, not in files
GPT_NEOX_HEAD: Spellings = ((r"^embed_out\.", head("embed_out.weight")), (r"^lm_head\.", head("lm_head.weight")))

_G = "transformer.h.{l}."

# Conv1D weights are [in, out]
GPT2: tuple[Row, ...] = (
    row("transformer.wte.weight", "embed", pad="v"),
    row("transformer.wpe.weight", "positions"),
    row(_G + "ln_1.weight", "attn_norm"),
    row(_G + "ln_1.bias", "attn_norm.bias"),
    row(_G + "attn.c_attn.weight", "attn.q", "attn.k", "attn.v", layout="h (* g d)"),
    row(_G + "attn.c_attn.bias", "attn.q.bias", "attn.k.bias", "attn.v.bias", layout="(* g d)"),
    row(_G + "attn.c_proj.weight", "attn.o", layout="(g n d) h"),
    row(_G + "attn.c_proj.bias", "attn.o.bias"),
    row(_G + "ln_2.weight", "mlp_norm"),
    row(_G + "ln_2.bias", "mlp_norm.bias"),
    row(_G + "mlp.c_fc.weight", "mlp.up", layout="h f"),
    row(_G + "mlp.c_fc.bias", "mlp.up.bias"),
    row(_G + "mlp.c_proj.weight", "mlp.down", layout="f h"),
    row(_G + "mlp.c_proj.bias", "mlp.down.bias"),
    row("transformer.ln_f.weight", "final_norm"),
    row("transformer.ln_f.bias", "final_norm.bias"),
    row("lm_head.weight", "lm_head", pad="v"),
    row("lm_head.weight", "embed", optional=True, when=lambda spec, _: spec.tied),
)
# the first checkpoints were saved without the head, and without its prefix
GPT2_SPELLINGS: Spellings = (
    (r"^transformer\.", GPT2), (r"^wte\.", tuple(replace(r, name=r.name.removeprefix("transformer.")) for r in GPT2)),
)  # fmt: skip

IGNORED = (
    (r"^(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)$", "the causal mask, a constant buffer"),
    (r"rotary_emb\.inv_freq$", "a buffer that is computed from the rope base"),
    (r" beside the embedding$", "the head of a tied model is its embedding (-O tied=yes)"),
    (r"^gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)$", "the causal mask, a constant buffer"),
)
