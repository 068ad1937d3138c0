"""Recipes whose inputs lie at addresses: read where they are, listed once, and run again when they change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.jobs.digests import Digests
from tests.buckets import Bucket

pytest.importorskip("moto")


def said(*words: object) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_recipe_reads_from_addresses_and_sees_when_they_change(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bucket.put("recipe", {"text/a.txt": b"one"})
    bucket.put("recipe", {"text/b.txt": b"two"})
    steps = {"told": {"shell": "echo $text > $out"},
             "each": {"shell": "echo $files > $out"}}  # fmt: skip
    inputs = {"text": "s3://bucket/recipe/text", "files": "s3://bucket/recipe/text/*.txt"}
    (tmp_path / "r.yaml").write_text(json.dumps({"inputs": inputs, "steps": steps}))
    said("run", "r.yaml")
    assert (tmp_path / "runs/r/told").read_text() == "s3://bucket/recipe/text\n"
    both = (tmp_path / "runs/r/each").read_text()
    assert both == "s3://bucket/recipe/text/a.txt s3://bucket/recipe/text/b.txt\n"
    again = json.loads(said("run", "r.yaml", "--dry-run", "--json"))
    assert not [line for line in again if line["runs"]]
    assert again[0]["reads"] == {"text": "s3://bucket/recipe/text"}
    bucket.put("recipe", {"text/a.txt": b"ONE"})
    assert [line["step"] for line in json.loads(said("run", "r.yaml", "--dry-run", "--json")) if line["runs"]]
    tree = Digests(tmp_path / "d.json").tree(Path("s3://bucket/recipe/text"))
    assert tree.bytes == 6 and Digests(tmp_path / "d.json").sizes(Path("s3://bucket/recipe/text")).bytes == 6


def test_a_run_of_a_recipe_lists_each_address_once(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        bucket.put("listed", {f"text/{name}.txt": b"one"})
        bucket.put("listed", {f"own/{name}.txt": b"one"})
    inputs = {"text": "s3://bucket/listed/text", "files": "s3://bucket/listed/text/*.txt"}
    own = {"own": "s3://bucket/listed/own/*.txt"}
    steps = {"each": {"shell": "echo $text $n $own > $out", "matrix": {"n": [1, 2, 3]}, "inputs": own},
             "all": {"shell": "cat $each $files > $out || true"}}  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps({"inputs": inputs, "steps": steps}))
    for words in (("run", "r.yaml"), ("run", "r.yaml", "--dry-run")):
        bucket.proxy.seen.clear()
        said(*words)
        assert sorted(bucket.proxy.listed()) == ["listed/own/", "listed/text/", "listed/text/"]
    bucket.put("listed", {"own/b.txt": b"two"})
    again = json.loads(said("run", "r.yaml", "--dry-run", "--json"))
    assert [line["why"] for line in again if line["runs"]][:3] == ["own/b.txt has changed"] * 3
