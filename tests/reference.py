"""A plain transformer that computes logits from a checkpoint's parts and Spec: the oracle of tables and configs.

It knows the anatomy alone and shares no code with any format, so that a mistake in a table (k for v, halves for
pairs, gate for up) or in a config (another rope base) shows as other logits than the upstream program's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from surgery.formats.base import Checkpoint
from surgery.model.spec import Rope, Spec

ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """[batch, length, vocabulary] in fp32."""
    weights = {name: part.full().float() for name, part in checkpoint.parts.items()}
    return _Model(checkpoint.spec, weights).run(ids.long())


class _Model:
    def __init__(self, spec: Spec, weights: Mapping[str, torch.Tensor]) -> None:
        self.spec, self.w = spec, weights

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, self.w["embed"]) * self.spec.embed_scale
        if "positions" in self.w:
            x = x + self.w["positions"][: ids.shape[1]]
        for layer in range(self.spec.layers):
            x = self.layer(layer, x)
        x = self.norm(x, "final_norm")
        return x @ self.w["embed" if self.spec.tied else "lm_head"].T / self.spec.logits_divisor

    def layer(self, i: int, x: torch.Tensor) -> torch.Tensor:
        at, s = f"layers.{i}.", self.spec
        attended = self.attention(i, self.norm(x, at + "attn_norm") if s.norm_at == "pre" else x)
        if s.norm_at == "post":
            attended = self.norm(attended, at + "attn_post_norm")
        attended = attended * s.residual_scale
        y = x if s.parallel else x + attended
        fed = self.feed(i, self.norm(y, at + "mlp_norm") if s.norm_at == "pre" else y)
        if s.norm_at == "post":
            fed = self.norm(fed, at + "mlp_post_norm")
        return x + attended + fed * s.residual_scale

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        s, weight = self.spec, self.w.get(name)
        if s.norm == "rms":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s.norm_eps) * weight
        return F.layer_norm(x, x.shape[-1:], weight, self.w.get(name + ".bias"), s.norm_eps)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.w[name], self.w.get(name + ".bias"))

    def attention(self, i: int, x: torch.Tensor) -> torch.Tensor:
        s, at = self.spec, f"layers.{i}.attn."
        q, k, v = (self.linear(x, at + name) for name in "qkv")
        if s.qk_norm == "full":
            q, k = self.norm(q, at + "q_norm"), self.norm(k, at + "k_norm")
        if s.clip_qkv is not None:
            q, k, v = (t.clamp(-s.clip_qkv, s.clip_qkv) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, s.head_dim)).transpose(1, 2) for t in (q, k, v))
        if s.qk_norm == "head":
            q, k = self.norm(q, at + "q_head_norm"), self.norm(k, at + "k_head_norm")
        window = s.windows[i] if s.windows else 0
        rope = s.rope_local if window and s.rope_local is not None else s.rope
        if rope is not None:
            cos, sin = angles(rope, s.head_dim, x.shape[1], s.context)
            q, k = turn(q, cos, sin), turn(k, cos, sin)
        k, v = (t.repeat_interleave(s.group, 1) for t in (k, v))
        place = torch.arange(x.shape[1])
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & ((behind < window) if window else True)
        scale = 1 / math.sqrt(s.head_dim) if s.score_scale is None else s.score_scale
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
        return self.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2), at + "o")

    def feed(self, i: int, x: torch.Tensor) -> torch.Tensor:
        s, at = self.spec, f"layers.{i}."
        if not s.is_moe(i):
            return self.mlp(x, at + "mlp")
        scores = x @ self.w[at + "router"].T
        chances = scores.softmax(-1) if s.router_score == "softmax" else scores.sigmoid()
        chosen = (chances + self.w.get(at + "router.bias", 0.0)).topk(s.top_k, -1).indices
        weight = chances.gather(-1, chosen)
        if s.top_k_renormalised:
            weight = weight / weight.sum(-1, keepdim=True)
        gates = torch.zeros_like(chances).scatter(-1, chosen, weight * (s.router_scale or 1.0))
        out = sum(gates[..., e : e + 1] * self.mlp(x, f"{at}experts.{e}") for e in range(s.experts))
        if s.shared_ffn:
            gate = (x @ self.w[at + "shared_gate"].T).sigmoid() if s.shared_gate else 1.0
            out = out + gate * self.mlp(x, at + "shared")
        return out

    def mlp(self, x: torch.Tensor, at: str) -> torch.Tensor:
        act = ACTS[self.spec.act]
        up = self.linear(x, at + ".up")
        return self.linear(act(self.linear(x, at + ".gate")) * up if self.spec.glu else act(up), at + ".down")


def angles(rope: Rope, width: int, length: int, context: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, turned width / 2]."""
    turned = int(width * rope.fraction)
    speed = rope.base ** -(torch.arange(0, turned, 2, dtype=torch.float32) / turned)
    scaling, boost = dict(rope.scaling), 1.0
    if scaling.get("type") == "linear":
        speed = speed / scaling["factor"]
    elif scaling.get("type") == "llama3":
        old, wave = scaling["original_max_position_embeddings"], 2 * math.pi / speed
        low, high = old / scaling["low_freq_factor"], old / scaling["high_freq_factor"]
        mix = (old / wave - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
        slow = speed / scaling["factor"]
        speed = torch.where(wave > low, slow, torch.where(wave < high, speed, (1 - mix) * slow + mix * speed))
    elif scaling.get("type") == "yarn":
        speed, boost = _yarn(scaling, rope.base, speed)
    elif scaling.get("type") == "longrope":
        old = scaling["original_max_position_embeddings"]
        speed = speed / torch.tensor(scaling["long_factor" if length > old else "short_factor"])
        factor = scaling.get("factor") or (context or old) / old
        boost = scaling.get("attention_factor") or math.sqrt(1 + max(math.log(factor), 0.0) / math.log(old))
    elif scaling and not (scaling["type"] == "dynamic" and context and length <= context):  # until then nothing changes
        raise AssertionError(f"the reference does not know {scaling}")
    angle = torch.arange(length, dtype=torch.float32)[:, None] * speed
    return angle.cos() * boost, angle.sin() * boost


def _yarn(scaling: Mapping[str, Any], base: float, speed: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Fast pairs keep their speed, slow ones turn `factor` times slower, with a ramp between (arXiv 2309.00071)."""
    turns = scaling["original_max_position_embeddings"] * speed / (2 * math.pi)  # over the trained context
    pairs = len(speed)
    places = torch.arange(pairs, dtype=torch.float32)

    def place(rotations: float) -> float:  # which pair turns that often
        return pairs * math.log(turns[0].item() / rotations) / math.log(base)

    low, high = max(math.floor(place(scaling["beta_fast"])), 0), math.ceil(place(scaling["beta_slow"]))
    slow = ((places - low) / max(high - low, 0.001)).clamp(0, 1)
    return speed * (1 - slow) + speed / scaling["factor"] * slow, 0.1 * math.log(scaling["factor"]) + 1


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first half of (the turned part of) every head against the second."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
