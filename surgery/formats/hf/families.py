"""Hugging Face's families as data: what the keys of a `config.json` mean, which are absent or refused.

    FAMILIES["llama"].keys["hidden_size"]      # "width", the field of Spec

Source: transformers `models/<family>/configuration_<family>.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from surgery.formats.hf import rows
from surgery.formats.keys import Entry, Key, Keys, Pair
from surgery.formats.table import Row
from surgery.model.spec import Spec


@dataclass(frozen=True)
class Family:
    """One `model_type`.  `keys`: config key -> field of Spec; `absent`: what transformers takes for a missing key;
    `always`: fields of Spec that are fixed; `bias`: which biases `attention_bias` switches; `theta`: default base;
    `sparse`, `shared`, `fixed`, `switches`: see `moe`; `aliases`: keys that are written under a second name too;
    `ropes`: the types of scaling that it has, () for all; `code`: the file of `hub/` that computes it, beside the
    weights; `more`: keys that say fields in another way; `rows` and `spellings`: the tensors."""

    model_type: str
    architecture: str
    keys: Mapping[str, str]
    absent: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    always: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    bias: tuple[str, ...] = ("qkv_bias", "o_bias")
    window: str = ""  # "": none | all: `sliding_window` holds for every layer | qwen: from a layer on | types: by layer
    theta: float = 10000.0
    head_dim: bool = False  # the config may say how wide a head is
    rope_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    fraction: float = 1.0
    partial: bool = False  # part of a head may turn; in all other families the key for it is ignored
    learned: bool = False  # learned positions instead of rotary embeddings
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # usual key -> this family's own
    sparse: str = ""  # how the config lists the layers with experts: steps | first | range; "": all have them
    shared: tuple[str, int] | None = None  # the key of the shared expert's width, and what its absence means
    fixed: Mapping[str, tuple[object, object]] = field(default_factory=lambda: MappingProxyType({}))
    switches: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    whole_heads: bool = False  # transformers refuses a width that is no multiple of the number of heads
    all_heads: bool = False  # every head has a key and a value of its own, and the config does not count them
    ropes: tuple[str, ...] = ()
    scores: str = ""  # the key of the factor on attention scores; "": there is none, it is 1 / sqrt(head width)
    code: str = ""
    more: tuple[Entry, ...] = ()
    spellings: tuple[rows.Spellings, ...] = ()  # of tensors that are stored in several ways
    rows: tuple[Row, ...] = rows.LLAMA_LIKE

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The keys that can be read and written by themselves."""
        plain = (Key(key, name, words=ACTS if name == "act" else None) for key, name in self.keys.items())
        biases = (Pair(self._read_bias, self._write_bias),) if self.bias else ()
        context = Pair(_read_context, _write_context)
        return (*(context if e.field == "context" else e for e in plain), *biases, *self.more)

    def _read_bias(self, keys: Keys) -> Mapping[str, bool]:
        return dict.fromkeys(self.bias, keys.flag("attention_bias"))

    def _write_bias(self, spec: Spec) -> Mapping[str, bool]:
        return {"attention_bias": bool(getattr(spec, self.bias[0]))}


def _read_context(keys: Keys) -> Mapping[str, int | None]:
    """None where it is stated as unknown."""
    stated = keys.config.get("max_position_embeddings", 0)
    return {"context": None if stated is None else keys.integer("max_position_embeddings")}


def _write_context(spec: Spec) -> Mapping[str, int]:
    return {} if spec.context is None else {"max_position_embeddings": spec.context}


def _read_mixture(keys: Keys) -> Mapping[str, int]:
    """No experts: intermediate_size is the width of the dense mlp."""
    experts, width = keys.integer("num_local_experts", 0), keys.integer("intermediate_size")
    used = keys.integer("num_experts_per_tok", 0)
    return {"experts": experts, "top_k": used, "expert_ffn": width} if experts else {"ffn": width}


def _write_mixture(spec: Spec) -> Mapping[str, int]:
    return {"num_local_experts": spec.experts, "num_experts_per_tok": spec.top_k if spec.experts else 0,
            "intermediate_size": spec.expert_ffn if spec.experts else spec.ffn}  # fmt: skip


