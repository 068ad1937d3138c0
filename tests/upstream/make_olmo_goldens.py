"""Small checkpoints in every layout of OLMo, written by ai2-olmo itself, with the logits that it computes.

    .cache/upstream/ai2-olmo/bin/python tests/upstream/make_olmo_goldens.py FOLDER

Two gloo ranks on the CPU train nothing: they build a model, wrap it as OLMo does (FSDP by block), and save it with
OLMo's own checkpointers.  The model is one whose sizes all differ; random norms and biases show in the logits.
The guard of the `local` checkpointer against newer torch releases is the only thing that is changed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from olmo import checkpoint as saving
from olmo.config import ModelConfig, ShardedCheckpointerType, TrainConfig
from olmo.model import OLMo
from olmo.safetensors_util import state_dict_to_safetensors_file
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel as DDP

COMMON = {
    "d_model": 24, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 80, "activation_type": "swiglu", "rope": True,
    "rope_theta": 20000, "include_bias": False, "bias_for_layer_norm": False, "max_sequence_length": 32,
    "vocab_size": 60, "embedding_size": 64, "weight_tying": False, "eos_token_id": 59, "pad_token_id": 1,
    "init_device": "cpu", "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
    "flash_attention": False,
}  # fmt: skip
OLMO2 = {**COMMON, "n_kv_heads": 2, "layer_norm_type": "rms", "layer_norm_eps": 1e-6, "attention_layer_norm": True,
         "norm_after": True}  # fmt: skip
MODELS = {
    "olmo2": OLMO2,
    "olmo1-groups": {**COMMON, "n_layers": 4, "n_kv_heads": 2, "block_group_size": 2, "layer_norm_with_affine": False,
                     "clip_qkv": 1.5},
    "llama-block": {**COMMON, "block_type": "llama", "layer_norm_type": "rms", "multi_query_attention": True},
    "learned-positions": {**COMMON, "rope": False, "activation_type": "gelu", "bias_for_layer_norm": True,
                          "weight_tying": True},
}  # fmt: skip
SHARDED = {
    "torch_new": saving.TorchNewStyleShardedCheckpointer,
    "torch_legacy": saving.TorchLegacyShardedCheckpointer,
    "local": saving.LocalShardedCheckpointer,
    "olmo_core": saving.OlmoCoreCheckpointer,
}


def build(name: str) -> OLMo:
    model = OLMo(ModelConfig(**MODELS[name]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def expected(model: OLMo, folder: Path) -> None:
    ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(ids).logits.float()
    save_file({"input_ids": ids, "logits": logits.contiguous()}, folder / "expected.safetensors")


def handles(self: object, module: FSDP) -> list:  # without the check of torch's version
    return [module._handle] if getattr(module, "_handle", None) is not None else []


def rank_main(rank: int, world: int, store: str, name: str, layout: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    saving.LocalShardedCheckpointer._fsdp_handles = handles
    model = build(name)
    config = TrainConfig(run_name="golden", model=ModelConfig(**MODELS[name]))
    if layout == "ddp":
        wrapped, checkpointer = DDP(model), saving.FullCheckpointer(config)
    else:
        policy = model.get_fsdp_wrap_policy("by_block")
        wrapped = FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
        checkpointer = SHARDED.get(layout, saving.FullCheckpointer)(config)
        if layout in SHARDED:
            config.sharded_checkpointer = ShardedCheckpointerType(layout)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)  # no state, so that the files stay small
    checkpointer.save_checkpoint(out, wrapped, optimizer, {"epoch": 0, "global_step": 3})
    dist.barrier()
    dist.destroy_process_group()


def make(folder: Path, case: str, name: str, layout: str, world: int) -> None:
    home = folder / case
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as tmp:
        mp.spawn(rank_main, (world, f"{tmp}/store", name, layout, str(home / "checkpoint")), nprocs=world)
    expected(build(name), home)
    print(case, sum(p.stat().st_size for p in home.rglob("*") if p.is_file()))


def main() -> None:
    folder = Path(sys.argv[1])
    for name in MODELS:
        make(folder, name, name, "fsdp" if name.startswith("olmo") else "ddp", 1)
    for layout in SHARDED:
        make(folder, f"olmo2-{layout}", "olmo2", layout, 2)
    source, home = folder / "olmo2" / "checkpoint", folder / "olmo2-safetensors" / "checkpoint"
    shutil.rmtree(home.parent, ignore_errors=True)
    home.mkdir(parents=True)
    shutil.copy(source / "config.yaml", home)
    state_dict_to_safetensors_file(torch.load(source / "model.pt", weights_only=True), home / "model.safetensors")
    optimizer = {"param_groups": [{"lr": 0.1}], "state": {}}
    state_dict_to_safetensors_file(optimizer, home / "optim.safetensors")
    shutil.copy(folder / "olmo2" / "expected.safetensors", home.parent)
    print(json.dumps(sorted(p.name for p in folder.iterdir())))


if __name__ == "__main__":
    main()
