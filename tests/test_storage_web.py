"""Web servers and the hub, read and pushed to: the right bytes or a clear error, whatever they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.data.files.readers import found_at, sidecars
from surgery.data.tokenizing.sources import find_sources
from surgery.errors import FileError, OutputError, SurgeryError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.storage import copies, mirror
from surgery.tensors.files import File
from tests.buckets import Proxy, every, none
from tests.servers import Hub, web

DATA = bytes(range(256)) * 8192


@pytest.fixture(autouse=True)
def no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    mirror._known.clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with Hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", found.token)
        yield found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_web_server_is_read_in_ranges(tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_hf("llama")
    with web(source.parent) as upstream, Proxy(upstream) as proxy:
        url = f"{proxy.url}/{source.name}"
        there = surgery.convert(url, tmp_path / "there", to="meta")
        ranges = proxy.gets("model.safetensors")
    assert there.content_digest == surgery.convert(source, tmp_path / "here", to="meta").content_digest
    assert there.source == url
    assert len(ranges) <= 10 and all(ranges)


@pytest.mark.parametrize("fault", ["longer", "endless", "shifted", "huge", "other tag", "redirect", "whole"])
def test_a_web_server_that_lies_is_an_error_in_bounded_memory(tmp_path: Path, fault: str) -> None:
    (tmp_path / "x.bin").write_bytes(DATA)
    with web(tmp_path) as upstream, Proxy(upstream) as proxy:
        path = mirror.folder_of(f"{proxy.url}/x.bin")
        proxy.fault = every(1, fault, "GET")
        with pytest.raises(FileError) as caught:
            File(path).read(0, 1000)
        assert f"{proxy.url}/x.bin" in str(caught.value)
        assert proxy.sent < 20_000_000
        proxy.fault = none
        assert File(path).read(300_000, 600_000) == DATA[300_000:900_000]


@pytest.mark.parametrize("fault", ["drop", "half", "503", "lost"])
def test_faults_of_a_web_server_change_no_byte(tmp_path: Path, fault: str) -> None:
    (tmp_path / "x.bin").write_bytes(DATA)
    with web(tmp_path) as upstream, Proxy(upstream) as proxy:
        path = mirror.folder_of(f"{proxy.url}/x.bin")
        proxy.fault = every(2, fault)
        assert File(path).read(0, len(DATA)) == DATA


def test_another_host_must_have_the_same_version(tmp_path: Path) -> None:
    """A redirect is followed as browsers do; what is found there must be what was listed."""
    for name, data in {"same": DATA, "other": DATA[::-1]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.bin").write_bytes(data)
    with web(tmp_path / "same") as upstream, web(tmp_path / "other") as other, Proxy(upstream) as proxy:
        path = mirror.folder_of(f"{proxy.url}/x.bin")
        proxy.fault = every(1, f"redirect {upstream}/x.bin", "GET")
        assert File(path).read(5, 1000) == DATA[5:1005]
        proxy.fault = every(1, f"redirect {other}/x.bin", "GET")
        with pytest.raises(FileError, match="replaced or removed"):
            File(path).read(1_000_000, 1000)


def test_a_repository_of_the_hub_is_one_commit(hub: Hub, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_hf("llama")
    sha = hub.put("org/name", files_of(source))
    checkpoint = open_checkpoint("hf://org/name")
    hub.put("org/name", {"model.safetensors": b"x", "config.json": b"{}"})  # another commit changes nothing
    there = surgery.convert("hf://org/name@" + sha, tmp_path / "there", to="meta")
    assert there.content_digest == surgery.convert(source, tmp_path / "here", to="meta").content_digest
    assert checkpoint.parts["embed"].full().equal(open_checkpoint(source).parts["embed"].full())


def test_a_repository_of_many_texts_is_not_listed_for_each(hub: Hub) -> None:
    texts = {f"web/{i}.jsonl": b'{"text": "%d"}\n' % i for i in range(9)}
    hub.put("org/texts", texts)
    sources, _ = find_sources(["hf://org/texts"])
    for source, text in zip(sources, texts.values(), strict=True):
        with source.open() as file:
            assert file.read() == text
        hub.put("org/texts", {"web/8.jsonl": b'{"text": "other"}\n'})  # another commit changes nothing
    assert len([path for _, path, _ in hub.seen if path.startswith("/api/")]) == 2
    changed, _ = find_sources(["hf://org/texts/web/8.jsonl"])
    with changed[0].open() as file:
        assert file.read() == b'{"text": "other"}\n'


def test_a_repository_of_many_token_files_is_listed_once(hub: Hub, tmp_path: Path) -> None:
    hub.put("org/tokens", {f"web/{i}.{end}": bytes([i]) for i in range(5) for end in ("npy", "csv.gz")})
    paths = [f"hf://org/tokens/web/{i}.npy" for i in range(5)]
    copies.bring(paths, sidecars)
    assert [(found_at(p).read_bytes(), len(list(found_at(p).parent.iterdir()))) for p in paths] == [
        (bytes([i]), 2) for i in range(5)
    ]
    assert len([path for _, path, _ in hub.seen if path.startswith("/api/models/")]) == 1
    hub.put("org/tokens", {"web/new.npy": b"new"})  # what was not seen before is looked for
    assert found_at("hf://org/tokens/web/new.npy").read_bytes() == b"new"
    with pytest.raises(FileError, match=r"hf://org/tokens/web/none.npy: holds no files"):
        found_at("hf://org/tokens/web/none.npy")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://org/none", "there is no such repository"),
        ("hf://org/name@v9", "no such branch, tag or whole commit[\\s\\S]*behind the @"),
        ("hf://org/name/sbu", r"did you mean hf://org/name/sub\?"),
    ],
)
def test_what_the_hub_refuses_is_told_in_words(hub: Hub, tmp_path: Path, address: str, said: str) -> None:
    hub.put("org/name", {"sub/config.json": b"{}"})
    with pytest.raises(FileError, match=f"{address}: [\\s\\S]*{said}") as caught:
        open_checkpoint(address)
    assert str(caught.value).count("\n") == 1


def test_a_hub_that_is_not_there_is_no_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileError, match=r"hf://org/name: the hub cannot be reached[\s\S]*look at the network"):
        open_checkpoint("hf://org/name")


def test_the_token_stays_with_the_hub(hub: Hub) -> None:
    hub.put("org/name", {"x.bin": DATA})
    assert File(mirror.folder_of("hf://org/name/x.bin")).read(7, 9) == DATA[7:16]
    asked = {auth for _, path, auth in hub.seen if "resolve" in path}
    given = {auth for _, path, auth in hub.seen if path.lstrip("/") in hub.blobs}
    assert asked == {"Bearer hf_secret"}
    assert given == {None}


def _sibling(**change: Any) -> Callable[[str, Any], Any]:
    return lambda path, data: {**data, "siblings": [{**s, **change} for s in data["siblings"]]}


@pytest.mark.parametrize(
    "change",
    [
        _sibling(rfilename="../../evil.json"),
        _sibling(rfilename="/etc/evil.json"),
        _sibling(rfilename=7),
        _sibling(size=-1),
        _sibling(size="9"),
        _sibling(size=1 << 70),
        lambda path, data: {**data, "sha": "../../other/repo/resolve/main"},
        lambda path, data: {**data, "sha": None},
        lambda path, data: {"id": "org/name"},
        lambda path, data: [],
        lambda path, data: {**data, "siblings": 7},
    ],
)
def test_a_hub_that_lies_is_an_error(hub: Hub, tmp_path: Path, change: Any) -> None:
    hub.put("org/name", {"config.json": b"{}"})
    hub.change = change
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint("hf://org/name")
    assert "hf://org/name" in str(caught.value) and "reach" not in str(caught.value)
    assert not list(tmp_path.rglob("evil*"))


def test_what_the_hub_does_not_have_says_so(hub: Hub) -> None:
    with pytest.raises(FileError, match=r"hf://org/nothing: there is no such repository"):
        open_checkpoint("hf://org/nothing")


def test_a_repository_is_pulled_and_held_to_the_digests_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": DATA}
    hub.put("org/name", files)
    done = surgery.pull("hf://org/name", tmp_path / "got")
    assert files_of(tmp_path / "got") == files and done.checked == 2
    hub.blobs = {name: data[::-1] for name, data in hub.blobs.items()}
    with pytest.raises(FileError, match="not what the hub's digest says"):
        surgery.pull("hf://org/name", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_web_server_is_pulled_from(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(DATA)
    with web(tmp_path) as url:
        surgery.pull(f"{url}/x.bin", tmp_path / "got")
    assert files_of(tmp_path / "got") == {"x.bin": DATA}


FILES = {"model.safetensors": DATA, "config.json": b"{}", "a/notes.txt": b"x"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    return tmp_path / "model"


def test_a_folder_becomes_one_commit(hub: Hub, folder: Path) -> None:
    done = surgery.push(folder, "hf://me/model")
    assert hub.files("me/model") == FILES
    assert len(hub.summaries) == 1 and hub.summaries[0]["summary"] == "Push model with surgery"
    assert hub.summaries[0]["parentCommit"] == "0" * 40
    assert hub.created[0]["visibility"] == "private"
    assert done.commit == hub.commits["me/model"][-1][0] and done.verified
    again = surgery.push(folder, "hf://me/model")
    assert again.sent_files == 0 and again.commit == done.commit and len(hub.summaries) == 1


def test_what_a_repository_holds_is_replaced_by_force_alone(hub: Hub, folder: Path) -> None:
    hub.put(
        "me/model", {"model-1.safetensors": b"old", "config.json": b"old", ".gitattributes": b"", "README.md": b"my"}
    )
    with pytest.raises(OutputError, match=r"holds other files: README.md, config.json, model-1.safetensors"):
        surgery.push(folder, "hf://me/model")
    surgery.push(folder, "hf://me/model/sub", message="In a folder")
    assert {n: d for n, d in hub.files("me/model").items() if n.startswith("sub/")} == {
        f"sub/{n}": d for n, d in FILES.items()
    }
    (folder / "README.md").write_bytes(b"mine")
    surgery.push(folder, "hf://me/model", force=True)
    assert hub.files("me/model") == FILES | {"README.md": b"mine", ".gitattributes": b""}
    assert [s["summary"] for s in hub.summaries] == ["In a folder", "Push model with surgery"]


def test_another_commit_meanwhile_refuses_the_push(hub: Hub, folder: Path) -> None:
    hub.before_commit = lambda: hub.put("me/model", {"thesis.txt": b"mine"})
    with pytest.raises(OutputError, match=r"another commit, \w{10}, was made meanwhile"):
        surgery.push(folder, "hf://me/model")
    assert hub.files("me/model") == {"thesis.txt": b"mine"}


def test_a_lost_answer_to_a_commit_is_no_failure_and_large_files_are_sent_once(hub: Hub, folder: Path) -> None:
    def fail() -> None:
        raise ConnectionError

    hub.before_commit = fail
    with pytest.raises(FileError):
        surgery.push(folder, "hf://me/model")
    assert hub.files("me/model") == {}
    sent = len([1 for m, _, _ in hub.seen if m == "PUT"])
    hub.before_commit, hub.lose_commits = (lambda: None), True
    assert surgery.push(folder, "hf://me/model").verified
    assert hub.files("me/model") == FILES and len([1 for m, _, _ in hub.seen if m == "PUT"]) == sent == 1


def test_a_push_that_may_not_be_says_so(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is a commit"):
        surgery.push(folder, f"hf://me/model@{'a' * 40}")
    with pytest.raises(UsageError, match="--public is for the hub"):
        surgery.push(folder, "s3://bucket/x", public=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(FileError, match=r"hf://me/model: the hub does not take the token"):
        surgery.push(folder, "hf://me/model")