_SIZES = {"hidden_size": "width", "num_hidden_layers": "layers", "vocab_size": "vocab",
          "max_position_embeddings": "context",
          "hidden_act": "act", "tie_word_embeddings": "tied"}  # fmt: skip
_DENSE = {**_SIZES, "intermediate_size": "ffn", "rms_norm_eps": "norm_eps"}
_MOE = {**_SIZES, "intermediate_size": "expert_ffn", "rms_norm_eps": "norm_eps", "num_experts_per_tok": "top_k"}
_FINE_MOE = {**_DENSE, "moe_intermediate_size": "expert_ffn", "num_experts_per_tok": "top_k"}
_OLMO_MOE = {**_MOE, "num_experts": "experts", "norm_topk_prob": "top_k_renormalised"}
_POST = {"norm_at": "post", "qk_norm": "full"}
COUNTED = ("n_shared_experts", "moe_num_shared_experts")  # widths that are given as a number of experts
_GRANITE = {"embedding_multiplier": "embed_scale", "residual_multiplier": "residual_scale",
            "logits_scaling": "logits_divisor"}  # fmt: skip
_GRANITE_ABSENT = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_bias": False,
                   "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
                   "attention_multiplier": 1.0}  # fmt: skip
_GRANITE_MOE = {**_GRANITE_ABSENT, "num_local_experts": 8, "num_experts_per_tok": 2}
_NUM_EXPERTS = {"num_experts": "num_local_experts"}  # transformers 5 renamed it
_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False}


_QWEN = {"sliding_window": 4096, "max_window_layers": 28}


def _absent(**keys: object) -> Mapping[str, object]:
    return MappingProxyType({**_COMMON, **keys})


