"""docs/midtrain.md, read as a script: its commands run in order, on a little text and a small model."""

from __future__ import annotations

import gzip
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.conversion.convert import convert
from surgery.formats.registry import open_checkpoint
from surgery.midtraining import launching
from surgery.midtraining.conventions import CONVENTIONS
from surgery.midtraining.run_folder import read_folder, read_soup
from surgery.midtraining.selftests import MOVED, TESTS
from tests import tiny

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "tests" / "golden" / "tokenize"
PAGE = (ROOT / "docs" / "midtrain.md").read_text()
SMALL = {"4096": "32", "50B": "7k", "4_194_304": "256", "every: 1000": "every: 20", "3.0e-5": "3.0e-3"}


@pytest.fixture
def reader(tmp_path, monkeypatch) -> None:
    """Where a reader of the page would be: a download of Meta's, and some text."""
    tiny.save("llama", tmp_path / "hf", l=2, h=48, f=40, v=640)
    shutil.copy(TEXT / "tokenizer.json", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    convert(tmp_path / "hf", tmp_path / "Llama-2-7b", to="meta", sync=False)
    for number, name in enumerate(("prose", "math")):
        (tmp_path / "text" / name).mkdir(parents=True)
        text = gzip.decompress((TEXT / "documents" / f"docs-0{number}.jsonl.gz").read_bytes())
        (tmp_path / "text" / name / "0.jsonl").write_bytes(text)
    monkeypatch.chdir(tmp_path)


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S)


@pytest.mark.slow
def test_the_page(reader, monkeypatch):
    """But for the line with --nproc, which starts the like in test_midtrain_ranks.py."""
    started = []
    monkeypatch.setattr(launching, "launch", lambda words, nproc: started.append((words, nproc)) or 0)
    for text in blocks("yaml"):
        name = re.match(r"# (\S+)", text)[1]
        for old, new in SMALL.items():
            text = text.replace(old, new)
        Path(name).write_text(text)
    said = {}
    for line in "".join(blocks("sh")).splitlines():
        line = line.replace("--nproc 8", "--nproc 2")
        done = CliRunner().invoke(main, shlex.split(line, comments=True)[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}: {done.output}"
        said[line.partition("  ")[0]] = done.output
    assert len(said) == 10
    assert "learning rate, step 1 to 27" in said["surgery midtrain run.yaml --dry-run"]
    foretold = said["surgery midtrain run.yaml --dry-run --nproc 2 --nnodes 2"]
    assert foretold.count("torchrun --nnodes 2 ") == 2 and "1 x 2 rows on a device" in foretold
    assert started == [(["midtrain", "run.yaml"], 2)]
    assert Path("runs/soup/kept/config.json").is_file() and len(read_soup(Path("runs/soup"))["ingredients"]) == 3
    run = read_folder(Path("runs/anneal"))
    assert (run.status, run.steps) == ("finished", 27)
    losses = [e["heldout"]["prose"]["loss"] for e in run.evals]
    assert losses[-1] < losses[0] - 1
    exported = sorted(p.name for p in Path("runs/anneal/export").iterdir())
    assert exported == ["step000000020-hf", "step000000027-hf", "step000000027-megatron"]
    assert open_checkpoint(Path("runs/anneal/export") / exported[-1]).topology.tp == 2
    assert (Path("runs/anneal") / "report.html").stat().st_size > 10_000


def rows(start: str) -> list[list[str]]:
    lines = PAGE[PAGE.index(start) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables_name_what_there_is():
    assert {row[0].strip("`") for row in rows("| name | looks for |")[2:]} == {*TESTS, MOVED}
    table = rows("| key | ours |")
    assert {cell.strip("`") for cell in table[0][2:]} == CONVENTIONS.keys() - {"surgery"}
    keys = {key for preset in CONVENTIONS.values() for key in preset}
    assert keys - {row[0].strip("`").partition("`")[0] for row in table[2:]} == {"train.z_loss", "moe.router_z"}
