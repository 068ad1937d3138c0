"""Who may import whom, and what must stay cheap to import."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "surgery"
# Each module knows only what stands before it.  Packages count as one.
ORDER = ["errors", "mixing", "sizes", "memory", "files", "lazy", "extent", "axes", "anatomy", "topology", "rows",
         "replicas", "dialect", "containers", "fingerprint", "journal", "staging", "sink", "stream", "tokenizer",
         "formats", "dialects", "checkpoint", "allowances", "provenance", "conversion"]  # fmt: skip
LATE = {"cli": set(), "show": {"cli"}, "inspect": {"cli", "show"}}  # who may import these


def imports(path: Path) -> set[str]:
    """The modules of surgery that a file imports, at the top or inside functions; type checking apart."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "surgery":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("surgery.")}
    return found


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.parent != ROOT or p.stem not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imports(path) - {name}:
        if other in LATE:
            assert name in LATE[other], f"{name} must not import {other}"
        if name in ORDER and other in ORDER:
            assert ORDER.index(other) < ORDER.index(name), f"{name} must not import {other}"
        assert not (name in ORDER and other not in ORDER), f"{name} must not import {other}"


def loaded(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize(
    "code",
    ["import surgery", "import surgery.cli", "import surgery.checkpoint", "import surgery.conversion, surgery.stream"],
)
def test_no_heavy_import(code):
    assert not loaded(code) & {"torch", "transformers", "numpy", "tokenizers", "mergekit"}


def test_inspect_needs_no_torch(tiny_hf):
    code = f"import surgery.inspect\nfrom surgery.checkpoint import open_checkpoint\n" \
           f"surgery.inspect.describe(open_checkpoint({str(tiny_hf('llama'))!r}), tensors=True)"  # fmt: skip
    assert not loaded(code) & {"torch", "transformers"}


def test_help_is_instant():
    """0.3 s of a processor's time: the clock would measure what else the machine does."""
    text, seconds = "", []
    for _ in range(5):
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "surgery", "--help"], capture_output=True, text=True, check=True)
        after, text = os.times(), done.stdout
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert "convert" in text
    assert min(seconds) < 0.3
