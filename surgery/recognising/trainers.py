"""Kinds of folders that programs write which train and save models, and what turns each into one that surgery reads.

Sources: deepspeed/utils/zero_to_fp32.py, accelerate/utils/fsdp_utils.py, verl/model_merger, litgpt/scripts,
torchtune/training/checkpointing, nemo/collections/llm, torch/distributed/checkpoint/format_utils.py.
"""

from __future__ import annotations

from surgery.recognising import facts
from surgery.recognising.kind import Kind

CONFIG = "then put the config.json of the {family} beside it: cp MODEL/config.json OUT/"
ZERO = "python -m deepspeed.utils.zero_to_fp32 {path} OUT --safe_serialization"
_STATES = "mp_rank_*_model_states.pt"

TRAINERS = (
    Kind("zero3", "a checkpoint of DeepSpeed ZeRO-3: every rank holds a slice of all weights",
         has=("zero_pp_rank_*_" + _STATES + "|global_step*/zero_pp_rank_*_" + _STATES,), facts=facts.family,
         next=(ZERO, CONFIG)),
    Kind("zero", "a checkpoint of DeepSpeed ZeRO-1 or ZeRO-2: whole weights, and slices of the optimizer's fp32 ones",
         has=(f"{_STATES}|global_step*/{_STATES}",), facts=facts.family,
         weights=(_STATES, f"global_step*/{_STATES}"), next=(ZERO, CONFIG)),
    Kind("fsdp", "a sharded checkpoint of FSDP, as accelerate and transformers' Trainer write it (DCP)",
         has=("pytorch_model_fsdp_*/.metadata",), facts=facts.family, weights=("pytorch_model_fsdp_*/.metadata",),
         next=("accelerate merge-weights {path}/pytorch_model_fsdp_0 OUT", CONFIG)),
    Kind("verl", "a checkpoint of verl: FSDP shards, one of each rank", has=("model_world_size_*_rank_*.pt",),
         facts=facts.family, weights=("model_world_size_*_rank_0.pt",),
         next=("python -m verl.model_merger merge --backend fsdp --local_dir {path} --target_dir OUT",)),
    Kind("fsdp-local", "FSDP shards of single ranks", has=("pytorch_model*_rank*.bin|pytorch_model*_rank*.pt",),
         facts=facts.family, next=("load it with the program that wrote it and save a full state dict; "
                                   "shards of single ranks do not say how they fit together",)),
    Kind("torchtune", "a checkpoint of torchtune", has=("hf_model_*.pt|meta_model_*.pt|recipe_state.pt",
         ), weights=("hf_model_*.pt", "meta_model_*.pt"), facts=facts.family,
         next=("hf_model_*.pt has Hugging Face's names: one file is read as pytorch_model.bin beside config.json",
               "several: convert them with torchtune's FullModelHFCheckpointer (safe_serialization: True)")),
    Kind("litgpt", "a checkpoint of LitGPT", has=("lit_model.pth",), facts=facts.family, weights=("lit_model.pth",),
         next=("litgpt convert_from_litgpt {path} OUT", "mv OUT/model.pth OUT/pytorch_model.bin", CONFIG)),
    Kind("nemo", "an unpacked checkpoint of NeMo", has=("model_config.yaml", "model_weights/|model_weights.ckpt"),
         next=("NeMo's convert_*_nemo_to_hf.py writes one for transformers",)),
    Kind("nemo2", "a checkpoint of NeMo 2", has=("context/", "weights/"),
         next=("in Python: nemo.collections.llm.export_ckpt(path=..., target='hf', output_path=...)",)),
    Kind("dcp", "a checkpoint of torch.distributed.checkpoint (DCP), as torchtitan and others write it",
         has=(".metadata", "*.distcp"), weights=(".metadata",),
         next=("mkdir OUT && python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} "
               "OUT/pytorch_model.bin", CONFIG)),
    Kind("orbax", "a checkpoint of Orbax (JAX, MaxText)", has=("_CHECKPOINT_METADATA|manifest.ocdbt|*/manifest.ocdbt",),
         next=("MaxText's llama_or_mistral_orbax_to_huggingface.py, or the program that trained it, exports it",)),
    Kind("tensorflow", "a model of TensorFlow",
         has=("saved_model.pb|*.ckpt.index|model.ckpt-*.index|tf_model.h5|tf_model-*.h5",), facts=facts.family,
         next=("take the model in safetensors, or load and save it with transformers 4 (from_tf=True)",)),
    Kind("flax", "a model of Flax", has=("flax_model.msgpack|flax_model-*.msgpack",), facts=facts.family,
         next=("take the model in safetensors, or load and save it with transformers 4 (from_flax=True)",)),
    Kind("trainer-state", "the state of a trainer without weights", has=("trainer_state.json|optimizer.pt",),
         lacks=("*.safetensors", "*.bin"), next=("the weights lie elsewhere, or were not saved",)),
)  # fmt: skip
