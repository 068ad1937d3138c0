"""Pushing to buckets: the right bytes or a clear error, whatever happens, and nothing seen by half."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.errors import FileError, OutputError, UsageError
from surgery.storage import contents
from surgery.storage.address import parse
from surgery.storage.claim import claim
from surgery.storage.listing import UNFINISHED, listing
from surgery.storage.published import published
from surgery.storage.push import Pushed, push
from surgery.storage.store import open_store
from tests.buckets import BUCKET, FILES, Bucket, every, held, model, none

pytest.importorskip("moto")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "PART", 5 << 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model(tmp_path / "model")


def test_a_folder_is_pushed_in_the_order_in_which_it_may_be_seen(bucket: Bucket, folder: Path) -> None:
    done = push(folder, f"s3://{BUCKET}/order")
    assert bucket.objects("order") == held(folder)
    assert (done.sent_files, done.read_back, done.verified) == (len(FILES), 0, True)
    puts = bucket.puts()
    assert puts[0] == UNFINISHED
    assert set(puts[1:3]) == {"model-00001.safetensors", "model-00002.safetensors"}
    assert puts[-3:] == ["model.safetensors.index.json", "config.json", "surgery.json"]
    assert listing(parse(f"s3://{BUCKET}/order")).entries.keys() == FILES.keys()
    assert bucket.unfinished() == []
    before, was = len(bucket.proxy.seen), bucket.objects("order")
    assert push(folder, f"s3://{BUCKET}/order").sent_files == 0  # the same again sends nothing
    assert {m for m, _, _ in bucket.proxy.seen[before:]} == {"GET", "HEAD"}
    (folder / "config.json").write_bytes(b"{}")
    with pytest.raises(OutputError, match="holds other objects"):
        push(folder, f"s3://{BUCKET}/order")
    assert bucket.objects("order") == was


def test_a_path_that_is_spelt_in_two_ways_is_published_as_one(folder: Path) -> None:
    entries = [{"path": path, "mask": None} for path in ("/x/a.npy", "//x/a.npy", "/y/a.npy")]
    (folder / "plan.json").write_text(json.dumps({"root": "/x", "sources": [{"entries": entries}]}))
    found = json.loads(published(folder / "plan.json") or b"")
    assert [entry["path"] for entry in found["sources"][0]["entries"]] == ["x/a.npy", "x/a.npy", "y/a.npy"]
    (folder / "plan.json").write_text(json.dumps({"sources": [{"entries": [{"path": ["a"], "mask": None}]}]}))
    assert b'"a"' in (published(folder / "plan.json") or b"")  # of another program


def test_no_folder_of_this_machine_is_published(bucket: Bucket, folder: Path) -> None:
    command = ["surgery", "--tokenizer=/home/me/tok", "a/b"]
    record = {"source": {"path": "/home/me/My models/SmolLM2"}, "command": command,
              "notes": ["tokenizer of ~/tok/x, of s3://bucket/home/me", "/home/me/a: 2 tensors as in /home/me/b"],
              "content_digest": "ab"}  # fmt: skip
    soup = {
        "models": {"/home/me/a/run": {"path": "/home/me/a/run"}, "/home/me/b/run": 1},
        "config": "- model: ../me/run\n  chat_template: \"[INST] {{ '/no_think' }} [/INST]</s>\"\n",
    }
    inputs = {
        "sources": [
            {"path": "/home/me/.cache/huggingface/hub/datasets/../models--org--name/snapshots/3fa1/x.txt"},
            {"path": "file:///home/me/y.txt"},
        ]
    }
    told = {"surgery.json": record, "soup.json": soup, "a/tokens.json": inputs, "other.json": record}
    for name, value in told.items():
        (folder / name).write_text(json.dumps(value))
    push(folder, f"s3://{BUCKET}/private", card=True)
    there = bucket.objects("private")
    assert there.pop("other.json") == (folder / "other.json").read_bytes()
    assert json.loads(there["surgery.json"]) == {
        "source": {"path": "SmolLM2"}, "command": ["surgery", "--tokenizer=tok", "a/b"],
        "notes": ["tokenizer of x, of s3://bucket/home/me", "a: 2 tensors as in b"],
        "content_digest": "ab"}  # fmt: skip
    assert json.loads(there["soup.json"]) == {
        "models": {"run": {"path": "run"}, "run (2)": 1},
        "config": "- model: run\n  chat_template: \"[INST] {{ '/no_think' }} [/INST]</s>\"\n",
    }
    assert json.loads(there["a/tokens.json"]) == {"sources": [{"path": "hf://org/name@3fa1/x.txt"}, {"path": "y.txt"}]}
    assert "README.md" in there and not [
        name for name, data in there.items() if b"/me/" in data.replace(b"t/home/me", b"")
    ]
    assert json.loads((folder / "surgery.json").read_text()) == record
    assert push(folder, f"s3://{BUCKET}/private").sent_files == 0


ALL = pytest.mark.thorough


@pytest.mark.parametrize("fault", ["lost", *(pytest.param(f, marks=ALL) for f in ("half", "drop", "503"))])
def test_faults_on_the_way_change_no_byte(bucket: Bucket, folder: Path, fault: str) -> None:
    bucket.proxy.fault = every(3, fault)
    done = push(folder, f"s3://{BUCKET}/fault-{fault}")
    assert done.verified and done.notes == () and bucket.objects(f"fault-{fault}") == held(folder)
    assert bucket.unfinished() == []
    assert len(bucket.proxy.seen) > 2 * len(FILES)


def test_what_a_store_spoils_is_found(bucket: Bucket, folder: Path) -> None:
    def spoil(number: int, method: str, path: str) -> Any:
        if method == "HEAD" and path.endswith("/config.json"):
            bucket.client.put_object(Bucket=BUCKET, Key="spoilt/config.json", Body=b"x" * FILES["config.json"])
        return None

    bucket.proxy.fault = spoil
    with pytest.raises(FileError, match=r"spoilt/config.json: is not what was sent"):
        push(folder, f"s3://{BUCKET}/spoilt")
    bucket.proxy.fault = none
    with pytest.raises(FileError, match="a push that has not ended"):
        listing(parse(f"s3://{BUCKET}/spoilt"))


@ALL
def test_bytes_are_read_back_where_etags_are_no_digests(bucket: Bucket, folder: Path) -> None:
    bucket.proxy.fault = every(1, "opaque")
    assert push(folder, f"s3://{BUCKET}/opaque").read_back == len(FILES)
    assert bucket.objects("opaque") == held(folder)
    bucket.proxy.seen.clear()
    assert push(folder, f"s3://{BUCKET}/opaque").sent_files == 0
    for name, size in FILES.items():
        assert bool(bucket.proxy.gets(f"opaque/{name}")) == bool(size)


@pytest.mark.parametrize("same", [False, pytest.param(True, marks=ALL)])
def test_a_place_is_one_pushs(bucket: Bucket, folder: Path, tmp_path: Path, same: bool) -> None:
    """A second push begins while the first is at its first file."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_bytes(b"{}")
    other, came = [], []

    def meanwhile() -> None:
        try:
            other.append(push(folder if same else tmp_path / "other", url))
        except OutputError as error:
            other.append(error)

    def at(number: int, method: str, path: str) -> Any:
        if method in ("PUT", "POST") and "model-0000" in path and not came:
            came.append(1)
            return meanwhile
        return None

    url = f"s3://{BUCKET}/race-{same}"
    bucket.proxy.fault = at
    push(folder, url)
    assert bucket.objects(f"race-{same}") == held(folder)
    assert isinstance(other[0], Pushed if same else OutputError)
    if not same:
        assert "another push" in str(other[0]) and "choose another place" in str(other[0])


