"""Makes tests/golden/optimizer/megatron-{buckets,gathered,reshardable,flat,plain}-*: states by megatron-core itself.

    .cache/upstream/megatron-core/bin/python tests/upstream/make_megatron_optimizer_goldens.py OUT [CASE ...]

Two updates of a distributed optimizer by gradients that depend on name and place alone, saved on gloo ranks in three
ways by `dist_checkpointing`, or in legacy files: tp 2 and pp 2 (in small buckets, but for `fully_reshardable`: core
0.16.1 writes that wrongly where buckets are padded; tied, with an embedding of no round size), stages of one and of two
layers, virtual ones, and experts on two ranks.  The cases -mixed, to be named, have a stage without experts: their Adam
is one of our own, for with torch's core 0.16.1 saves no optimizer without parameters.  Calls for a GPU mean the CPU.
"""

from __future__ import annotations

import math
import sys
import tempfile
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from fused_adam import stand_in

if any(name.endswith("-mixed") for name in sys.argv[2:]):
    stand_in()  # Megatron asks for Apex when it is imported
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils

ARGS: dict = dict(  # noqa: C408
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, group_query_attention=True,
    num_query_groups=2, kv_channels=4, normalization="RMSNorm", norm_epsilon=1e-5, swiglu=True, add_bias_linear=False,
    add_qkv_bias=False, qk_layernorm=False, position_embedding_type="rope", rotary_base=10000, rotary_percent=1.0,
    rotary_interleaved=False, use_rope_scaling=False, rope_scaling_factor=8.0, untie_embeddings_and_output_weights=True,
    vocab_size=63, padded_vocab_size=64, make_vocab_size_divisible_by=32, max_position_embeddings=64, seq_length=64,
    num_experts=None, moe_router_topk=2, moe_ffn_hidden_size=20, moe_layer_freq=1,
    moe_shared_expert_intermediate_size=None, moe_router_pre_softmax=False, moe_grouped_gemm=False,
    moe_use_legacy_grouped_gemm=False, virtual_pipeline_model_parallel_size=None, transformer_impl="local",
    use_legacy_models=False, bf16=True, consumed_train_samples=4, iteration=2, ckpt_fully_parallel_save=True,
    use_distributed_optimizer=True, ckpt_format="torch_dist",
)  # fmt: skip
SPARSE = {**ARGS, "num_experts": 2, "num_layers": 1}
STAGED = {**SPARSE, "num_layers": 2, "moe_layer_freq": [0, 1], "ckpt_format": "torch"}
UNEVEN = {**ARGS, "num_layers": 3, "decoder_first_pipeline_num_layers": 1}
VIRTUAL = {**ARGS, "num_layers": 4, "virtual_pipeline_model_parallel_size": 2}
TIED = {**ARGS, "untie_embeddings_and_output_weights": False, "vocab_size": 61, "padded_vocab_size": 62,
        "make_vocab_size_divisible_by": 31, "ckpt_format": "torch"}  # fmt: skip
DENSE = (2, 2, 1)  # tp, pp, ep
STAGES = (1, 2, 1)
EXPERTS = (1, 1, 2)
# name: how it is saved, the args, the sizes, how many elements close a bucket
CASES = {
    "megatron-buckets": ("dp_reshardable", ARGS, DENSE, 700),
    "megatron-gathered": ("dp_zero_gather_scatter", ARGS, DENSE, 700),
    "megatron-buckets-uneven": ("dp_reshardable", UNEVEN, STAGES, 700),
    "megatron-reshardable": ("fully_reshardable", ARGS, DENSE, None),
    "megatron-buckets-experts": ("dp_reshardable", SPARSE, EXPERTS, None),
    "megatron-reshardable-experts": ("fully_reshardable", SPARSE, EXPERTS, None),
    "megatron-buckets-virtual": ("dp_reshardable", VIRTUAL, STAGES, 700),
    "megatron-flat-virtual": ("legacy", {**VIRTUAL, "ckpt_format": "torch"}, STAGES, None),
    "megatron-flat-tied": ("legacy", TIED, DENSE, None),
    "megatron-flat-experts": ("legacy", {**SPARSE, "ckpt_format": "torch"}, EXPERTS, None),
    "megatron-flat-mixed": ("legacy", STAGED, (1, 2, 2), None),
    "megatron-plain-mixed": ("legacy", {**STAGED, "use_distributed_optimizer": False}, (1, 2, 2), None),
}


def on_the_cpu() -> None:
    moe_utils.te_general_gemm = None
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = torch.cuda.Stream = lambda *_, **__: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    for name in ("zeros", "empty", "tensor"):
        setattr(torch, name, without_device(getattr(torch, name)))
    kind = torch.Tensor.type
    torch.Tensor.type = lambda self, *a: kind(self, *a) if a else kind(self).replace("torch.", "torch.cuda.")


