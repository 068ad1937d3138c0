"""Who may import whom: the ladder of packages, what only some of them may use, what must stay cheap to import."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent / "surgery"
# Each package imports only what stands before it; single modules are packages of one.
LADDER = ("errors", "arguments", "units", "settings", "tensors", "containers", "recognising", "writing", "storage",
          "tokenizer", "model", "formats", "conversion", "running", "verification", "merging", "upcycling", "data",
          "midtraining", "jobs", "cli")  # fmt: skip
# the same inside a package that has rungs of its own
RUNGS = {
    "data": ("extra", "strict", "files", "tokenizing", "rows", "trainers", "plans", "inspection", "payload_index",
             "show"),
}  # fmt: skip
# library -> the packages (or files) that may import it
ROOMS = {
    "pickle": (), "_pickle": (), "shelve": (), "marshal": (), "dill": (), "cloudpickle": (),
    "transformers": ("running", "midtraining", "formats/hf/hub"),
    "mergekit": ("merging/mergekit.py",),
    "numba": ("merging/engine",),
    "yaml": ("containers", "formats/olmo/config.py", "merging"),
    "click": ("cli",),
    "rich": ("cli", "writing/progress.py", "midtraining/panel.py"),
    "plotly": ("midtraining/report/page.py",),
    "lm_eval": ("midtraining/evaluation/harness.py",),
    "ray": ("conversion/workers.py",),
    "wandb": ("midtraining/trackers.py",),
    "pydantic": ("data", "midtraining"),
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def nodes(path: Path) -> list[ast.AST]:
    """All of a file, at the top or inside functions, but what is for type checkers alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    return [node for node in ast.walk(tree) if id(node) not in skipped]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, by their dotted names."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=where)
def test_ladder(path):
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if package in ("__init__", "__main__"):
        return
    assert package in LADDER, f"{package} has no place in the ladder"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "surgery" and len(parts) > 1 and parts[1] != package:
            assert parts[1] in LADDER, name
            assert LADDER.index(parts[1]) < LADDER.index(package), f"{where(path)} must not import {name}"


@pytest.mark.parametrize("package", RUNGS)
def test_rungs(package):
    rungs = RUNGS[package]
    for path in (ROOT / package).rglob("*.py"):
        mine = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["surgery", package] and mine != "__init__" and len(parts) > 2 and parts[2] != mine:
                assert rungs.index(parts[2]) < rungs.index(mine), f"{where(path)} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=where)
def test_rooms(path):
    for name in imports(path):
        rooms = ROOMS.get(name.split(".")[0])
        assert rooms is None or where(path).startswith(rooms), f"{where(path)} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=where)
def test_nothing_unpickles(path):
    """torch.load runs what a file says unless weights_only holds; eval and exec run what anyone says."""
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and node.attr == "load":
            assert ast.unparse(node.value) not in ("torch", "numpy", "np"), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"line {node.lineno}"


def test_every_package_says_what_it_is_and_names_its_files():
    for folder in sorted({path.parent for path in FILES}):
        told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert told, folder
        files = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        missing = [name for name in files if not re.search(rf"\b{name}\b", told)]
        assert not missing or len(files) == 1 or folder == ROOT, (folder, missing)


@pytest.mark.parametrize("path", FILES, ids=where)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            assert node.end_lineno - node.lineno < 60, node.name


def loaded(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize(
    "code",
    ["import surgery", "import surgery.cli.main", "import surgery.formats.registry",
     "import surgery.conversion.convert, surgery.writing.stream"],
)  # fmt: skip
def test_no_heavy_import(code):
    assert not loaded(code) & {"torch", "transformers", "numpy", "tokenizers", "mergekit"}


def test_help_imports_no_command():
    """A module is imported for a command that is called, and only for that."""
    code = "from surgery.cli.main import COMMANDS, main\nmain({}, standalone_mode=False)"
    modules = {f"surgery.cli.{module}" for module, _ in COMMANDS.values()}
    assert not loaded(code.format(["--help"])) & modules
    assert loaded(code.format(["convert", "--help"])) & modules == {"surgery.cli.convert"}


def test_data_needs_no_torch():
    assert not loaded("import surgery.data.show, surgery.data.tokenizing.tokenize") & {"torch", "transformers"}


def test_inspect_needs_no_torch(tiny_hf):
    code = f"""
from surgery.conversion.inspection import describe
from surgery.formats.registry import open_checkpoint
describe(open_checkpoint({str(tiny_hf("llama"))!r}), tensors=True)"""
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
