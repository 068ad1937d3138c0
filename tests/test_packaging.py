"""The package is what pyproject.toml says: imports are declared, declarations pinned, and what is named exists."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTION = {"yaml": "pyyaml", "google": "protobuf"}  # import name -> distribution, where they differ
NOWHERE = {"scattermoe"}  # in no package index, so no extra can name it; docs/experts.md says where it is
UNPINNED = {"gpu", "fp8"}  # extras that need hardware, so the pinned set-up does without them


def requirements(*lists: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for lines in lists for line in lines]
    return {canonicalize_name(r.name): r for r in parsed if r.name != PROJECT["name"]}


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}


def foreign_imports(file: Path) -> Iterator[str]:
    """The distributions that a source file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "surgery":
                yield DISTRIBUTION.get(top, top)


SOURCES = sorted((ROOT / "surgery").rglob("*.py"))


@pytest.mark.slow
def test_every_import_is_declared() -> None:
    declared = requirements(PROJECT["dependencies"], *EXTRAS.values())
    found = {name: file for file in SOURCES for name in foreign_imports(file)}
    assert {"torch", "transformers"} <= set(found)
    assert {
        name: str(file) for name, file in found.items() if canonicalize_name(name) not in {*declared, *NOWHERE}
    } == {}


def test_every_declared_package_is_pinned_inside_its_range() -> None:
    lists = [lines for extra, lines in EXTRAS.items() if extra not in UNPINNED]
    pinned = pins()
    for name, requirement in requirements(PROJECT["dependencies"], *lists).items():
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes the pinned {pinned[name]}"


def test_pins_name_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    bad = [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert bad == []
    assert pins()["torch"] == "2.13.0"  # a local label such as +cpu would bind the pin to one index


def test_the_console_script_exists() -> None:
    module, function = PROJECT["scripts"]["surgery"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_python_m_surgery_runs_from_anywhere(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "surgery", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in ("inspect", "convert", "verify", "formats", "ask"))


def make(*arguments: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    result = subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, env=environment | variables
    )
    return result.stdout


def test_make_help_lists_the_targets_that_exist() -> None:
    listed = re.findall(r"^  make (\w+)", make("help"), re.MULTILINE)
    assert {"demo", "test", "format", "bench", "clean"} <= set(listed)
    for target in listed:
        make("--dry-run", target)


def test_make_test_checks_everything_and_ci_calls_it() -> None:
    commands = make("--dry-run", "test", "VENV=/nonexistent")
    order = ["-m venv", "pip install", "ruff format --check .", "ruff check .", "mypy", "-m pytest"]
    places = [commands.index(command) for command in order]
    assert places == sorted(places)
    ci = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and line[0] != "#"]
    assert ci[-1] == "exec make test"
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("model", ["", "some folder/model", "owner/name"])
def test_make_demo_hands_the_model_over(model: str) -> None:
    text = make("--dry-run", "demo", f"MODEL={model}")
    assert "surgery run recipes/quickstart.yaml -v" in text
    assert (f'python recipes/fitting.py "{model}"' in text) == bool(model)


def test_make_demo_ends_with_what_is_next_and_leaves_little() -> None:
    text = make("--dry-run", "demo")
    assert "source .venv/bin/activate" in text and "surgery inspect runs/quickstart/soup" in text
    removed = "rm -rf runs/quickstart/copy* runs/quickstart/moe* runs/quickstart/back"
    assert removed in text and removed not in make("--dry-run", "demo", "KEEP=1")
