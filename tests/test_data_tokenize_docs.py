"""docs/tokenize.md: its commands run in order, on a little text; what it says of dtypes is so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from backports import zstd
from click.testing import CliRunner

from surgery.cli.data import data_command
from tests.test_data_tokenize import GOLDEN, LINES, documents

PAGE = (Path(__file__).parent.parent / "docs" / "tokenize.md").read_text()
CHAT = json.loads((GOLDEN.parent / "chat" / "masks.json").read_text())


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Where a reader of the page would be."""
    (tmp_path / "docs" / "web").mkdir(parents=True)
    (tmp_path / "docs" / "web" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "more" / "x").mkdir(parents=True)
    (tmp_path / "more" / "x" / "b.jsonl.zst").write_bytes(zstd.compress(LINES))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in CHAT["conversations"]))
    for name in ("SmolLM2-135M", "SmolLM2-135M-Instruct"):
        (tmp_path / name).mkdir()
        shutil.copy(GOLDEN / "tokenizer.json", tmp_path / name)
        settings = {"eos_token": "<|endoftext|>", "chat_template": CHAT["chat_template"]}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)


def test_the_page(reader):
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    for line in lines:
        done = CliRunner().invoke(data_command, shlex.split(line, comments=True)[2:], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}: {done.output}"
    assert len(lines) == 5
    assert len(documents("tok/web")) == 2 * 115
    assert len(list(Path("olmo/web").glob("*.idx"))) == 1
    assert sum(Path("tok/chat/tokens.mask").read_bytes()) == sum(
        sum(c["assistant_mask"]) for c in CHAT["conversations"]
    )


def test_every_flag_is_on_the_page():
    said = set(re.findall(r"--[a-z-]+", PAGE))
    flags = {flag for p in data_command.commands["tokenize"].params for flag in p.opts if flag.startswith("--")}
    of_every_command = {"--sync", "--json", "--quiet", "--verbose", "--log-file"}
    missing = flags - said - of_every_command - {"--dtype", "--id-key", "--format"}
    assert missing == set()
