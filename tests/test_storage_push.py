"""Pushing to buckets and pulling: the right bytes or a clear error, whatever happens, and nothing seen by half."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.errors import FileError, OutputError, UsageError
from surgery.storage import contents
from surgery.storage import pull as pulling
from surgery.storage.address import parse
from surgery.storage.claim import claim
from surgery.storage.landing import Landing
from surgery.storage.listing import UNFINISHED, listing
from surgery.storage.pull import pull
from surgery.storage.push import Pushed, push
from surgery.storage.store import open_store
from surgery.storage.streamed import Streamed
from tests.buckets import Proxy, every, keys, moto, none

pytest.importorskip("moto")
BUCKET = "bucket"
FILES = {"model-00001.safetensors": 6 << 20, "model-00002.safetensors": 3000, "config.json": 40,
         "model.safetensors.index.json": 90, "surgery.json": 7, "a/tokenizer.json": 0}  # fmt: skip


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with moto() as url:
        yield url


class Bucket:
    def __init__(self, client: Any, proxy: Proxy) -> None:
        self.client, self.proxy = client, proxy

    def objects(self, prefix: str) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
        keys = [item["Key"] for item in found]
        return {k[len(prefix) + 1 :]: self.client.get_object(Bucket=BUCKET, Key=k)["Body"].read() for k in keys}

    def put(self, prefix: str, files: dict[str, bytes]) -> str:
        for name, data in files.items():
            self.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data)
        return f"s3://{BUCKET}/{prefix}"

    def unfinished(self) -> list[str]:
        return [u["Key"] for u in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    def parts(self, key: str) -> list[int]:
        """The numbers of the parts that an upload of an object has so far."""
        found = [u for u in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) if u["Key"] == key]
        held = [self.client.list_parts(Bucket=BUCKET, Key=key, UploadId=u["UploadId"]) for u in found]
        return [part["PartNumber"] for one in held for part in one.get("Parts", [])]

    def puts(self) -> list[str]:
        """The objects that were sent, in order, each once."""
        sent = [p.partition("?")[0] for m, p, _ in self.proxy.seen if m in ("PUT", "POST") and "?delete" not in p]
        return [path.removeprefix(f"/{BUCKET}/").split("/", 1)[1] for path in dict.fromkeys(sent)]


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    import boto3

    keys(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(contents, "PART", 5 << 20)
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket=BUCKET)
    with Proxy(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield Bucket(client, proxy)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, (name, size) in enumerate(FILES.items()):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((bytes([i]) + os.urandom(1023)) * (size // 1024) + bytes(size % 1024))
    return tmp_path / "model"


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


def test_a_file_that_left_before_is_not_sent_again_where_etags_are_no_digests(
    bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    address, path = parse(f"s3://{BUCKET}/left"), folder / "model-00001.safetensors"
    bucket.proxy.fault = every(1, "opaque")
    first = Streamed(address, tmp_path / "plans", ())
    first.leave(path.name, path)
    bucket.proxy.seen.clear()
    Streamed(address, tmp_path / "plans", first.begun).leave(path.name, path)
    assert bucket.puts() == [UNFINISHED]
    path.write_bytes(bytes(FILES[path.name]))
    Streamed(address, tmp_path / "plans", (tmp_path / "plans").read_text().split()).leave(path.name, path)
    assert bucket.objects("left")[path.name] == path.read_bytes()