def test_a_lost_answer_to_a_claim_is_no_other_push(bucket: Bucket) -> None:
    bucket.proxy.fault = lambda number, method, path: "lost" if method == "PUT" and number == 1 else None
    store = open_store(parse(f"s3://{BUCKET}/lost"))
    assert claim(store, "plan", 1, 1) is False
    assert [m for m, _, _ in bucket.proxy.seen].count("PUT") > 1
    assert claim(store, "plan", 1, 1) is True
    with pytest.raises(OutputError, match="another push"):
        claim(store, "other", 1, 1)


def test_a_place_that_was_filled_meanwhile_is_left_alone(bucket: Bucket, folder: Path) -> None:
    def at(number: int, method: str, path: str) -> Any:
        if UNFINISHED in path and method == "PUT":
            return lambda: bucket.client.put_object(Bucket=BUCKET, Key="filled/thesis.txt", Body=b"mine")
        return None

    bucket.proxy.fault = at
    with pytest.raises(OutputError, match=r"thesis.txt"):
        push(folder, f"s3://{BUCKET}/filled")
    assert bucket.objects("filled") == {"thesis.txt": b"mine"}


PUSH = """import sys
from surgery.storage import contents, push
contents.PART = 5 << 20
push.push(*sys.argv[1:])"""


