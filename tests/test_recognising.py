"""`surgery inspect` answers for whatever lies at a path, and no advice of it leads in a circle."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from surgery import describe as describe_any
from surgery import open_checkpoint
from surgery.cli.main import main
from surgery.errors import FileError
from surgery.formats.registry import known
from surgery.recognising import describe
from surgery.recognising.files import FILES
from surgery.recognising.folders import FOLDERS, WEAK

ONE = {"model.norm.weight": torch.ones(3)}
CONFIG = '{"model_type": "llama", "hidden_size": 8}'


def write(root: Path, files: dict[str, object]) -> Path:
    """Files by relative names: bytes, text, or tensors (of torch.save, or of safetensors by their name)."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict) and name.endswith(".safetensors"):
            save_file(content, path)
        elif isinstance(content, dict):
            torch.save(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    return root


def dcp(root: Path) -> Path:
    import torch.distributed.checkpoint as library

    library.save({"model": ONE}, checkpoint_id=root, no_dist=True)
    return root


ADAPTER = {"adapter_config.json": '{"peft_type": "LORA", "r": 4, "base_model_name_or_path": "some/base"}'}
LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 8)}
STATE = "mp_rank_00_model_states.pt"
# kind -> the files, and words that the answer must hold
FOLDER_CASES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "empty": ({}, ("an empty folder",)),
    "lora": ({**ADAPTER, "adapter_model.safetensors": LORA}, ("rank 4", "some/base", "surgery soup", "lora_A")),
    "lora-config": (ADAPTER, ("adapter_model.safetensors is missing",)),
    "zero3": ({"config.json": CONFIG, "latest": "global_step5",
               f"global_step5/zero_pp_rank_0_{STATE}": {"module": {}}}, ("ZeRO-3", "zero_to_fp32", "llama")),
    "zero": ({"config.json": CONFIG, f"global_step5/{STATE}": {"module": ONE, "ds_version": "0.14"}},
             ("ZeRO-1", "zero_to_fp32", "module.model.norm.weight", "ds_version")),
    "verl": ({"model_world_size_1_rank_0.pt": ONE, "huggingface/config.json": CONFIG}, ("model_merger", "llama")),
    "fsdp-local": ({"pytorch_model_fsdp_rank0.bin": ONE}, ("FSDP", "full state dict")),
    "torchtune": ({"config.json": CONFIG, "hf_model_0001_0.pt": ONE}, ("torchtune", "pytorch_model.bin")),
    "litgpt": ({"lit_model.pth": ONE, "model_config.yaml": "name: x"}, ("LitGPT", "litgpt convert_from_litgpt")),
    "nemo": ({"model_config.yaml": "a: 1", "model_weights.ckpt": ONE}, ("NeMo",)),
    "nemo2": ({"context/model.yaml": "a: 1", "weights/x.distcp": b"1"}, ("NeMo 2", "export_ckpt")),
    "orbax": ({"manifest.ocdbt": b"x"}, ("Orbax",)),
    "tensorflow": ({"config.json": CONFIG, "tf_model.h5": b"\x89HDF"}, ("TensorFlow", "from_tf=True")),
    "flax": ({"config.json": CONFIG, "flax_model.msgpack": b"x"}, ("Flax", "from_flax=True")),
    "trainer-state": ({"trainer_state.json": "{}"}, ("without weights",)),
    "mistral": ({"params.json": "{}", "consolidated.safetensors": ONE}, ("Mistral", "model.norm.weight")),
    "meta-no-weights": ({"params.json": "{}"}, ("consolidated.00.pth",)),
    "meta-no-config": ({"consolidated.00.pth": ONE}, ("params.json is missing",)),
    "index-without-shards": ({"model.safetensors.index.json": "{}"}, ("shards",)),
    "shards-missing": ({"config.json": CONFIG, "model-00002-of-00003.safetensors": ONE},
                       ("llama", "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors", "missing")),
    "diffusers": ({"model_index.json": "{}"}, ("diffusers",)),
    "gguf": ({"m-Q4.gguf": b"GGUF" + bytes(20)}, ("llama.cpp", "m-Q4.gguf")),
    "onnx": ({"model.onnx": b"x"}, ("ONNX",)),
    "openvino": ({"openvino_model.xml": "x"}, ("OpenVINO",)),
    "weights-no-config": ({"model.safetensors": ONE}, ("config.json is missing", "model.norm.weight")),
    "config-no-weights": ({"config.json": CONFIG}, ("llama", "model.safetensors", "is missing")),
    "torch-files": ({"ckpt.pt": ONE}, ("names of no format", "model.norm.weight")),
    "hub-entry": ({"snapshots/a/x": "", "refs/main": "a"}, ("cache of the Hugging Face hub",)),
    "hub-cache": ({"models--a--b/refs/main": "a"}, ("cache of the Hugging Face hub",)),
    "run": ({"run.json": "{}", "metrics.jsonl": ""}, ("surgery report",)),
    "run-checkpoint": ({"trainer.json": "{}", "MANIFEST.json": '{"step": 39}', "shard-00001-x.safetensors": ONE},
                       ("every: 39}", "its command, repeated")),
    "plan": ({"plan.json": "{}"}, ("surgery data show",)),
    "tokens": ({"a.bin": b"12", "a.idx": b"MMIDIDX\0\0"}, ("surgery data inspect",)),
    "dataset": ({"dataset_info.json": "{}"}, ("surgery data tokenize",)),
    "text": ({"a.jsonl": "{}"}, ("surgery data tokenize",)),
    "tokenizer": ({"tokenizer.json": "{}"}, ("tokenizer without a model",)),
    "documents": ({"README.md": "hello", "LICENSE": "MIT"}, ("documents only", "hf download")),
    "code": ({"pyproject.toml": "", "src/a.py": ""}, ("source code",)),
    "unknown-folder": ({"a.xyz": b"1", "b/c.xyz": b"2"}, ("nothing that surgery knows", "a.xyz")),
}  # fmt: skip
FILE_CASES: dict[str, tuple[str, object, tuple[str, ...]]] = {
    "safetensors": ("one.safetensors", ONE, ("model.norm.weight", "model.safetensors", "config.json")),
    "torch": ("one.pt", {"model": ONE, "step": 7}, ("model.model.norm.weight", "step: 7", "pytorch_model.bin")),
    "lora-weights": ("a.safetensors", LORA, ("LoRA", "adapter_config.json")),
    "gguf": ("m.gguf", b"GGUF\3\0\0\0" + (9).to_bytes(8, "little") + (24).to_bytes(8, "little"),
             ("GGUF", "9", "gguf_file=m.gguf")),
    "numpy": ("ids.npy", None, ("<i4 (3, 5)", "surgery data inspect")),
    "tokens": ("ids.ds", b"\1\0\2\0\xff\xff", ("surgery data inspect",)),
    "token-index": ("a.idx", b"MMIDIDX\0\0" + bytes(9), ("surgery data inspect",)),
    "text": ("essay.txt", "Four score", ("a text file", "surgery data tokenize")),
    "jsonl": ("a.jsonl", '{"text": "x"}', ("surgery data tokenize",)),
    "yaml": ("merge.yaml", "merge_method: linear", ("merge_method", "surgery soup")),
    "config": ("config.json", CONFIG, ("model_type", "surgery inspect")),
    "index": ("model.safetensors.index.json", '{"weight_map": {"a": "x", "b": "x"}}', ("2 tensors in 1 shards",)),
    "git-lfs": ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
    "html": ("model.safetensors", "<!DOCTYPE html>", ("download",)),
    "nemo": ("m.nemo", b"x" * 300, ("tar -xf",)),
    "empty-file": ("model.bin", b"", ("an empty file",)),
    "unknown": ("x.xyz", b"\xff\xfe\0\1" * 9, ("does not know", "xff")),
    "python": ("train.py", "print()", ("never run",)),
}  # fmt: skip