FAMILIES: Mapping[str, Family] = {
    f.model_type: f
    for f in (
        Family("llama", "LlamaForCausalLM", {**_DENSE, "mlp_bias": "mlp_bias"},
               _absent(rms_norm_eps=1e-6, max_position_embeddings=2048, attention_bias=False, mlp_bias=False),
               head_dim=True, whole_heads=True),
        Family("mistral", "MistralForCausalLM", _DENSE,
               _absent(rms_norm_eps=1e-6, max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
               bias=(), window="all", head_dim=True),
        Family("qwen2", "Qwen2ForCausalLM", _DENSE,
               _absent(**_QWEN, rms_norm_eps=1e-6, max_position_embeddings=32768, num_key_value_heads=32),
               {"qkv_bias": True}, bias=(), window="qwen"),
        Family("qwen3", "Qwen3ForCausalLM", _DENSE,
               _absent(**_QWEN, rms_norm_eps=1e-6, max_position_embeddings=32768, num_key_value_heads=32, head_dim=128,
                       attention_bias=False),
               {"qk_norm": "head"}, window="qwen", head_dim=True),
        Family("mixtral", "MixtralForCausalLM", {**_MOE, "num_local_experts": "experts"},
               _absent(rms_norm_eps=1e-5, max_position_embeddings=131072, num_key_value_heads=8, num_experts_per_tok=2,
                       num_local_experts=8),
               {"top_k_renormalised": True}, bias=(), window="all", theta=1e6, head_dim=True,
               spellings=(rows.MIXTRAL,)),
        Family("granite", "GraniteForCausalLM", {**_DENSE, **_GRANITE, "mlp_bias": "mlp_bias"},
               _absent(**_GRANITE_ABSENT, mlp_bias=False), scores="attention_multiplier"),
        Family("granitemoe", "GraniteMoeForCausalLM", {**_MOE, **_GRANITE, "num_local_experts": "experts"},
               _absent(**_GRANITE_MOE), {"top_k_renormalised": True}, scores="attention_multiplier",
               spellings=(rows.GRANITE_EXPERTS,)),
        Family("granitemoeshared", "GraniteMoeSharedForCausalLM",
               {**_MOE, **_GRANITE, "num_local_experts": "experts"},
               _absent(**_GRANITE_MOE), {"top_k_renormalised": True}, shared=("shared_intermediate_size", 0),
               scores="attention_multiplier", rows=rows.LLAMA_LIKE + rows.GRANITE_SHARED,
               spellings=(rows.GRANITE_EXPERTS,)),
        Family("qwen2_moe", "Qwen2MoeForCausalLM",
               {**_FINE_MOE, "num_experts": "experts", "norm_topk_prob": "top_k_renormalised", "qkv_bias": "qkv_bias"},
               _absent(**_QWEN, rms_norm_eps=1e-6, max_position_embeddings=32768, num_key_value_heads=16,
                       num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, norm_topk_prob=False,
                       qkv_bias=True, intermediate_size=5632),
               {"shared_gate": True}, bias=(), window="qwen", sparse="steps",
               shared=("shared_expert_intermediate_size", 5632), aliases=_NUM_EXPERTS,
               rows=rows.LLAMA_LIKE + rows.QWEN2_MOE, spellings=(rows.EXPERTS,)),
        Family("glm4_moe", "Glm4MoeForCausalLM",
               {**_FINE_MOE, "n_routed_experts": "experts", "norm_topk_prob": "top_k_renormalised",
                "routed_scaling_factor": "router_scale"},
               _absent(rms_norm_eps=1e-5, max_position_embeddings=131072, num_key_value_heads=8, num_experts_per_tok=8,
                       moe_intermediate_size=1408, n_routed_experts=128, norm_topk_prob=True,
                       routed_scaling_factor=1.0, attention_bias=False, intermediate_size=10944),
               {"router_score": "sigmoid", "router_bias": True}, bias=("qkv_bias",), head_dim=True,
               fraction=0.5, partial=True,
               sparse="first", shared=("n_shared_experts", 1), switches=("use_qk_norm",),
               fixed={"n_group": (1, 1), "topk_group": (1, 1)},
               rows=rows.LLAMA_LIKE + rows.GLM4_MOE, spellings=(rows.EXPERTS,)),
        Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM",
               {**_DENSE, "moe_intermediate_size": "expert_ffn", "moe_num_experts": "experts", "moe_k": "top_k"},
               _absent(rms_norm_eps=1e-5, max_position_embeddings=131072, num_key_value_heads=4, moe_num_experts=64,
                       moe_k=6, moe_intermediate_size=1536, intermediate_size=12288, tie_word_embeddings=True),
               {"router_bias": True, "top_k_renormalised": True}, bias=(), theta=5e5, sparse="range",
               shared=("moe_num_shared_experts", 2), fixed={"use_bias": (False, False), "moe_norm_min": (1e-12, 1e-12)},
               aliases={"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"},
               rows=rows.side_by_side(rows.LLAMA_LIKE) + rows.shared_experts("shared_experts"),
               spellings=(rows.EXPERTS, rows.ERNIE_BIAS)),
        Family("qwen3_moe", "Qwen3MoeForCausalLM",
               {**_FINE_MOE, "num_experts": "experts", "norm_topk_prob": "top_k_renormalised"},
               _absent(**_QWEN, rms_norm_eps=1e-6, max_position_embeddings=32768, num_key_value_heads=4,
                       num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False,
                       attention_bias=False, intermediate_size=6144),
               {"qk_norm": "head"}, window="qwen", head_dim=True, sparse="steps", aliases=_NUM_EXPERTS,
               spellings=(rows.EXPERTS,)),
        Family("olmo", "OlmoForCausalLM", {**_SIZES, "intermediate_size": "ffn", "clip_qkv": "clip_qkv"},
               _absent(max_position_embeddings=2048, attention_bias=False, clip_qkv=None),
               {"norm": "none", "norm_eps": 1e-5}),
        Family("olmo2", "Olmo2ForCausalLM", _DENSE,
               _absent(rms_norm_eps=1e-5, max_position_embeddings=2048, attention_bias=False), _POST),
        Family("olmo3", "Olmo3ForCausalLM", _DENSE,
               _absent(rms_norm_eps=1e-5, max_position_embeddings=2048, attention_bias=False, sliding_window=4096),
               _POST, window="types", theta=5e5),
        Family("olmoe", "OlmoeForCausalLM", {**_OLMO_MOE, "clip_qkv": "clip_qkv"},
               _absent(rms_norm_eps=1e-5, max_position_embeddings=4096, attention_bias=False, num_experts=64,
                       num_experts_per_tok=8, norm_topk_prob=False, clip_qkv=None),
               {"qk_norm": "full"}, aliases=_NUM_EXPERTS, spellings=(rows.EXPERTS,)),
        Family("flex_olmo", "FlexOlmoForCausalLM", _OLMO_MOE,
               _absent(rms_norm_eps=1e-6, max_position_embeddings=4096, attention_bias=False, num_experts=7,
                       num_experts_per_tok=5, norm_topk_prob=False),
               _POST, theta=5e5, aliases=_NUM_EXPERTS, spellings=(rows.EXPERTS,)),
        Family("gpt_neox", "GPTNeoXForCausalLM",
               {**_SIZES, "intermediate_size": "ffn", "layer_norm_eps": "norm_eps",
               "use_parallel_residual": "parallel"},
               _absent(layer_norm_eps=1e-5, max_position_embeddings=2048, attention_bias=True, hidden_act="gelu",
                       use_parallel_residual=True),
               {"norm": "layer", "glu": False, "mlp_bias": True},
               rope_keys=("rotary_emb_base", "rotary_pct"), fraction=0.25, partial=True, all_heads=True,
               rows=rows.GPT_NEOX, spellings=(rows.GPT_NEOX_HEAD,)),
        Family("gpt2", "GPT2LMHeadModel",
               {**_SIZES, "intermediate_size": "ffn", "rms_norm_eps": "norm_eps"},
               _absent(rms_norm_eps=1e-5, max_position_embeddings=1024, vocab_size=50257, hidden_size=768,
                       num_hidden_layers=12, hidden_act="gelu_new", tie_word_embeddings=True),
               {"norm": "layer", "glu": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
               bias=(), learned=True, all_heads=True, rows=(), spellings=(rows.GPT2_SPELLINGS,),
               renamed={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                        "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
                        "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function"}),
        Family("attention_moe", "AttentionMoeForCausalLM",
               {**_SIZES, "rms_norm_eps": "norm_eps", "num_attention_experts": "attn_experts",
                "num_attention_experts_per_tok": "attn_top_k", "attention_scale": "attn_scale"},
               _absent(rms_norm_eps=1e-5, max_position_embeddings=4096, attention_bias=False, num_key_value_heads=8,
                       head_dim=128, num_attention_experts=8, num_attention_experts_per_tok=8, attention_scale=8.0,
                       num_local_experts=0, num_experts_per_tok=0, intermediate_size=11008),
               {"top_k_renormalised": True}, bias=("qkv_bias",), head_dim=True,
               renamed={"rope_theta": "rotary_base", "rope_scaling": "rotary_scaling"},
               ropes=("default", "linear", "llama3"), code="modeling_attention_moe.py",
               more=(Pair(_read_mixture, _write_mixture),), rows=rows.LLAMA_LIKE + rows.ATTENTION_ROUTER,
               spellings=(rows.MIXTRAL,)),
    )
}  # fmt: skip

EXTRA = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rope_theta",
          "rope_scaling", "rope_parameters", "original_max_position_embeddings", "sparse_attention",
          "partial_rotary_factor", "rotary_emb_base", "rotary_pct", "sliding_window",
          "use_sliding_window", "max_window_layers", "layer_types", "decoder_sparse_step", "mlp_only_layers",
          "num_local_experts", "num_experts", "num_experts_per_tok",
          "first_k_dense_replace", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")  # fmt: skip
REFUSED = {
    "quantization_config": "the weights are quantised; dequantise them first",
    "compression_config": "the weights are compressed; decompress them first",
    "pruned_heads": "heads were cut out of some layers",
    "rope_interleaved": "rotary pairs lie side by side, which no built-in family does",
    "scale_attn_by_inverse_layer_idx": "attention is scaled layer by layer, which no other format does",
    "add_cross_attention": "the model also attends to an encoder",
    "auto_map": "the model runs code of its own, which is not executed; give a checkpoint of a built-in family",
}
# keys with values that say what a model does whose family does not know the key; with others they are not understood
USUAL = {"is_causal": True, "scale_attn_weights": True, "attention_bias": False, "mlp_bias": False,
         "use_qk_norm": False, "use_sliding_window": False}  # fmt: skip
ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2"}  # fmt: skip
