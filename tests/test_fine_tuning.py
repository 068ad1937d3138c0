"""Conversations and preferences from files: docs/fine-tuning.md run as it stands, and what rows then hold."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from surgery.cli.main import main
from surgery.data.rows import IGNORE
from surgery.errors import ConfigError, SurgeryError
from surgery.midtraining.run_file import make_run
from surgery.midtraining.run_folder import METRICS
from surgery.midtraining.sources import open_batches
from tests.test_data_chat import CHAT, CONVERSATIONS

GOLDEN = Path(__file__).parent / "golden"
PAGE = (Path(__file__).parent.parent / "docs" / "fine-tuning.md").read_text()
TOKENIZER = GOLDEN / "tokenize" / "tokenizer.json"
SMALL = {"2048": "64", "batch: 64": "batch: 4", "batch: 32": "batch: 4", "2.0e-5": "3.0e-3", "5.0e-7": "1.0e-3"}
TURNS = [[m["content"] for m in c["messages"] if m["role"] != "system"] for c in CONVERSATIONS]


def write(path: str, entries: list[Any]) -> None:
    Path(path).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A model with a chat template, and files of each kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    shutil.copytree(GOLDEN / "training" / "trl_sft_llama_accum" / "init", "model")
    shutil.copy(TOKENIZER, "model")
    said = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "chat_template": CHAT["chat_template"]}
    Path("model/tokenizer_config.json").write_text(json.dumps(said))
    write("chat.jsonl", [{"messages": c["messages"], "id": i} for i, c in enumerate(CONVERSATIONS)])
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    spelt = [[{"from": names[m["role"]], "value": m["content"]} for m in c["messages"]] for c in CONVERSATIONS]
    hermes = [{"conversations": messages, "source": "made", "idx": None} for messages in spelt]
    Path("openhermes.json").write_text(json.dumps(hermes, indent=2))
    write("alpaca.jsonl", [{"instruction": a, "output": " " + b, "input": ""} for a, b, *_ in TURNS])
    write("pairs.jsonl", [{"prompt": a, "chosen": " " + b, "rejected": " dra dra"} for a, b, *_ in TURNS])


def batches(kind: str, **data: Any) -> Any:
    objective = "dpo" if kind == "dpo" else "tokens"
    return open_batches(make_run({"model": {"path": "model"}, "output": "out", "objective": objective,
                                  "data": {"kind": kind, "sequence_length": 96, "batch": 1, **data}}))  # fmt: skip


def documents(found: Any) -> dict[tuple[int, ...], list[int]]:
    """Every document of all rows, and which of its tokens are learnt."""
    out = {}
    for step in range(len(found)):
        rows = found.rows(step)
        for tokens, labels, places, padding in zip(rows.tokens, rows.labels, rows.positions, rows.padding, strict=True):
            cuts = [*np.flatnonzero(places == 0), len(tokens)]
            for a, b in pairwise(cuts):
                if not padding[a]:
                    learnt = [0, *(int(x != IGNORE) for x in labels[a : b - 1])]
                    out[tuple(tokens[a:b].tolist())] = learnt
    return out


def test_rows_hold_what_trl_makes_of_conversations(reader):
    """Token for token, and label for label, packed; in either spelling."""
    wanted = {tuple(c["input_ids"]): c["assistant_mask"] for c in CONVERSATIONS}
    for name, path in (("chat", "chat.jsonl"), ("hermes", "openhermes.json")):
        found = batches("sft", sources=[{"name": name, "paths": path}])
        rows = sum(len(found.rows(step)) for step in range(len(found)))
        assert documents(found) == wanted and rows < len(wanted)
        shutil.rmtree("out")


def test_data_of_fine_tuning_that_changed_are_made_anew_until_a_checkpoint_was_trained_on_them(reader):
    for kind, name in (("sft", "chat"), ("dpo", "pairs")):

        def rows(batch: int, kind: str = kind, name: str = name) -> int:
            return len(batches(kind, batch=batch, sources=[{"name": name, "paths": f"{name}.jsonl"}]).rows(0))

        assert [2 * rows(1), rows(2)] == [rows(2)] * 2
        Path("out/checkpoints/step000000004").mkdir(parents=True)
        rows(2)
        with pytest.raises(ConfigError, match="rows_per_step: 2 -> 1" if kind == "sft" else "batch: 2 -> 1"):
            rows(1)
        if kind == "dpo":
            Path("out/pairs.npz").unlink()
            assert rows(2) == 4, "they are made again as they were"
        Path(f"{name}.jsonl").unlink()
        assert rows(2) == 2 * (1 + (kind == "dpo")), "a run that goes on has its data"
        shutil.rmtree("out")


def test_pairs_of_which_nothing_is_told_are_made_anew(reader):
    """As where the command was killed between both files."""

    def rows(batch: int) -> int:
        return len(batches("dpo", batch=batch, sources=[{"name": "pairs", "paths": "pairs.jsonl"}]).rows(0))

    pairs = 2 * rows(1)
    Path("out/pairs.json").unlink()
    assert rows(2) == pairs


def test_no_turn_is_cut(reader):
    """Where rows are short, conversations end after an answer that is whole."""
    length = 30
    found = documents(batches("sft", sequence_length=length, sources=[{"name": "chat", "paths": "chat.jsonl"}]))
    whole = {tuple(c["input_ids"]): c["assistant_mask"] for c in CONVERSATIONS}
    shortened = 0
    for ids, learnt in found.items():
        assert len(ids) <= length
        [(full, mask)] = [(f, m) for f, m in whole.items() if f[: len(ids)] == ids]
        assert learnt == mask[: len(ids)]
        if ids != full:
            shortened += 1
            assert mask[len(ids) - 1] == 1 and mask[len(ids)] == 0
    assert 0 < shortened < len(found)
    plan = json.loads(Path("out/plan/plan.json").read_text())
    assert any("end after the last answer that fits" in note for note in plan["notes"])


def test_pairs_are_encoded_as_trl_does(reader):
    about = json.loads((GOLDEN / "training" / "trl_dpo_mixtral" / "about.json").read_text())
    texts = about["texts"]
    write("golden.jsonl", texts)
    found = batches("dpo", batch=len(texts), seed=3, sources=[{"name": "golden", "paths": "golden.jsonl"}]).rows(0)
    with np.load(GOLDEN / "training" / "trl_dpo_mixtral" / "batches.npz") as arrays:
        flat = [arrays[n].reshape(-1, arrays[n].shape[-1]) for n in ("input_ids", "attention_mask", "completion_mask")]
    rows = zip(*flat, strict=True)
    wanted = {(tuple(ids[seen == 1].tolist()), tuple(mask[seen == 1].tolist())) for ids, seen, mask in rows}
    ours = set()
    for tokens, labels, padding in zip(found.tokens, found.labels, found.padding, strict=True):
        n = int((~padding).sum())
        ours.add((tuple(tokens[:n].tolist()), (0, *(int(x != IGNORE) for x in labels[: n - 1]))))
    assert len(ours) == 2 * len(texts) and ours <= wanted


def test_pairs_of_messages_share_their_beginning(reader):
    asked = [{"role": role, "content": text} for role, text in (("user", "ka?"), ("assistant", "mi"), ("user", "el"))]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("zen dra", "lo"))
    forms = {
        "explicit": {"prompt": asked, "chosen": good, "rejected": bad},
        "implicit": {"chosen": asked + good, "rejected": asked + bad},
        "repeated": {"prompt": "el", "chosen": asked + good, "rejected": asked + bad},
    }
    told = []
    for name, entry in forms.items():
        write(f"{name}.jsonl", [entry])
        rows = batches("dpo", sources=[{"name": name, "paths": f"{name}.jsonl"}]).rows(0)
        told.append((rows.tokens.tolist(), rows.labels.tolist()))
        shutil.rmtree("out")
    assert told[0] == told[1] == told[2]
    text = [Tokenizer.from_file(str(TOKENIZER)).decode([x for x in labels if x != IGNORE], skip_special_tokens=False)
            for labels in told[0][1]]  # fmt: skip
    assert text[0].startswith(" zen dra") and text[1].startswith(" lo")


def test_what_is_wrong_is_said(reader):
    def told(error: type[SurgeryError] = SurgeryError, kind: str = "sft", **data: Any) -> str:
        with pytest.raises(error) as caught:
            batches(kind, **data)
        return str(caught.value)

    assert "instruction, output" in told(sources=[{"name": "a", "paths": "alpaca.jsonl"}])
    assert "kind: sft or kind: dpo" in told(ConfigError, kind="tokens", sources=[{"name": "a", "paths": "chat.jsonl"}])
    assert "hold no pair" in told(kind="dpo", sources=[{"name": "a", "paths": "alpaca.jsonl"}])
    assert "fewer than a batch" in told(kind="dpo", batch=1000, sources=[{"name": "a", "paths": "pairs.jsonl"}])
    write("bad.jsonl", [{"messages": [{"content": "x"}]}] * 20)
    assert "20 no conversation" in told(sources=[{"name": "a", "paths": "bad.jsonl"}])


@pytest.mark.slow
def test_the_page(reader):
    for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S):
        for old, new in SMALL.items():
            text = text.replace(old, new)
        Path(re.match(r"# (\S+)", text)[1]).write_text(text)
    for line in "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.S)).splitlines():
        done = CliRunner().invoke(main, shlex.split(line, comments=True)[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}: {done.output}"
        if line == "surgery midtrain sft.yaml":
            [made], dpo = Path("runs/sft/export").iterdir(), Path("dpo.yaml")
            dpo.write_text(re.sub(r"step\d{9}-hf", made.name, dpo.read_text()))
    losses = [json.loads(line)["loss"] for line in Path("runs/sft", METRICS).read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5
    steps = [json.loads(line) for line in Path("runs/dpo", METRICS).read_text().splitlines()]
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["rewards/margin"] > 0
