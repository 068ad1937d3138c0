"""A Llama whose attention is a mixture too: groups of heads are experts, and a token uses the top-k of them.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

This file is complete: it needs torch and transformers (>= 5) alone.  After Attention-MoE of LLaMA-MoE v2 (Qu et al.
2411.15708): the query heads of one or more key/value heads are an expert.  Keys and values are computed for every
token, since later tokens may choose any group; a token's output is the sum of the chosen groups' outputs, weighted by
the softmax over their logits times `attention_scale`.  With all groups chosen, a router of zeros and a scale of as many
as there are groups, every weight is one: that is the dense model.  The mlp is dense, or a mixture as in Mixtral.

    num_attention_experts, num_attention_experts_per_tok    groups of heads, and how many of them a token uses
    num_local_experts, num_experts_per_tok                  experts of the mlp (0: it is dense), and how many are used
    rotary_base, rotary_scaling                             {} or {"rope_type": "linear" or "llama3", ...}
"""

# mypy: ignore-errors
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class AttentionMoeConfig(PreTrainedConfig):
    model_type = "attention_moe"

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        hidden_act="silu",
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        attention_bias=False,
        rotary_base=10000.0,
        rotary_scaling=None,
        num_attention_experts=8,
        num_attention_experts_per_tok=8,
        attention_scale=8.0,
        num_local_experts=0,
        num_experts_per_tok=0,
        use_cache=True,
        initializer_range=0.02,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling or {}
        self.num_attention_experts = num_attention_experts
        self.num_attention_experts_per_tok = num_attention_experts_per_tok
        self.attention_scale = attention_scale
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


def speeds(config, device):
    """Angles per position of every pair [head_dim / 2]."""
    width, scaling = config.head_dim, config.rotary_scaling
    speed = config.rotary_base ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return speed / scaling["factor"]
    if kind == "llama3":  # long waves are stretched, short ones are not, in between is blended
        old, wave = scaling["original_max_position_embeddings"], 2 * math.pi / speed
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        mix = ((old / wave - low) / (high - low)).clamp(0, 1)
        return (1 - mix) * speed / scaling["factor"] + mix * speed
    if kind != "default":
        raise ValueError(f"rotary_scaling of type {kind!r} is not known")
    return speed


def turned(x, angle):
    """Turn the first half of every head [batch, heads, length, width] against the second by [batch, length, half]."""
    a, b = x.chunk(2, -1)
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in (angle.cos(), angle.sin()))
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Query heads in `num_attention_experts` groups of neighbours, of which the router chooses some per token."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        h, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(h, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=False)
        self.router = nn.Linear(h, config.num_attention_experts, bias=False)

    def weights(self, x):
        """Of every group [batch, length, groups]: zero for those that are not chosen."""
        logits = self.router(x).float()
        best = logits.topk(self.config.num_attention_experts_per_tok, -1)
        share = best.values.softmax(-1) * self.config.attention_scale
        return torch.zeros_like(logits).scatter(-1, best.indices, share)

    def forward(self, x, angle, mask, cache):
        c = self.config
        q, k, v = (
            p(x).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turned(q, angle), turned(k, angle)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (t.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        y = y.unflatten(2, (c.num_attention_experts, -1)) * self.weights(x).to(x.dtype)[..., None, None]
        return self.o_proj(y.flatten(2))


ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.act = ACTS[config.hidden_act]
        self.gate_proj, self.up_proj = nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)
        self.down_proj = nn.Linear(f, h, bias=False)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.act = ACTS[config.hidden_act]
        self.w1, self.w3 = nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)
        self.w2 = nn.Linear(f, h, bias=False)

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """Experts as in Mixtral: softmax over the chosen logits."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_local_experts)])

    def forward(self, x):
        rows = x.flatten(0, -2)
        best = self.gate(rows).float().topk(self.top_k, -1)
        share, out = best.values.softmax(-1).to(x.dtype), torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, place = (best.indices == e).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, expert(rows[token]) * share[token, place, None])
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        name, kind = ("block_sparse_moe", Mixture) if config.num_local_experts else ("mlp", Mlp)
        self.add_module(name, kind(config))
        self.feed = name

    def forward(self, x, angle, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), angle, mask, cache)
        return x + getattr(self, self.feed)(self.post_attention_layernorm(x))


class AttentionMoePreTrainedModel(PreTrainedModel):
    config_class = AttentionMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012  transformers wants a list
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)


class AttentionMoeModel(AttentionMoePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None,
    ):  # fmt: skip
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        here = torch.arange(before, before + x.shape[1], device=x.device)
        if position_ids is None:
            position_ids = here[None]
        mask = here[:, None] >= torch.arange(before + x.shape[1], device=x.device)[None]
        mask = mask[None, None]
        if attention_mask is not None:
            seen = attention_mask[:, None, None, : mask.shape[-1]].bool()
            mask = (mask & seen) | torch.eye(mask.shape[-1], device=x.device, dtype=torch.bool)[here][None, None]
        angle = position_ids.float()[..., None] * speeds(self.config, x.device)
        for layer in self.layers:
            x = layer(x, angle, mask, past_key_values)
        return self.norm(x), past_key_values


class AttentionMoeForCausalLM(AttentionMoePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers wants a dict

    def __init__(self, config):
        super().__init__(config)
        self.model = AttentionMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        use_cache = self.config.use_cache if use_cache is None else use_cache
        hidden, cache = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
