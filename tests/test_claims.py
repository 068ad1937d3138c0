"""Numbers that files claim: held against what lies there before anything of that size is made."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from surgery.containers import open_file
from surgery.containers.text import parse_json
from surgery.errors import ConfigError, FileError, SurgeryError
from surgery.formats.megatron.config import read_args, write_args
from surgery.formats.registry import open_checkpoint
from surgery.model.spec import Spec
from surgery.tokenizer import sentencepiece, tiktoken
from surgery.tokenizer.files import read_json
from tests import oracle, tiny
from tests.test_unknown import hf, meta, olmo_core

SECONDS = 20.0  # of CPU, on any machine, with making the files; without the limits minutes, and gigabytes


@pytest.fixture(autouse=True)
def quick():
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("layers", [10**9, 15_000])
@pytest.mark.parametrize("family", ["mistral", "qwen3_moe", "ernie4_5_moe", "olmo3", "gpt2"])
def test_layers(family, layers, tiny_hf, tmp_path):
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    with pytest.raises(SurgeryError):
        open_checkpoint(hf(tiny_hf(family), tmp_path / "source", **{key: layers, "layer_types": None}))


@pytest.mark.parametrize("experts", [10**9, 60_000])
@pytest.mark.parametrize(
    ("family", "key"),
    [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts"), ("glm4_moe", "n_routed_experts")],
)
def test_experts(family, key, experts, tiny_hf, tmp_path):
    also = {name: None for name in ("num_experts", "num_local_experts") if name != key}
    with pytest.raises(ConfigError, match="experts"):
        open_checkpoint(hf(tiny_hf(family), tmp_path / "source", **also, **{key: experts}))


@pytest.mark.slow
def test_other_formats(tmp_path):
    for i, layers in enumerate((10**9, 16_000)):
        with pytest.raises(ConfigError, match=f"{layers}"):
            open_checkpoint(meta(tmp_path / f"meta{i}", n_layers=layers))
        source = olmo_core(tmp_path / f"core{i}")
        config = json.loads((source / "config.json").read_text())
        config["model"]["n_layers"] = layers
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=f"{layers}"):
            open_checkpoint(source)
    spec = open_checkpoint(oracle.GOLDEN / "megatron" / "d_moemix_legacy_tp1" / "checkpoint").spec
    for claim in ({"num_layers": 10**9}, {"num_experts": 10**9}):
        with pytest.raises(ConfigError, match="1000000000"):
            read_args({**write_args(spec), **claim}, "x", spec.vocab)


def test_parts_are_counted_without_naming_them():
    spec = Spec("m", layers=3, width=8, vocab=16, kv_heads=2, group=1, head_dim=4, ffn=4, experts=5, expert_ffn=2,
                moe_layers=(1, 2), top_k=1)  # fmt: skip
    assert spec.part_count() == len([*spec.part_names()])


def test_lists_of_json():
    with pytest.raises(FileError, match="over the limit"):
        parse_json(b"[" + b"[]," * 600_000 + b"0]", "x")
    assert len(parse_json(b"[" + b"0," * 400_000 + b"0]", "x")) == 400_001


def header(path, entries, more=None):
    text = json.dumps({**entries, **({"__metadata__": more} if more else {})}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.mark.slow
def test_tensors_and_metadata_of_a_header(tmp_path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    with pytest.raises(FileError, match="over the limit"):
        open_file(header(tmp_path / "many", {f"t{i}": empty for i in range(900_000)}))
    with pytest.raises(FileError, match="over the limit"):
        open_file(header(tmp_path / "told", {"t": empty}, {str(i): "" for i in range(600_000)}))


@pytest.mark.slow
def test_tokens(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"model": {"vocab": {"a": [' + b"0," * 3_100_000 + b"0]}}}")
    with pytest.raises(FileError, match="over the limit"):
        read_json(path)
    (tmp_path / "ranks").write_bytes(b"YQ== 0\n" * 1_100_000)
    with pytest.raises(FileError, match="more than 1000000 ranks"):
        tiktoken.read(tmp_path / "ranks")
    with pytest.raises(ValueError, match="more than"):
        sentencepiece.parse(b"\x0a\x00" * 1_000_001)


def test_what_is_large_and_true_is_read(tmp_path):
    """Many layers are fine where the tensors are there."""
    source = tiny.save("llama", tmp_path / "deep", l=200, h=24, g=2, n=2, half=3, f=8, v=32)
    assert open_checkpoint(source).spec.layers == 200
    shutil.rmtree(source)
