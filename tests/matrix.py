"""Which formats hold which family: the table in the README, as the tests of conversions read it."""

from __future__ import annotations

from collections.abc import Mapping

HOLDS: Mapping[str, tuple[str, ...]] = {
    "llama": ("meta", "neox", "megatron", "megatron-dist", "olmo", "olmo-core"),
    "llama3": ("meta", "megatron", "megatron-dist", "olmo-core"),
    "llama_tied": ("meta", "megatron", "megatron-dist", "olmo-core"),
    "mistral": ("megatron", "megatron-dist", "olmo-core"),
    "qwen2": ("megatron", "megatron-dist"),
    "qwen3": ("megatron", "megatron-dist", "olmo-core"),
    "mixtral": ("megatron", "megatron-dist", "olmo-core"),
    "qwen3_moe": ("megatron", "megatron-dist", "olmo-core"),
    "olmo": ("olmo", "olmo-core"),
    "olmo2": ("olmo", "olmo-core"),
    "olmo3": ("olmo-core",),
    "olmoe": ("olmo", "olmo-core"),
    "flex_olmo": ("olmo-core",),
    "gpt_neox": ("neox",),
    "gpt2": ("neox", "megatron", "megatron-dist"),
}
_WIDE, _QK, _ROPE = r"heads of width 10 x 12|12 heads", r"query and key norms", r"scaled as llama3"
REASONS: Mapping[tuple[str, str], str] = {
    ("llama3", "neox"): _ROPE, ("llama3", "olmo"): _ROPE, ("llama_tied", "neox"): _ROPE, ("llama_tied", "olmo"): _ROPE,
    ("mistral", "meta"): r"sliding windows", ("mistral", "neox"): _WIDE, ("mistral", "olmo"): _WIDE,
    ("qwen2", "meta"): r"biases", ("qwen2", "neox"): r"biases for queries, keys and values only",
    ("qwen2", "olmo"): r"biases of queries", ("qwen2", "olmo-core"): r"a bias of the attention's output",
    ("qwen3", "meta"): _QK, ("qwen3", "neox"): _QK, ("qwen3", "olmo"): _WIDE,
    ("mixtral", "meta"): r"experts", ("mixtral", "neox"): r"experts", ("mixtral", "olmo"): _WIDE,
    ("qwen3_moe", "meta"): r"experts", ("qwen3_moe", "neox"): r"experts", ("qwen3_moe", "olmo"): _WIDE,
    ("olmo", "meta"): r"LayerNorm without weights", ("olmo", "neox"): r"clipped",
    ("olmo", "megatron"): r"LayerNorm without weights", ("olmo", "megatron-dist"): r"LayerNorm without weights",
    ("olmo2", "meta"): _QK, ("olmo2", "neox"): _QK, ("olmo2", "megatron"): _QK, ("olmo2", "megatron-dist"): _QK,
    ("olmo3", "meta"): _QK, ("olmo3", "neox"): _QK, ("olmo3", "megatron"): _QK, ("olmo3", "megatron-dist"): _QK,
    ("olmo3", "olmo"): r"sliding windows",
    ("olmoe", "meta"): _QK, ("olmoe", "neox"): _QK, ("olmoe", "megatron"): _QK, ("olmoe", "megatron-dist"): _QK,
    ("flex_olmo", "meta"): r"experts", ("flex_olmo", "neox"): r"experts", ("flex_olmo", "megatron"): _QK,
    ("flex_olmo", "megatron-dist"): _QK, ("flex_olmo", "olmo"): r"norm_after: true",
    ("gpt_neox", "meta"): r"parallel residuals", ("gpt_neox", "megatron"): r"parallel residual",
    ("gpt_neox", "megatron-dist"): r"parallel residual", ("gpt_neox", "olmo"): r"biases",
    ("gpt_neox", "olmo-core"): r"activation is 'gelu'",
    ("gpt2", "meta"): r"biases", ("gpt2", "olmo"): r"gelu_tanh", ("gpt2", "olmo-core"): r"no rotary embeddings",
}  # fmt: skip
