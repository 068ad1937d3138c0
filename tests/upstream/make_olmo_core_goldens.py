"""Small checkpoints of OLMo-core, written by its own `save_model_and_optim_state`, with the logits that it computes.

    .cache/upstream/ai2-olmo-core/bin/python tests/upstream/make_olmo_core_goldens.py FOLDER

All sizes differ; random norms and biases show in the logits.  Two gloo ranks shard one of the models with FSDP.  The
Triton kernels that permute tokens among experts do not run on a CPU: a plain torch sum stands in for them.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import olmo_core.ops.moe as moe_ops
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from olmo_core.data import TokenizerConfig
from olmo_core.distributed.checkpoint import save_model_and_optim_state
from olmo_core.nn.attention import AttentionConfig, AttentionType, SlidingWindowAttentionConfig
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.lm_head import LMHeadConfig
from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType
from olmo_core.nn.rope import RoPEConfig, RoPEType, StepwiseRoPEScalingConfig, YaRNRoPEScalingConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerBlockType, TransformerConfig, TransformerType
from olmo_core.optim import OptimGroupOverride, SkipStepAdamWConfig
from safetensors.torch import save_file

NORM = LayerNormConfig(name=LayerNormType.rms, eps=1e-6, bias=False)
D, V = 24, 64


class Kernels:
    """What olmo_core.kernels.moe computes, row by row."""

    @staticmethod
    def gather(x, indices, bin_ids, weights, bins, top_k):
        return x[indices.long() // top_k]

    @staticmethod
    def scatter(x, indices, bin_ids, weights, bins, top_k):
        out = torch.zeros(indices.numel(), x.shape[-1])
        out[indices.long()] = x * weights.reshape(-1)[indices.long()][:, None]
        return out.view(-1, top_k, x.shape[-1]).sum(1)

    @staticmethod
    def binned_gather(x, indices, weights, bins, capacity, top_k):
        out = torch.zeros(len(bins), capacity, x.shape[-1])
        for expert, chosen in enumerate(Kernels.split(indices, bins, capacity)):
            out[expert, : len(chosen)] = x[chosen // top_k]
        return out

    @staticmethod
    def binned_scatter(x, indices, weights, bins, top_k):
        out = torch.zeros(indices.numel(), x.shape[-1])
        for expert, chosen in enumerate(Kernels.split(indices, bins, x.shape[1])):
            out[chosen] = x[expert, : len(chosen)] * weights.reshape(-1)[chosen][:, None]
        return out.view(-1, top_k, x.shape[-1]).sum(1)

    @staticmethod
    def split(indices, bins, capacity):
        ends = [0, *bins.tolist()]
        return [indices[a:b][:capacity].long() for a, b in itertools.pairwise(ends)]


def block(name="reordered_norm", norm=NORM, bias=False, qk=True, moe=None, rope=None, kind="default", **more):
    attention = AttentionConfig(
        name=AttentionType(kind), n_heads=4, n_kv_heads=2, bias=bias, rope=rope or RoPEConfig(theta=20000),
        qk_norm=norm if qk else None, backend="torch", **more,
    )  # fmt: skip
    dense = None if moe else FeedForwardConfig(hidden_size=40, bias=bias)
    return TransformerBlockConfig(name=TransformerBlockType(name), sequence_mixer=attention, layer_norm=norm,
                                  feed_forward_moe=moe, feed_forward=dense)  # fmt: skip


def model(main, overrides=None, norm=NORM, layers=2, name="default", **more):
    return TransformerConfig(
        d_model=D, vocab_size=V, n_layers=layers, block=main, block_overrides=overrides,
        lm_head=LMHeadConfig(layer_norm=norm, bias=False), name=TransformerType(name), **more,
    )  # fmt: skip


def experts(kind, **router):
    return MoEConfig(
        name=MoEType(kind), num_experts=5, hidden_size=20, capacity_factor=None if kind == "dropless" else 5.0,
        router=MoERouterConfig(top_k=2, **router),
    )  # fmt: skip


def models():
    window = SlidingWindowAttentionConfig([5, -1, 5], force_full_attention_on_last_layer=True,
                                          force_full_attention_on_first_layer=False)  # fmt: skip
    yarn = RoPEConfig(theta=20000, scaling=YaRNRoPEScalingConfig(factor=8.0, old_context_len=16))
    complex_ = RoPEConfig(name=RoPEType.complex, theta=20000)
    steps = RoPEConfig(theta=20000, scaling=StepwiseRoPEScalingConfig(factor=8.0, old_context_len=64))
    layer = LayerNormConfig(name=LayerNormType.default, eps=1e-5, bias=True)
    return {
        "olmo2": model(block()),
        "olmo3-yarn": model(block(sliding_window=window), layers=4, overrides={
            1: block(sliding_window=window, rope=yarn), 3: block(sliding_window=window, rope=yarn)}),
        "complex-head-norm": model(block("default", rope=complex_, use_head_qk_norm=True, head_dim=10),
                                   tie_word_embeddings=True),
        "complex-full-norm": model(block(rope=complex_)),
        "biases-clip": model(block("default", layer, bias=True, qk=False, clip_qkv=0.9, rope=steps), norm=layer),
        "fused": model(block("default", qk=False, kind="fused_v2")),
        "flex-default": model(block("moe_reordered_norm", moe=experts("default", normalize_expert_weights=1.0)),
                              name="moe"),
        "dropless-mixed": model(block("moe", moe=experts("dropless", bias_gamma=0.01)),
                                overrides={0: block("default")}, name="moe"),
    }  # fmt: skip


def build(config):
    built = config.build(init_device="cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in sorted(built.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator)
            if "score_bias" in name:
                tensor.copy_(0.05 * noise)
            elif tensor.dim() == 1 and "router" not in name:
                tensor.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
            else:
                tensor.copy_(noise * 1.5 * (tensor.shape[-1] if tensor.dim() > 1 else D) ** -0.5)
        if config.tie_word_embeddings:
            built.lm_head.w_out.weight.copy_(built.embeddings.weight)
    return built.eval()


def save(folder: Path, config) -> None:
    save_model_and_optim_state(folder / "model_and_optim", build(config), thread_count=1)


def updated(model: torch.nn.Module, optimizer: torch.optim.Optimizer, turns: range) -> None:
    for turn in turns:
        ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(turn))
        logits = model(ids).float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        optimizer.latest_loss = torch.tensor(1.0)
        optimizer.step()
        optimizer.zero_grad()


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    """OLMo-core's default optimizer after two updates: all but the embedding decays."""
    spared = OptimGroupOverride(params=["embeddings.weight"], opts={"weight_decay": 0.0})
    optimizer = SkipStepAdamWConfig(lr=1e-3, weight_decay=0.1, group_overrides=[spared]).build(model)
    updated(model, optimizer, range(2))
    return optimizer