def inspect(path: Path | str, *more: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["inspect", str(path), *more])
    assert done.exit_code in (0, 1) and (done.exception is None or isinstance(done.exception, SystemExit)), done.output
    return done.exit_code, done.output


@pytest.mark.parametrize("kind", FOLDER_CASES)
def test_folders(kind: str, tmp_path: Path) -> None:
    files, words = FOLDER_CASES[kind]
    folder = write(tmp_path / "x", files)
    status, text = inspect(folder)
    assert status == 0
    assert describe(folder, known).kind == kind
    for word in words:
        assert word in " ".join(text.split()), text
    assert json.loads(inspect(folder, "--json")[1])["kind"] == kind


def test_every_kind_of_folder_has_a_case() -> None:
    special = {"fsdp", "dcp", "unfinished"}  # below
    assert {k.name for k in (*FOLDERS, *WEAK)} - special == FOLDER_CASES.keys() - {"unknown-folder"}


def test_sharded_trainers_and_unfinished_outputs(tmp_path: Path) -> None:
    dcp(tmp_path / "step")
    text = inspect(tmp_path / "step")[1]
    assert "model.model.norm.weight" in text and "dcp_to_torch" in text
    write(tmp_path / "fsdp", {"config.json": CONFIG})
    dcp(tmp_path / "fsdp/pytorch_model_fsdp_0")
    assert describe(tmp_path / "fsdp").kind == "fsdp" and "accelerate merge-weights" in inspect(tmp_path / "fsdp")[1]
    assert describe(tmp_path / "fsdp").contents.tensors == {"model.model.norm.weight": ("float32", (3,))}
    (tmp_path / ".out.surgery-partial").mkdir()
    write(tmp_path / ".out.surgery-partial", {"journal": "x"})
    assert describe(tmp_path / ".out.surgery-partial").kind == "unfinished"


