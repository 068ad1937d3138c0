"""Model cards: what the records say, and nothing that they could inject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from surgery.storage.card import card

RECORD: dict[str, Any] = {
    "surgery": "0.2", "command": ["surgery", "upcycle", "/home/me/models/SmolLM2", "./out/moe", "--experts", "8"],
    "source": {"path": "/home/me/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/abc",
               "format": "hf"},
    "output": {"format": "hf"}, "source_digest": "aa11", "content_digest": "bb22", "verified": True,
    "parameters": 918840, "dropped": {"x.y": "why"}, "notes": ["tokenizer of /home/me/models/SmolLM2"],
    "versions": {"python": "3.11"}, "upcycling": {"strategy": "copy", "experts": 8, "top_k": 2},
    "proof": {"verdict": "exact", "promised": True, "tokens": 256, "text": "random tokens", "dtype": "bf16",
              "fp32": {"max_diff": 0.5, "kl": 0.25, "perplexity": 13.5, "reference_perplexity": 13.25}},
}  # fmt: skip
YAML = "merge_method: linear\nmodels:\n- model: /home/me/run-1\n  parameters: {weight: 1}\n- model: org/name\n"


def made(folder: Path, record: Any, soup: Any = None) -> tuple[dict[str, Any], str]:
    (folder / "surgery.json").write_text(json.dumps(record))
    if soup is not None:
        (folder / "soup.json").write_text(json.dumps(soup))
    text = card(folder, "moe")
    assert text is not None
    _, front, body = text.decode().split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_says_what_it_is_where_it_comes_from_and_its_proof(tmp_path: Path) -> None:
    front, body = made(tmp_path, RECORD)
    assert front == {"base_model": ["HuggingFaceTB/SmolLM2-135M"], "library_name": "transformers",
                     "tags": ["moe", "checkpoint-surgery"]}  # fmt: skip
    for said in ("918.8k parameters", "8 experts, 2 of them active", "`aa11`", "`bb22`", "256 tokens", "exact, which",
                 "| in fp32 | 0.5 | 0.25 | 13.5 | 13.25 |", "surgery upcycle SmolLM2 moe --experts 8"):  # fmt: skip
        assert said in body, said
    assert "/home" not in body


def test_a_card_of_a_merge_has_its_yaml(tmp_path: Path) -> None:
    models = {"/home/me/run-1": {"path": "/home/me/run-1"}, "org/name": {"path": "/c/models--org--name/snapshots/ab"}}
    soup = {"method": "linear", "config": YAML, "models": models}
    front, body = made(tmp_path, {k: v for k, v in RECORD.items() if k not in ("upcycling", "proof")}, soup)
    assert front["tags"][:2] == ["mergekit", "merge"] and front["base_model"] == ["org/name"]
    block = body.split("```yaml\n")[1].split("\n```")[0]
    expected = yaml.safe_load(YAML)
    expected["models"][0]["model"] = "run-1"
    assert yaml.safe_load(block) == expected
    assert "merged from 2 models" in body and "## Proof" not in body


def test_nothing_of_a_record_breaks_out(tmp_path: Path) -> None:
    evil = "x`|\n---\nlicense: mit\n# [a](http://evil) <script>\x1b[2J ```"
    record = dict.fromkeys(RECORD, evil) | {"notes": [evil], "source": {"path": evil}, "output": {"format": evil},
              "upcycling": {"strategy": evil}, "proof": {"verdict": evil, "fp32": {"kl": evil}}}  # fmt: skip
    front, body = made(tmp_path, record, {"config": evil + "\n````\n# out", "models": {evil: {"path": evil}}})
    assert set(front) == {"tags"}
    fence = "`" * 5
    outside = "".join(body.split(fence)[::2])
    assert "\x1b" not in body and body.count(fence) == 2
    assert "\n---" not in outside and "\n# [a]" not in outside and "license" not in front
    unquoted = "".join(line for line in outside.splitlines() if "`" not in line.replace("\\`", ""))
    assert "<script>" not in unquoted.replace("\\<script", "")


def test_odd_records_make_short_cards_or_none(tmp_path: Path) -> None:
    record = {"content_digest": 7, **dict.fromkeys(("source", "notes", "command", "proof"), 7)}
    assert "# moe" in made(tmp_path, record)[1]
    for text in ("[]", "{", '{"source": 7}'):
        (tmp_path / "surgery.json").write_text(text)
        assert card(tmp_path, "moe") is None


def test_a_readme_that_is_there_stays_and_other_folders_have_none(tmp_path: Path) -> None:
    assert card(tmp_path, "moe") is None
    (tmp_path / "surgery.json").write_text(json.dumps(RECORD))
    (tmp_path / "README.md").write_text("mine")
    assert card(tmp_path, "moe") is None
