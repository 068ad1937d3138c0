"""Loads what surgery wrote with megatron-core: `GPTModel`, by its state dict or by `dist_checkpointing`.

    .cache/upstream/megatron-core/bin/python tests/upstream/load_megatron.py FOLDER ...

The model is built from the checkpoint's own `args`, as `--use-checkpoint-args` does (pretrain_gpt.py itself is not in
the package); the local layer spec, since Transformer Engine does not run on a CPU.  Gloo ranks: one per tensor-parallel
rank of a legacy checkpoint, two for torch_dist.  Rotary embeddings are moved to "the current CUDA device", which is the
CPU here.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from each import each
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils

moe_utils.te_general_gemm = None  # which the package forgets to define where Transformer Engine is absent
torch.cuda.current_device = lambda: torch.device("cpu")
FIELDS = """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
    layernorm_epsilon add_bias_linear add_qkv_bias qk_layernorm num_moe_experts moe_router_topk moe_ffn_hidden_size
    moe_router_pre_softmax moe_layer_freq""".split()


def build(args: Namespace, tp: int) -> GPTModel:
    values = {k: getattr(args, k) for k in FIELDS if getattr(args, k, None) is not None}
    if not args.group_query_attention:
        values.pop("num_query_groups", None)
    values["num_moe_experts"] = getattr(args, "num_experts", None)
    values["gated_linear_unit"] = bool(args.swiglu)
    values["activation_func"] = F.silu if args.swiglu else F.gelu
    fused = not args.swiglu and bool(args.bias_gelu_fusion)  # the tanh form of gelu
    config = TransformerConfig(
        **values, tensor_model_parallel_size=tp, use_cpu_initialization=True, bias_activation_fusion=fused,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False, persist_layer_norm=False,
        bias_dropout_fusion=False, hidden_dropout=0.0, attention_dropout=0.0, perform_initialization=False,
        moe_token_dispatcher_type="allgather", sequence_parallel=False,
    )  # fmt: skip
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=bool(args.qk_layernorm), normalization=args.normalization)
    return GPTModel(
        config, spec, vocab_size=args.padded_vocab_size, max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type, rotary_percent=getattr(args, "rotary_percent", 1.0),
        rotary_base=getattr(args, "rotary_base", 10000), rope_scaling=bool(getattr(args, "use_rope_scaling", False)),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights, parallel_output=False,
    ).eval()  # fmt: skip


def load(folder: Path, rank: int, tp: int) -> GPTModel:
    with torch.serialization.safe_globals([Namespace]):
        if (folder / ".metadata").is_file():
            args = torch.load(folder / "common.pt", weights_only=True)["args"]
            model = build(args, tp)
            wanted = model.sharded_state_dict()
            loaded = dist_checkpointing.load({"model": wanted}, str(folder), strict="assume_ok_unexpected")
            model.load_state_dict(loaded["model"])
            return model
        state = torch.load(folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", weights_only=True)
    model = build(state["args"], tp)
    model.load_state_dict(state["model"], strict=True)
    return model


def rank_main(rank: int, tp: int, store: str, folder: Path, tokens: torch.Tensor, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=tp)
    parallel_state.initialize_model_parallel(tp)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)  # no dropout, no CUDA generator
    model = load(folder, rank, tp)
    places = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    future = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(tokens, places, future).float()
    if rank == 0:
        torch.save(logits, out)
    dist.barrier()
    dist.destroy_process_group()


def computed(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    tracker = (checkpoint / "latest_checkpointed_iteration.txt").read_text().strip()
    folder = checkpoint / (tracker if tracker == "release" else f"iter_{int(tracker):07d}")
    tp = len(list(folder.glob("mp_rank_*"))) or 2
    with tempfile.TemporaryDirectory() as tmp:
        mp.spawn(rank_main, (tp, f"{tmp}/store", folder, ids, f"{tmp}/logits.pt"), nprocs=tp)
        return torch.load(f"{tmp}/logits.pt")


if __name__ == "__main__":
    each(computed)