@pytest.mark.parametrize("kind", FILE_CASES)
def test_files(kind: str, tmp_path: Path) -> None:
    name, content, words = FILE_CASES[kind]
    if content is None:
        np.save(tmp_path / name, np.zeros((3, 5), np.int32))
    else:
        write(tmp_path, {name: content})
    status, text = inspect(tmp_path / name)
    assert status == 0 and describe(tmp_path / name).kind == kind
    for word in words:
        assert word in " ".join(text.split()), text


def test_the_docs_name_every_kind() -> None:
    page = (Path(__file__).parent.parent / "docs/inspect.md").read_text()
    for kind in (*FOLDERS, *WEAK, *FILES):
        assert f"`{kind.name}`" in page, kind.name


def test_from_python(tiny_hf, tmp_path: Path) -> None:
    assert describe_any(tiny_hf("llama")).kind == "checkpoint" and "hf" in describe_any(tiny_hf("llama")).what
    assert describe_any(write(tmp_path / "x", FOLDER_CASES["gguf"][0])).kind == "gguf"
    with pytest.raises(FileError):
        describe_any(tmp_path / "none")


def test_names_in_the_pickle_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, {"rng.pt": {"args": os.path.join, "step": 5}})
    text = inspect(tmp_path / "rng.pt", "--pickles")[1]
    assert "posixpath.join" in text and "args" in text


def test_damaged_files_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": ONE})
    data = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(data[:-2])
    status, text = inspect(tmp_path / "one.safetensors")
    assert status == 1 and "a safetensors file, damaged" in text and "outside the file" in text and "error:" in text


def test_a_part_of_a_checkpoint_and_a_parent_of_some(tiny_hf, tmp_path: Path) -> None:
    for seed in ("seed-1", "seed-2"):
        shutil.copytree(tiny_hf("llama"), tmp_path / "runs" / "hf" / seed)
    text = inspect(tmp_path / "runs/hf/seed-1/model.safetensors")[1]
    assert "part of a checkpoint (hf)" in text and f"next: surgery inspect {tmp_path}/runs/hf/seed-1" in text
    for parent in (tmp_path / "runs/hf", tmp_path / "runs"):
        text = " ".join(inspect(parent)[1].split())
        assert "a folder of 2 checkpoints" in text and "seed-1 (hf)" in text
    write(tmp_path / "trainer/checkpoint-5", {f"global_step5/{STATE}": {"module": ONE}})
    assert "checkpoint-5 (zero)" in inspect(tmp_path / "trainer")[1]


def test_a_checkpoint_that_cannot_be_read_is_described_all_the_same(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": '{"model_type": "quantum"}', "model.safetensors": ONE})
    status, text = inspect(tmp_path)
    assert status == 1 and "error:" in text and "quantum" in text and "model.norm.weight" in text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("ftp://x.org/model", ("ftp://x.org/model: is an address of a kind that is not read", "copy it", "s3://")),
        ("org/name-7b", ("hf download org/name-7b",)),
        ("modle", ("did you mean model?",)),
        ("none/of/this", ("does not exist",)),
        ("dangling", ("a link to something that does not exist",)),
        ("", ("an empty path",)),
    ],
)
def test_paths_that_are_not_there(path: str, words: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "model", {"README.md": ""})
    (tmp_path / "dangling").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)
    status, text = inspect(path)
    assert status == 1
    for word in words:
        assert word in text


def test_names_in_the_cache_of_the_hub_are_found_by_every_command(tiny_hf, tmp_path: Path, monkeypatch) -> None:
    entry = tmp_path / "models--acme--tiny"
    shutil.copytree(tiny_hf("llama"), entry / "snapshots/abc")
    write(entry, {"refs/main": "abc"})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "llama" in inspect("acme/tiny")[1]
    done = CliRunner().invoke(main, ["convert", "acme/tiny", str(tmp_path / "out"), "--to", "meta"])
    assert done.exit_code == 0, done.output
    assert CliRunner().invoke(main, ["verify", "acme/tiny", str(tmp_path / "out")]).exit_code == 0


