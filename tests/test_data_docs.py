"""docs/data.md, read as a script: its commands and its code run in order, on a little text and a small budget."""

from __future__ import annotations

import gzip
import re
import shlex
import shutil
from pathlib import Path

import pytest
from backports import zstd
from click.testing import CliRunner

from surgery.cli.data import data_command
from surgery.data.plans import mixture
from surgery.data.plans.batches import Batches
from surgery.data.plans.plan import open_plan

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "tests" / "golden" / "tokenize"
SMALL = {"sequence_length: 4096": "sequence_length: 32", "50B": "20k", "rows_per_step: 1024": "rows_per_step: 8"}


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Path:
    """Where a reader of the page would be: some Dolmino, and a tokenizer."""
    for name, number in (("dclm", 0), ("flan", 1), ("math", 2)):
        (tmp_path / "dolmino" / name).mkdir(parents=True)
        text = gzip.decompress((TEXT / "documents" / f"docs-0{number}.jsonl.gz").read_bytes())
        (tmp_path / "dolmino" / name / "0.jsonl.zst").write_bytes(zstd.compress(text))
    (tmp_path / "OLMo-2-1124-7B").mkdir()
    shutil.copy(TEXT / "tokenizer.json", tmp_path / "OLMo-2-1124-7B")
    eos = '{"eos_token": "<|endoftext|>"}'
    (tmp_path / "OLMo-2-1124-7B" / "tokenizer_config.json").write_text(eos)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> str:
    words = shlex.split(line, comments=True)[2:]
    expanded = [str(p) for w in words for p in (sorted(Path().glob(w)) if "*" in w else [w])]
    done = CliRunner().invoke(data_command, expanded, catch_exceptions=False)
    assert done.exit_code == 0, f"{line}: {done.output}"
    return done.output


def test_the_page(reader):
    page, said = (ROOT / "docs" / "data.md").read_text(), {}
    for kind, text in re.findall(r"```(sh|yaml|python)\n(.*?)```", page, re.S):
        if kind == "yaml" and text.startswith("# mix.yaml"):
            for old, new in SMALL.items():
                assert old in text
                text = text.replace(old, new)
            Path("mix.yaml").write_text(text)
        elif kind == "yaml":
            small = text.replace("4096", "32").replace("1_000_000", "100").replace("1024", "4")
            Path("megatron.yaml").write_text(small)
        elif kind == "sh":
            for line in text.splitlines():
                said[line] = run(line)
        elif kind == "python":
            shutil.rmtree("plan")
            small = text.replace("step=500", "step=5")
            exec(compile(small, "data.md", "exec"), {})
    assert len(said) == 9
    table = next(text for line, text in said.items() if "the table alone" in line)
    assert "625 instances of 32 tokens" in table and "max_share 0.25" in table
    assert len(Batches(open_plan("plan"))) == 78
    assert "4 rows" in run("surgery data show megatron.yaml --step 2").splitlines()[0]
    math = next(text for line, text in said.items() if "--source math" in line)
    assert "math #" in math and "dclm #" not in math


def test_the_figures_of_the_page_are_those_of_its_example():
    """12.2M instances at 4096 are 50B tokens; the sources of the benchmark have 209B tokens in 52M documents."""
    assert round(50e9 / 4096 / 1e6, 1) == 12.2
    text = (ROOT / "bench" / "data_plan.py").read_text()
    tokens = [int(n.replace("_", "")) for n in re.findall(r"\((\d[\d_]+), 0\.", text)]
    assert (sum(tokens), round(sum(tokens) / 4000 / 1e6)) == (209 * 10**9, 52)


def test_every_key_of_a_mixture_is_on_the_page():
    page = (ROOT / "docs" / "data.md").read_text()
    keys = {key for model in (mixture.Mixture, mixture.Source, mixture.Budget) for key in model.model_fields}
    said = {word for span in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"[a-z_]+", span)}
    example = set(re.findall(r"[a-z_]+(?=:)", page[page.index("# mix.yaml") :]))
    assert keys - said - example == set()