def rank_main(rank: int, world: int, store: str, folder: str, adam: bool = False) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    built = build(models()["olmo2"])
    built.apply_fsdp(dp_mesh=dist.init_device_mesh("cpu", (world,)))
    optimizer = trained(built) if adam else None
    save_model_and_optim_state(Path(folder) / "model_and_optim", built, optimizer, thread_count=1)
    dist.barrier()
    dist.destroy_process_group()


def finish(home: Path, config) -> None:
    tokenizer = TokenizerConfig(vocab_size=60, eos_token_id=59, pad_token_id=1)
    said = {"model": config.as_config_dict(), "dataset": {"tokenizer": tokenizer.as_config_dict(),
                                                          "sequence_length": 32}}  # fmt: skip
    (home / "checkpoint" / "config.json").write_text(json.dumps(said))
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = build(config)(ids).float()
    save_file({"input_ids": ids, "logits": logits.contiguous()}, home / "expected.safetensors")
    print(home.name, sum(p.stat().st_size for p in home.rglob("*") if p.is_file()), float(logits.std()))


def main() -> None:
    moe_ops.kernels = Kernels
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    for name, config in models().items():
        save(folder / name / "checkpoint", config)
        finish(folder / name, config)
    home = folder / "olmo2-fsdp"
    with tempfile.TemporaryDirectory() as tmp:
        mp.spawn(rank_main, (2, f"{tmp}/store", str(home / "checkpoint")), nprocs=2)
    finish(home, models()["olmo2"])
    home = folder / "adam-fsdp"
    with tempfile.TemporaryDirectory() as tmp:
        mp.spawn(rank_main, (2, f"{tmp}/store", str(home / "checkpoint"), True), nprocs=2)
    finish(home, models()["olmo2"])
    (home / "expected.safetensors").unlink()  # those logits are of the model before its updates


if __name__ == "__main__":
    main()