@pytest.mark.parametrize("kind", [*FOLDER_CASES, *FILE_CASES])
def test_advice_never_goes_in_a_circle(kind: str, tmp_path: Path) -> None:
    """Whatever `next` says to inspect is there, and does not send one back."""
    if kind in FOLDER_CASES:
        path = write(tmp_path / "x", FOLDER_CASES[kind][0])
    else:
        name, content, _ = FILE_CASES[kind]
        path = write(tmp_path, {name: content or b"\x93NUMPY"}) / name
    seen = {path}
    for _ in range(4):
        steps = [m[1] for s in describe(path, known).next if (m := re.fullmatch(r"surgery inspect (\S+)", s))]
        if not steps:
            return
        path = Path(shlex.split(steps[0])[0])
        assert path.exists() and path not in seen
        seen.add(path)
    raise AssertionError(seen)


def test_the_advice_for_an_adapter_works(tiny_hf, tmp_path: Path) -> None:
    model = tiny_hf("llama")
    wide = load_file(model / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].shape
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(model)}  # fmt: skip
    write(tmp_path / "lora", {"adapter_config.json": json.dumps(config), "adapter_model.safetensors": {
        name.format("A"): torch.ones(2, wide[1]), name.format("B"): torch.ones(wide[0], 2)}})  # fmt: skip
    advice = describe(tmp_path / "lora").next[0]
    (tmp_path / "merge.yaml").write_text(advice[advice.index("`") + 1 : advice.rindex("`")])
    done = CliRunner().invoke(main, ["soup", str(tmp_path / "merge.yaml"), str(tmp_path / "out"), "--to", "hf"])
    assert done.exit_code == 0, done.output
    assert not same(tmp_path / "out", model)


# ------------------------------------------------------------------------------- names around the model's

WRAPPED = {
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled in ddp": lambda name: f"module._orig_mod.{name}",
    "fsdp": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", f"_fsdp_wrapped_module.{name}"),
    "checkpointed": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", name),
    "peft": lambda name: f"base_model.model.{name}",
    "trl": lambda name: f"pretrained_model.{name}",
    "lightning": lambda name: f"state_dict.model.{name}",
    "no head": lambda name: name.removeprefix("model."),
}


def same(folder: Path, other: Path) -> bool:
    a, b = open_checkpoint(folder).parts, open_checkpoint(other).parts
    return a.keys() == b.keys() and all(torch.equal(a[name].full(), b[name].full()) for name in a)


@pytest.mark.parametrize("way", WRAPPED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_wrapped_names_are_the_same_model(way: str, family: str, tiny_hf, tmp_path: Path) -> None:
    if way == "no head" and family == "gpt_neox":
        rename = lambda name: name.removeprefix("gpt_neox.")  # noqa: E731
    else:
        rename = WRAPPED[way]
    shutil.copytree(tiny_hf(family), tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    save_file({rename(name): t for name, t in tensors.items()}, tmp_path / "m/model.safetensors")
    assert same(tmp_path / "m", tiny_hf(family))
    assert any("are not those of a bare model" in note for note in open_checkpoint(tmp_path / "m").notes)


def test_nested_dictionaries(tiny_hf, tmp_path: Path) -> None:
    shutil.copytree(tiny_hf("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save({"model": tensors, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "step": 4},
               tmp_path / "m/pytorch_model.bin")  # fmt: skip
    assert same(tmp_path / "m", tiny_hf("llama"))
    assert any("optimizer" in name for name in open_checkpoint(tmp_path / "m").ignored)


def test_two_names_that_mean_one_are_refused(tiny_hf, tmp_path: Path) -> None:
    shutil.copytree(tiny_hf("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    save_file(tensors | {f"_orig_mod.{n}": t + 1 for n, t in tensors.items()}, tmp_path / "m/model.safetensors")
    assert inspect(tmp_path / "m")[0] == 1 and "both mean" in inspect(tmp_path / "m")[1]


def test_shards_without_an_index(tiny_hf, tmp_path: Path) -> None:
    shutil.copytree(tiny_hf("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    (tmp_path / "m/model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({n: tensors[n] for n in part}, tmp_path / f"m/model-0000{i}-of-00002.safetensors")
    assert same(tmp_path / "m", tiny_hf("llama"))
    assert "have no index" in inspect(tmp_path / "m")[1]
    (tmp_path / "m/model-00002-of-00002.safetensors").unlink()
    text = inspect(tmp_path / "m")[1]
    assert "model-00002-of-00002.safetensors" in text and "missing" in text
