"""Kinds of single files, by how they begin and how their names end; the first that fits is taken.

Some can be read (safetensors, torch.save): their tensors are shown.  Of the others the next step is said.
"""

from __future__ import annotations

from surgery.recognising import facts
from surgery.recognising.kind import Kind

FOLDER = "surgery inspect {parent}"
DATA = "surgery data inspect {path}"
TOKENIZE = "surgery data tokenize {path} tokens --tokenizer MODEL"
UNPACK = "unpack it, and give what was in it"
WRAP = "put it into a folder as {proper}, with the config.json of its model: then surgery reads it"
GGUF = (
    "surgery reads no GGUF: take the safetensors that it was made of; if there are none, transformers' "
    "from_pretrained(FOLDER, gguf_file={name}) and save_pretrained write some, as exact as the quantisation left them",
)

FILES = (
    Kind("git-lfs", "a pointer of git-lfs, not the file itself", magic=b"version https://git-lfs",
         next=("cd {parent} && git lfs pull",)),
    Kind("gguf", "a GGUF file, as llama.cpp reads it", magic=b"GGUF", facts=facts.gguf, next=GGUF),
    Kind("ggml", "a file of llama.cpp before GGUF", magic=b"tjgg", next=GGUF),
    Kind("numpy", "an array of NumPy", magic=b"\x93NUMPY", facts=facts.npy, next=(DATA,)),
    Kind("token-index", "the index of a token file of Megatron", magic=b"MMIDIDX\0\0", next=(DATA,)),
    Kind("parquet", "a table of Parquet", magic=b"PAR1", facts=facts.size, next=(TOKENIZE,)),
    Kind("arrow", "a table of Arrow", magic=b"ARROW1", facts=facts.size, next=("surgery data tokenize {parent} tokens "
         "--tokenizer MODEL",)),
    Kind("hdf5", "an HDF5 file, as Keras and TensorFlow write weights", magic=b"\x89HDF", facts=facts.size,
         next=("transformers 4 (from_pretrained with from_tf=True, then save_pretrained) writes safetensors",)),
    Kind("jsonl-gzip", "text, compressed by gzip", magic=b"\x1f\x8b", ends=(".jsonl.gz", ".json.gz", ".txt.gz"),
         facts=facts.size, next=(TOKENIZE,)),
    Kind("jsonl-zstd", "text, compressed by zstd", magic=b"\x28\xb5\x2f\xfd", ends=(".jsonl.zst", ".json.zst"),
         facts=facts.size, next=(TOKENIZE,)),
    Kind("gzip", "compressed by gzip", magic=b"\x1f\x8b", facts=facts.size, next=(UNPACK,)),
    Kind("bzip2", "compressed by bzip2", magic=b"BZh", facts=facts.size, next=(UNPACK,)),
    Kind("xz", "compressed by xz", magic=b"\xfd7zXZ\0", facts=facts.size, next=(UNPACK,)),
    Kind("zstd", "compressed by zstd", magic=b"\x28\xb5\x2f\xfd", facts=facts.size, next=(UNPACK,)),
    Kind("7z", "a 7z archive", magic=b"7z\xbc\xaf\x27\x1c", facts=facts.size, next=(UNPACK,)),
    Kind("rar", "a RAR archive", magic=b"Rar!", facts=facts.size, next=(UNPACK,)),
    Kind("nemo", "a checkpoint of NeMo, one tar archive", ends=(".nemo",), facts=facts.size,
         next=("mkdir nemo && tar -xf {path} -C nemo && surgery inspect nemo",)),
    Kind("tar", "a tar archive", magic=b"ustar", at=257, facts=facts.size,
         next=("mkdir unpacked && tar -xf {path} -C unpacked && surgery inspect unpacked",)),
    Kind("npz", "arrays of NumPy in a zip archive", magic=b"PK\3\4", ends=(".npz",), facts=facts.size,
         next=("of recorded batches: surgery data show {path} --step 0",)),
    Kind("onnx", "an ONNX graph", ends=(".onnx",), facts=facts.size, next=("take the model it was exported from",)),
    Kind("tensorflow", "a graph or checkpoint of TensorFlow", ends=(".pb", ".ckpt.index", ".tflite"), facts=facts.size,
         next=("take the model in safetensors, or load and save it with transformers 4 (from_tf=True)",)),
    Kind("flax", "weights of Flax", ends=(".msgpack",), facts=facts.size,
         next=("transformers 4 (from_pretrained with from_flax=True, then save_pretrained) writes safetensors",)),
    Kind("html", "a web page: a failed download", magic=b"<", ends=(".html", ".bin", ".safetensors", ".pt", ".pth"),
         next=("download the file itself; of a hub: hf download NAME",)),
    Kind("tokenizer", "a tokenizer", facts=facts.size,
         ends=("tokenizer.json", "tokenizer_config.json", "tokenizer.model", ".tiktoken", "tekken.json"),
         next=("surgery convert MODEL OUT --to hf --tokenizer {path}",)),
    Kind("index", "the index of a sharded checkpoint", ends=(".index.json",), facts=facts.whole_index, next=(FOLDER,)),
    Kind("config", "a config of a model; the checkpoint is its folder", ends=("config.json", "params.json"),
         facts=facts.recipe, next=(FOLDER,)),
    Kind("jsonl", "text, one JSON object a line", ends=(".jsonl",), facts=facts.size, next=(TOKENIZE,)),
    Kind("yaml", "a YAML file", ends=(".yaml", ".yml"), facts=facts.recipe, next=(
         "merge_method: surgery soup {path} OUT", "sources and budget: surgery data plan {path}",
         "model, data and output: surgery midtrain {path}")),
    Kind("python", "a program in Python, which is never run", ends=(".py",), facts=facts.size),
    Kind("json", "a JSON file", magic=b"{", facts=facts.recipe),
)  # fmt: skip
# by content, when nothing above fits
SAFETENSORS = Kind("safetensors", "a safetensors file", next=(WRAP,))
TORCH = Kind("torch", "a file of torch.save", next=(WRAP,))
ADAPTER = Kind("lora-weights", "the weights of a LoRA adapter", next=(
    "the adapter is its folder, with adapter_config.json: surgery inspect {parent}",))  # fmt: skip
TOKENS = Kind("tokens", "a token file", facts=facts.size, next=(DATA,))
TEXT = Kind("text", "a text file", facts=facts.size, next=(TOKENIZE,))
EMPTY = Kind("empty-file", "an empty file", next=("copy or download it again",))
UNKNOWN = Kind("unknown", "a file of a kind that surgery does not know", facts=facts.size)