def without_device(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *a, **k: make(*a, **{key: "cpu" if key == "device" else v for key, v in k.items()})


def build(a: dict, sizes: tuple[int, int, int], chunk: int | None) -> GPTModel:
    """A stage of the model, or one chunk of a virtual pipeline's."""
    tp, pp, ep = sizes
    experts = {"num_moe_experts": a["num_experts"], "moe_ffn_hidden_size": a["moe_ffn_hidden_size"],
               "moe_layer_freq": a["moe_layer_freq"], "moe_router_topk": 2,
               "moe_token_dispatcher_type": "alltoall"}  # fmt: skip
    sparse = experts if a["num_experts"] else {}
    config = TransformerConfig(
        num_layers=a["num_layers"], hidden_size=a["hidden_size"], ffn_hidden_size=a["ffn_hidden_size"],
        num_attention_heads=4, num_query_groups=2, kv_channels=4, normalization="RMSNorm", layernorm_epsilon=1e-5,
        add_bias_linear=False, gated_linear_unit=True, activation_func=F.silu, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, expert_model_parallel_size=ep, pipeline_dtype=torch.bfloat16,
        num_layers_in_first_pipeline_stage=a.get("decoder_first_pipeline_num_layers"), bf16=True,
        use_cpu_initialization=True, bias_activation_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False, bias_dropout_fusion=False,
        virtual_pipeline_model_parallel_size=a["virtual_pipeline_model_parallel_size"], params_dtype=torch.bfloat16,
        **sparse,
    )  # fmt: skip
    spec = (get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm") if sparse
            else get_gpt_layer_local_spec(normalization="RMSNorm"))  # fmt: skip
    ends = {"ignore_virtual": chunk is None, "vp_stage": chunk}
    return GPTModel(
        config, spec, vocab_size=a["padded_vocab_size"], max_sequence_length=64, position_embedding_type="rope",
        share_embeddings_and_output_weights=not a["untie_embeddings_and_output_weights"],
        pre_process=parallel_state.is_pipeline_first_stage(**ends), vp_stage=chunk,
        post_process=parallel_state.is_pipeline_last_stage(**ends),
    ).bfloat16()  # fmt: skip


def drawn(name: str, parameter: torch.nn.Parameter, turn: int) -> torch.Tensor:
    """Numbers that differ everywhere but among replicas."""
    tp = parallel_state.get_tensor_model_parallel_rank() if getattr(parameter, "tensor_model_parallel", False) else 0
    pp = parallel_state.get_pipeline_model_parallel_rank()
    ep = parallel_state.get_expert_model_parallel_rank() if ".experts." in name else 0
    if getattr(parameter, "shared_embedding", False):  # of the first and the last stage
        name, pp = "shared", 0
    seed = zlib.crc32(repr((name, turn, tp, pp, ep)).encode())
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))


def rank_main(rank: int, world: int, store: str, out: Path, name: str) -> None:
    kind, a, (tp, pp, ep), bucket = CASES[name]
    on_the_cpu()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    virtual = a["virtual_pipeline_model_parallel_size"]
    parallel_state.initialize_model_parallel(tp, pp, virtual, expert_model_parallel_size=ep)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    models = [build(a, (tp, pp, ep), v if virtual else None) for v in range(virtual or 1)]
    named = [(f"{v or ''}{n}", p) for v, model in enumerate(models) for n, p in model.named_parameters()]
    with torch.no_grad():
        for n, p in named:
            p.copy_(drawn(n, p, 0) * 0.1 + ("norm" in n))
    distributed = a["use_distributed_optimizer"]
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=bucket is not None,
                                        use_distributed_optimizer=distributed, bucket_size=bucket)  # fmt: skip
    wrapped = [DistributedDataParallel(m.config, ddp, m, disable_bucketing=m is not models[0]) for m in models]
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.1, adam_beta2=0.95, bf16=True, clip_grad=0.0,
        params_dtype=torch.bfloat16, use_distributed_optimizer=distributed,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, wrapped)
    for group in optimizer.param_groups:
        group["weight_decay"] *= group["wd_mult"]  # as Megatron's scheduler does before each update
    for turn in (1, 2):
        for n, p in named:
            p.main_grad.copy_(drawn(n, p, turn) * 0.01)
        optimizer.step()
    args = Namespace(**a, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep,
                     expert_tensor_parallel_size=tp, world_size=world, data_parallel_size=world // (tp * pp),
                     overlap_grad_reduce=bucket is not None, ddp_bucket_size=bucket)  # fmt: skip
    common = {"args": args, "iteration": 2, "checkpoint_version": 3.0}
    where = out / name / "iter_0000002"
    where.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    if kind == "legacy":
        save_legacy(where, models, optimizer, common, (pp, ep))
    else:
        save_sharded(where, models, optimizer, common, kind)
    (out / name / "latest_checkpointed_iteration.txt").write_text("2")
    dist.barrier()
    dist.destroy_process_group()


def by_chunk(state: Callable[[GPTModel], dict], models: list[GPTModel]) -> dict:
    if len(models) == 1:
        return {"model": state(models[0])}
    return {f"model{i}": state(model) for i, model in enumerate(models)}


def save_sharded(where: Path, models: list[GPTModel], optimizer: MegatronOptimizer, common: dict, kind: str) -> None:
    about = {"distrib_optim_sharding_type": kind, "singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    weights = by_chunk(lambda model: model.sharded_state_dict(metadata=about), models)
    state = {**weights, "optimizer": optimizer.sharded_state_dict(weights, metadata=about), **common,
             "content_metadata": about}  # fmt: skip
    dist_checkpointing.save(state, str(where))


def save_legacy(
    where: Path, models: list[GPTModel], optimizer: MegatronOptimizer, common: dict, sizes: tuple[int, int]
) -> None:
    """As pretrain_gpt.py saves, whose own code is not in the package: every rank here is the first of its copies."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    ranks = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank())
    folder = where / "_".join([name, *(f"{rank:03d}" for rank, n in zip(ranks, sizes, strict=True) if n > 1)])
    folder.mkdir(exist_ok=True)
    weights = by_chunk(lambda model: model.state_dict_for_save_checkpoint(), models)
    torch.save({**weights, "optimizer": optimizer.state_dict(), **common}, folder / "model_optim_rng.pt")
    if common["args"].use_distributed_optimizer:
        optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))


if __name__ == "__main__":
    for case in sys.argv[2:] or [name for name in CASES if not name.endswith("-mixed")]:
        with tempfile.TemporaryDirectory() as folder:
            world = math.prod(CASES[case][2])
            mp.spawn(rank_main, (world, f"{folder}/store", Path(sys.argv[1]), case), nprocs=world)
