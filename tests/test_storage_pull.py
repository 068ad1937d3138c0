"""Pulling from buckets: the right bytes or a clear error, whatever happens, and resumed after a kill."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.errors import FileError, OutputError, UsageError
from surgery.storage import pull as pulling
from surgery.storage.landing import Landing
from surgery.storage.pull import pull
from tests.buckets import FILES, Bucket, every, held, model, none

pytest.importorskip("moto")
ALL = pytest.mark.thorough


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model(tmp_path / "model")


def said_by(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("fault", ["half", *(pytest.param(f, marks=ALL) for f in ("lost", "drop", "503"))])
def test_a_pull_has_the_right_bytes_whatever_happens_on_the_way(
    bucket: Bucket, folder: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "RANGE", 1 << 20)
    url = bucket.put(f"pull-{fault}", held(folder))
    bucket.proxy.fault = every(3, fault)
    done = pull(url, tmp_path / "got")
    assert held(tmp_path / "got") == held(folder)
    assert (done.files, done.bytes, done.checked, done.resumed_bytes) == (
        len(FILES),
        sum(FILES.values()),
        len(FILES),
        0,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["got", "model"]


def test_a_pull_goes_on_where_it_stopped_and_believes_no_damaged_piece(
    bucket: Bucket, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "RANGE", 1 << 20)
    url = bucket.put("resume", held(folder))
    fetched: list[str] = []

    def stop(number: int, method: str, path: str) -> str | None:
        fetched.append(path)
        return "redirect" if len([p for p in fetched if "model-00001" in p]) > 5 else None

    bucket.proxy.fault = stop
    with pytest.raises(FileError):
        pull(url, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    data = tmp_path / ".got.surgery-pull" / "data" / "model-00001.safetensors"
    with open(data, "r+b") as file:  # as a power cut may leave it
        file.write(bytes(1 << 20))
    bucket.proxy.fault, before = none, len(bucket.proxy.seen)
    done = pull(url, tmp_path / "got")
    assert held(tmp_path / "got") == held(folder)
    assert done.resumed_bytes > 0
    asked = [r for m, p, r in bucket.proxy.seen[before:] if "model-00001" in p and m == "GET"]
    assert "bytes=0-1048575" in asked and 1 < len(asked) < 6


def test_a_full_disk_ends_a_pull_in_words(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Landing, name: str, start: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    url = bucket.put("full", {"config.json": b"{}"})
    with monkeypatch.context() as patch:
        patch.setattr(Landing, "write", full)
        with pytest.raises(OutputError, match=r"got: the disk is full"):
            pull(url, tmp_path / "got")
    pull(url, tmp_path / "got")
    assert held(tmp_path / "got") == {"config.json": b"{}"}


def test_what_else_is_in_the_folder_stays(bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.put("beside", {"config.json": b"{}", "sub/x.txt": b"new"})
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "thesis.txt").write_bytes(b"mine")
    pull(url, tmp_path / "got")
    assert held(tmp_path / "got") == {"config.json": b"{}", "sub/x.txt": b"new", "thesis.txt": b"mine"}
    bucket.put("beside", {"config.json": b"{ }"})
    with pytest.raises(OutputError, match=r"has config.json, sub/x.txt already"):
        pull(url, tmp_path / "got")
    pull(url, tmp_path / "got", force=True)
    assert held(tmp_path / "got")["config.json"] == b"{ }"
    assert held(tmp_path / "got")["thesis.txt"] == b"mine"


def test_a_pull_that_is_killed_while_files_go_to_their_place_ends_there(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"12345678"}
    url = bucket.put("placing", files)
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "thesis.txt").write_bytes(b"mine")
    whole = Landing._one

    def killed(self: Landing, name: str, force: bool) -> None:
        if name == "config.json":
            raise KeyboardInterrupt
        whole(self, name, force)

    monkeypatch.setattr(Landing, "_one", killed)
    with pytest.raises(KeyboardInterrupt):
        pull(url, tmp_path / "got")
    assert held(tmp_path / "got").keys() == {
        "thesis.txt",
        "model.safetensors",
    }  # no config: nothing takes it for a model
    monkeypatch.setattr(Landing, "_one", whole)
    before = len(bucket.proxy.gets("placing/"))
    pull(url, tmp_path / "got")
    assert held(tmp_path / "got") == files | {"thesis.txt": b"mine"}
    assert len(bucket.proxy.gets("placing/")) == before


def test_a_pull_of_what_is_replaced_meanwhile_is_refused_and_begins_anew(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "RANGE", 1 << 20)
    monkeypatch.setattr(pulling, "REQUESTS", 1)
    url = bucket.put("replaced", {"x.bin": bytes(3 << 20)})
    came: list[str] = []

    def replace(number: int, method: str, path: str) -> Any:
        came.append(path) if "x.bin" in path else None
        return (lambda: bucket.put("replaced", {"x.bin": b"\1" * (3 << 20)})) if len(came) == 2 else None

    bucket.proxy.fault = replace
    with pytest.raises(FileError, match="was replaced or removed while it was read"):
        pull(url, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    pull(url, tmp_path / "got")
    assert held(tmp_path / "got") == {"x.bin": b"\1" * (3 << 20)}


def test_the_command_that_pulls(bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.put("command-pull", {"config.json": b"{}"})
    planned = json.loads(said_by("pull", url, tmp_path / "got", "--dry-run", "--json"))
    assert planned["files"] == [{"name": "config.json", "bytes": 2, "there": False}] and not (tmp_path / "got").exists()
    assert "1 files" in said_by("pull", url, tmp_path / "got")
    assert json.loads(said_by("pull", url, tmp_path / "got", "--force", "--json"))["checked"] == 1
    with pytest.raises(UsageError, match="an address and a folder"):
        pull(tmp_path, tmp_path / "x")
