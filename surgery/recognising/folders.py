"""Folders besides those of trainers: adapters, near misses, exports, data, caches.  The first that fits is taken.

Near misses name what is missing.
"""

from __future__ import annotations

from surgery.recognising import facts, files
from surgery.recognising.folder import Folder
from surgery.recognising.kind import Kind
from surgery.recognising.trainers import TRAINERS

_DOCS = ("*.md", "LICENSE*", "NOTICE*", ".git*", "*.txt", "*.png", "*.jpg", "*.pdf")
_CONFIGS = "config.json|params.json"


def _only_documents(folder: Folder) -> bool:
    return bool(folder.names) and not folder.folders and set(folder.files) == {
        name for pattern in _DOCS for name in folder.matching(pattern)
    }  # fmt: skip


def _unfinished(folder: Folder) -> bool:
    return folder.path.name.startswith(".") and folder.path.name.endswith(".surgery-partial")


LORA = Kind("lora", "a LoRA adapter", has=("adapter_config.json", "adapter_model.*"), facts=facts.adapter,
            weights=("adapter_model.safetensors", "adapter_model.bin"), next=(
                "add it to its model: surgery soup YAML OUT, with the YAML `{{merge_method: passthrough, "
                "models: [{{model: {base}+{path}}}]}}`",))  # fmt: skip
FOLDERS = (
    Kind("empty", "an empty folder", when=lambda folder: not folder.names),
    Kind("unfinished", "an output of surgery that is not finished", when=_unfinished,
         next=("run the command again that was stopped: it goes on from here; or remove the folder",)),
    Kind("run", "a run of surgery midtrain", has=("run.json", "metrics.jsonl|config.resolved.yaml"),
         next=("surgery report {path}", "surgery inspect {path}/export lists the models that it has written")),
    Kind("run-checkpoint", "a checkpoint of a run of surgery midtrain, which goes on from it",
         has=("trainer.json", "MANIFEST.json", "shard-*.safetensors"), facts=facts.run_checkpoint, next=(
             "its command, repeated with --set 'export={{to: hf, every: {step}}}', writes it as a model and goes on",)),
    LORA,
    Kind("lora-config", "the config of a LoRA adapter without its weights", has=("adapter_config.json",),
         facts=facts.adapter, next=("adapter_model.safetensors is missing: copy or download it",)),
    *TRAINERS,
    Kind("mistral", "a checkpoint in Mistral's own format", has=("params.json", "consolidated*.safetensors"),
         weights=("consolidated*.safetensors",), next=(
             "take the same model in Hugging Face's format (config.json, model-*.safetensors; most repositories hold "
             "both), or convert it with transformers' convert_mistral_weights_to_hf.py",)),
    Kind("meta-no-weights", "the config of a checkpoint in Meta's format without its weights", has=("params.json",),
         lacks=("consolidated.*.pth",), next=("consolidated.00.pth (and .01, ...) is missing: copy or download it",)),
    Kind("meta-no-config", "weights in Meta's format without their config", has=("consolidated.*.pth",),
         lacks=("params.json",), weights=("consolidated.*.pth",), next=("params.json is missing: copy it here",)),
    Kind("index-without-shards", "an index without the weights that it lists", has=("*.index.json",),
         lacks=("*.safetensors", "*.bin"), next=("copy or download the shards",)),
    Kind("shards-missing", "a part of the shards of a {family}", has=("*-*-of-*.safetensors|*-*-of-*.bin",),
         when=lambda folder: bool(facts.lost(folder.path)), facts=lambda path: {**facts.family(path), "missing":
         facts.lost(path)}, weights=("*-*-of-*.safetensors", "*-*-of-*.bin"),
         next=("copy or download what is missing, best with model.safetensors.index.json",)),
    Kind("diffusers", "a pipeline of diffusers, which generates images", has=("model_index.json",),
         next=("surgery reads language models",)),
    Kind("gguf", "files of llama.cpp (GGUF)", has=("*.gguf",), next=("surgery inspect {path}/{gguf}",),
         facts=lambda path: {"gguf": min(p.name for p in path.glob("*.gguf"))}),
    Kind("onnx", "an ONNX export", has=("*.onnx|onnx/",), lacks=("*.safetensors",),
         next=("take the model that it was exported from",)),
    Kind("openvino", "an OpenVINO export", has=("openvino_model.xml",), next=("take the model it was exported from",)),
    Kind("weights-no-config", "weights as Hugging Face stores them, without config.json",
         has=("model*.safetensors|pytorch_model*.bin",), lacks=("config.json",),
         weights=("model*.safetensors", "pytorch_model*.bin"),
         next=("config.json is missing: copy that of the model which it was trained from: cp MODEL/config.json "
               "{path}/",)),
    Kind("config-no-weights", "the config of a {family} without weights", has=("config.json",),
         lacks=("*.safetensors", "*.bin", "*.pt", "*.pth"), facts=facts.family, next=(
             "model.safetensors (or its shards with model.safetensors.index.json) is missing: copy it, or hf download "
             "NAME --local-dir {path}",)),
    Kind("torch-files", "files of torch or safetensors under names of no format that surgery knows",
         has=("*.safetensors|*.pt|*.pth|*.bin|*.ckpt",), lacks=("*.idx",), facts=facts.family,
         weights=("*.safetensors", "*.pt", "*.pth", "*.ckpt"),
         next=("with Hugging Face's names in it: call it model.safetensors (or pytorch_model.bin), beside config.json",
               "surgery inspect {path}/FILE lists what one file holds")),
    Kind("hub-entry", "a repository in the cache of the Hugging Face hub", has=("snapshots/", "refs/|blobs/"),
         next=("surgery inspect ORG/NAME finds it by its name",)),
    Kind("hub-cache", "the cache of the Hugging Face hub", has=("models--*/",),
         next=("surgery inspect ORG/NAME finds a model of it",)),
    Kind("plan", "a plan of data, as surgery data plan writes it", has=("plan.json",),
         next=("surgery data show {path} --step 0",)),
    Kind("tokens", "token files", has=("*.idx|tokens.json|*.npy|*.ds",), next=("surgery data inspect {path}",)),
    Kind("dataset", "a dataset of Hugging Face's datasets", has=("dataset_info.json|dataset_dict.json|state.json",),
         next=(files.TOKENIZE,)),
)  # fmt: skip
# what a folder may hold besides checkpoints further down, which come first
WEAK = (
    Kind("text", "text", has=("*.jsonl|*.jsonl.gz|*.jsonl.zst|*.parquet|*.txt.gz|*.json.gz",), next=(files.TOKENIZE,)),
    Kind("tokenizer", "a tokenizer without a model", has=("tokenizer.json|tokenizer.model|*.tiktoken|tekken.json",),
         next=("surgery convert MODEL OUT --to hf --tokenizer {path}",)),
    Kind("documents", "documents only", when=_only_documents, next=(
        "a model that was downloaded without its weights: hf download NAME --local-dir {path}",)),
    Kind("code", "source code", has=("pyproject.toml|setup.py|.git/|Makefile",)),
)  # fmt: skip
OTHER = Kind("unknown-folder", "a folder of nothing that surgery knows")
