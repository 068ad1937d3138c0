"""Which files a folder of text or of tokens stands for: through links, without what is hidden, nothing unsaid."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from surgery.data.files.idx import IndexedWriter
from surgery.data.plans.draft import draft_plan
from surgery.data.tokenizing.sources import files_below, find_sources
from surgery.errors import FileError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "in/b.jsonl",
        "in/a/c.jsonl",
        "in/.git/x.jsonl",
        "in/_temporary/y.jsonl",
        "in/_SUCCESS",
        "far/d.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    return tmp_path


def test_links_are_followed_and_hidden_folders_are_named(folder):
    sources, notes = find_sources([str(folder / "in")])
    assert [os.path.relpath(s.path, folder / "in") for s in sources] == ["a/c.jsonl", "b.jsonl", "linked/d.jsonl"]
    assert notes == [f"left out of {folder / 'in'}, as no text: '.git', '_SUCCESS', '_temporary'"]


def test_a_file_that_two_links_lead_to_and_a_link_to_nothing(folder):
    (folder / "in" / "again").symlink_to(folder / "far")
    with pytest.raises(UsageError, match=r"named twice: '.*far/d\.jsonl'"):
        find_sources([str(folder / "in")])
    (folder / "in" / "again").unlink()
    (folder / "in" / "gone.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(FileError, match=r"gone\.jsonl"):
        find_sources([str(folder / "in")])


def test_an_order_of_paths(tmp_path):
    for name in ("b/x", "a/z", "a/y/w", "a-b", "c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(files_below(tmp_path, ("."))) == sorted(p for p in tmp_path.rglob("*") if p.is_file())


def test_a_plan_takes_no_unfinished_tokens(tmp_path):
    """The hidden folder in which tokens are being made, beside those that are finished."""
    for name in ("tok/web", "tok/.math.surgery-partial"):
        (tmp_path / name).mkdir(parents=True)
        with IndexedWriter(tmp_path / name / "tokens", "uint16") as writer:
            writer.add(range(64))
    (tmp_path / "mix.yaml").write_text("sequence_length: 8\nsources: [{name: all, paths: tok, multiplier: 1}]\n")
    [source] = draft_plan(tmp_path / "mix.yaml").sources
    assert [entry.path for entry in source.entries] == ["tok/web/tokens.bin"]
