"""The ready soups run unchanged under surgery and under mergekit, and give the same bits where nothing is random."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import yaml

import surgery
from surgery.merging.recipe import read_recipe
from tests import merges, tiny
from tests.test_soup_tokenizers import tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "merge_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
OURS = {"dare-ties", "della", "moe-aligned", "other-tokenizers"}  # not to be compared bit by bit


def names_of(path: Path) -> list[str]:
    return [str(m) for m in read_recipe(path).models()]


def make(path: Path, at: Path) -> None:
    """Tiny models under the names that a file has."""
    family = "mixtral" if path.stem.startswith("moe") else "llama"
    sizes = {**merges.SMALL, **(tiny.WIDER | {"h": 52} if family == "mixtral" else {}), "l": 2}
    if path.stem == "taller":
        sizes |= {"l": 32, "h": 24, "f": 20, "g": 1, "n": 2, "half": 6, "v": 16}
    for i, name in enumerate(names_of(path)):
        if path.stem == "other-tokenizers":
            sizes["v"] = tokenizer("ab"[i], at / name)
        tiny.save(family, at / name, "bfloat16", **sizes)
        if i:
            merges.disturb(at / name, i)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_runs_under_both(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(path, tmp_path)
    report = surgery.soup(path, "ours")
    assert report.verified
    with merges.ties_by_place():
        merges.mergekit(yaml.safe_load(path.read_text()), tmp_path / "theirs")
    if path.stem not in OURS:
        assert merges.differences("ours", "theirs") == []
    ours, theirs = merges.weights("ours"), merges.weights("theirs")
    assert {k: (t.dtype, t.shape) for k, t in ours.items()} == {k: (t.dtype, t.shape) for k, t in theirs.items()}


def test_mergekit_yaml_takes_a_file_as_it_is(tmp_path, monkeypatch):
    """Through its own command."""
    from click.testing import CliRunner
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts.run_yaml import main

    LoaderCache.loaders.clear()

    logging.getLogger("mergekit").setLevel(logging.CRITICAL)
    monkeypatch.chdir(tmp_path)
    path = FOLDER / "three-seeds.yaml"
    make(path, tmp_path)
    done = CliRunner().invoke(main, [str(path), "theirs", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"])
    assert done.exit_code == 0, done.output
    surgery.soup(path, "ours")
    assert merges.differences("ours", "theirs") == []


def test_each_is_listed_and_explained():
    listed = re.findall(r"\]\(([\w-]+\.yaml)\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == [p.name for p in FILES]
    for path in FILES:
        assert path.read_text().startswith("# "), path.name