@pytest.mark.slow
def test_a_push_that_is_killed_is_seen_by_nobody_and_goes_on(bucket: Bucket, folder: Path) -> None:
    url = f"s3://{BUCKET}/killed"
    run: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        while not bucket.parts("killed/model-00001.safetensors"):
            time.sleep(0.02)
        os.kill(run[0].pid, signal.SIGKILL)

    def at(number: int, method: str, path: str) -> Any:
        return kill if "partNumber=2" in path else None

    bucket.proxy.fault = at
    run.append(subprocess.Popen([sys.executable, "-c", PUSH, str(folder), url]))
    assert run[0].wait(120) == -signal.SIGKILL
    bucket.proxy.fault = none
    there = bucket.objects("killed")
    assert UNFINISHED in there and not {"config.json", "surgery.json", "model-00001.safetensors"} & there.keys()
    assert "killed/model-00001.safetensors" in bucket.unfinished()
    with pytest.raises(FileError, match="a push that has not ended"):
        listing(parse(url))
    bucket.proxy.seen.clear()
    done = push(folder, url)
    assert done.aborted == 0 and not [key for key in bucket.unfinished() if key.startswith("killed/")]
    assert not [path for _, path, _ in bucket.proxy.seen if "partNumber=1&" in path or path.endswith("?uploads")]
    assert done.sent_files == len(FILES) - len(there.keys() & FILES.keys())
    assert bucket.objects("killed") == held(folder)


def test_of_parts_that_were_sent_before_only_equal_ones_are_left(bucket: Bucket, folder: Path) -> None:
    key, size = "parts/model-00001.safetensors", 5 << 20
    data = (folder / "model-00001.safetensors").read_bytes()
    for first in (b"x" * size, data[:size]):  # the one that was begun last is gone on with
        upload = bucket.client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        for number, body in ((1, first), (2, b"other"), (3, b"more")):
            bucket.client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=number, Body=body)
    done = push(folder, f"s3://{BUCKET}/parts")
    assert bucket.objects("parts") == held(folder)
    sent = [path for method, path, _ in bucket.proxy.seen if method == "PUT" and "partNumber" in path]
    assert len(sent) == 1 and "partNumber=2" in sent[0]
    assert done.aborted == 1 and bucket.unfinished() == []


def test_keys_that_may_not_list_uploads_send_all_parts(bucket: Bucket, folder: Path) -> None:
    bucket.proxy.fault = lambda number, method, path: "403" if method == "GET" and "uploads" in path else None
    done = push(folder, f"s3://{BUCKET}/rights")
    assert bucket.objects("rights") == held(folder) and done.aborted == 0
    assert "unfinished uploads cannot be listed" in done.notes[0] and "lifecycle" in done.notes[0]


def test_a_source_that_changes_is_refused(bucket: Bucket, folder: Path) -> None:
    def at(number: int, method: str, path: str) -> Any:
        return (lambda: (folder / "config.json").write_bytes(b"{}")) if "model-00002" in path else None

    bucket.proxy.fault = at
    with pytest.raises(FileError, match=r"config.json"):
        push(folder, f"s3://{BUCKET}/changing")
    assert UNFINISHED in bucket.objects("changing")


def said_by(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command(bucket: Bucket, folder: Path) -> None:
    url = f"s3://{BUCKET}/command"
    planned = json.loads(said_by("push", folder, url, "--dry-run", "--json"))
    assert planned["bytes_to_send"] == sum(FILES.values()) and bucket.objects("command") == {}
    assert [f["name"] for f in planned["files"]][-1] == "surgery.json"
    said = said_by("push", folder, url)
    assert url in said and f"{len(FILES)} files" in said
    assert json.loads(said_by("push", folder, url, "--json"))["sent_files"] == 0


def test_the_file_that_failed_is_named_and_the_others_stop(bucket: Bucket, folder: Path) -> None:
    bucket.proxy.fault = lambda n, method, path: "redirect" if method == "PUT" and "model-00002" in path else None
    with pytest.raises(FileError, match=r"model-00002"):
        push(folder, f"s3://{BUCKET}/failing")
    assert not {"config.json", "surgery.json"} & bucket.objects("failing").keys()


def test_what_cannot_be_pushed_says_so(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only buckets"):
        push(folder, "https://host/x")
    with pytest.raises(UsageError, match="a folder of this machine and an address"):
        push(folder, tmp_path / "x")
    with pytest.raises(UsageError, match="is no folder"):
        push(tmp_path / "nothing", f"s3://{BUCKET}/x")
    with pytest.raises(FileError, match="no-bucket"):
        push(folder, "s3://no-bucket/x")
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(FileError, match="is a link"):
        push(folder, f"s3://{BUCKET}/x")
