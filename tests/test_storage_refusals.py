"""What stores refuse and what is misspelt: told in words, with what to do, after few requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import FileError, OutputError, SurgeryError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.storage.address import is_address, parse
from tests.buckets import BUCKET, Bucket, every, held, none

pytest.importorskip("moto")


def equal(a: Any, b: Any) -> bool:
    return a.parts.keys() == b.parts.keys() and all(torch.equal(a.parts[n].full(), b.parts[n].full()) for n in a.parts)


def test_what_is_not_there_says_so(bucket: Bucket) -> None:
    with pytest.raises(FileError, match=r"s3://bucket/nothing: holds no files, or does not exist"):
        open_checkpoint("s3://bucket/nothing")
    with pytest.raises(FileError, match=r"s3://no-bucket/nothing"):
        open_checkpoint("s3://no-bucket/nothing")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("s3://bucket/other", "s3://bucket holds five-shards"),
        ("s3://bucket/five-shads", r"did you mean s3://bucket/five-shards\?"),
        ("s3://bucket/five-shards/confg.json", r"did you mean s3://bucket/five-shards/config.json\?"),
        ("s3://bucket/five*/config.json", "patterns are for texts and tokens .* name one place"),
        (f"s3://no-bucket/{'x' * 600}", "there is no such bucket"),
        ("s3://no-bucket/x", r"there is no such bucket[\s\S]*look at its name"),
        ("s3:bucket/five-shards", r"did you mean s3://bucket/five-shards\?"),
        ("s3//bucket/five-shards", r"did you mean s3://bucket/five-shards\?"),
        ("file:///no/model", r"file of this machine[\s\S]*did you mean /no/model\?"),
        ("s3://", "the beginning of an address"),
        ("five*", "no file or folder has such a name"),
    ],
)
def test_what_may_have_been_meant(bucket: Bucket, path: str, said: str) -> None:
    bucket.client.put_object(Bucket=BUCKET, Key="five-shards/config.json", Body=b"{}")
    with pytest.raises(FileError, match=said):
        surgery.describe(path)
    assert len(bucket.proxy.seen) <= 3


def test_the_next_step_names_the_address(bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    bucket.upload(tiny_hf("llama"), "runs/one")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "tokens.npy").write_bytes(b"\1\0\2\0")
    assert surgery.describe("s3://bucket/runs").next == ("surgery inspect s3://bucket/runs/one",)
    [step] = surgery.describe(bucket.upload(tmp_path / "in", "tokens") + "/tokens.npy").next
    assert "s3://bucket/tokens/tokens.npy" in step and "cache" not in step


REFUSED = {"401": "may not be used\n.*keys are taken from AWS_ACCESS_KEY_ID", "403": "may not be used",
           "expired": "the keys have expired\n.*renew them", "keys": "the store does not know the key",
           "signature": "the secret is not that of the key", "clock": "the clock of this machine"}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_refusal_is_told_in_words_and_asked_for_once(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path, fault: str
) -> None:
    url = bucket.upload(tiny_hf("llama"), "refused")
    bucket.proxy.fault = every(1, fault)
    with pytest.raises(FileError, match=f"s3://bucket/refused: {REFUSED[fault]}"):
        open_checkpoint(url)
    assert len(bucket.proxy.seen) == 1
    for work in (surgery.push, surgery.convert):
        with pytest.raises(FileError, match=REFUSED[fault]):
            work(tiny_hf("llama"), f"s3://{BUCKET}/refused-too", **({"to": "meta"} if work is surgery.convert else {}))
    assert len(bucket.proxy.seen) == 3


def test_a_push_waits_at_each_of_its_steps_and_counts_every_byte_once(
    bucket: Bucket, tiny_hf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim, each file, the end of the claim: the first four times that each is asked for, the answer is no."""
    source, told, asked = tiny_hf("llama"), list[int](), Counter[tuple[str, str]]()

    def first(number: int, method: str, path: str) -> str | None:
        asked[method, path] += 1
        return "429" if method in ("PUT", "POST") and asked[method, path] <= 4 else None

    monkeypatch.setattr("surgery.storage.store._retry", lambda: {"max_retries": 0})  # by the client itself
    monkeypatch.setattr("surgery.storage.store.time.sleep", lambda seconds: None)
    bucket.proxy.fault = first
    assert surgery.push(source, f"s3://{BUCKET}/patient", progress=told.append).verified
    assert {asked[method, path] for method, path in asked if method in ("PUT", "POST")} == {5}
    assert sum(told) == 2 * sum(file.stat().st_size for file in source.iterdir())  # read and sent


def test_a_store_that_is_asked_too_often_is_asked_again_later(
    bucket: Bucket, tiny_hf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, waited = tiny_hf("llama"), list[float]()
    url = bucket.upload(source, "busy")

    def wait(seconds: float) -> None:
        waited.append(seconds)
        bucket.proxy.fault = none if len(waited) % 2 == 0 else every(1, "503")

    monkeypatch.setattr("surgery.storage.store.time.sleep", wait)
    bucket.proxy.fault = every(1, "429")
    assert equal(open_checkpoint(url), open_checkpoint(source)) and waited == [1, 2]
    bucket.proxy.fault = every(1, "429")
    assert surgery.push(source, f"s3://{BUCKET}/busy-too").verified and waited == [1, 2] * 2
    monkeypatch.setattr("surgery.storage.store.time.sleep", lambda seconds: None)
    monkeypatch.setattr("surgery.storage.store.WAITS", (1, 2))
    bucket.proxy.fault = every(1, "429")
    with pytest.raises(FileError, match=r"the store is asked too often[\s\S]*try again later"):
        open_checkpoint(f"{url}-again")


def test_a_push_that_has_not_ended_is_no_checkpoint(bucket: Bucket, tiny_hf: Callable[[str], Path]) -> None:
    url = bucket.upload(tiny_hf("llama"), "unfinished")
    bucket.client.put_object(Bucket=BUCKET, Key="unfinished/.surgery-push.json", Body=b"{}")
    with pytest.raises(FileError, match="a push that has not ended"):
        open_checkpoint(url)


def test_names_in_a_bucket_lead_nowhere(bucket: Bucket) -> None:
    bucket.client.put_object(Bucket=BUCKET, Key="evil/a\\b/config.json", Body=b"{}")
    with pytest.raises(SurgeryError, match=r"not a plain file name|as it should"):
        open_checkpoint("s3://bucket/evil")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://bucket/a/../b", "an empty part"),
        ("https://host/x?token=1", "a query"),
        ("http://example.org/x", "in the clear"),
        ("hf://name", "names no repository"),
        ("https://huggingface.co/org/name", r"did you mean hf://org/name\?"),
        ("https://huggingface.co/datasets/org/name/tree/main/a/b", r"did you mean hf://datasets/org/name@main/a/b\?"),
        ("https://me:pw@host/x", "password"),
        ("s3://bucket/a\tb", "control characters"),
        ("https://ho st/x", "a blank in its name"),
    ],
)
def test_addresses_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text)


def test_addresses() -> None:
    assert parse("https://huggingface.co/org/name/resolve/main/x.bin").key == "org/name/resolve/main/x.bin"
    assert str(parse("r2://olmo-data/preprocessed/x")) == "https://olmo-data.org/preprocessed/x"
    assert str(parse("hf://org/name@v1/sub")) == "hf://org/name@v1/sub"
    assert parse("hf://datasets/org/name").kind == "datasets"
    assert is_address(Path("s3://bucket/x")) and parse(Path("s3://bucket/x")).place == "bucket"
    assert not any(map(is_address, ["model", "org/name", "/s3/x", "C:/x", "file:///etc/passwd", "s3", 7]))


ODD = ("a key", "per%20cent", "pl+us", "\u00fcn\u00ef", "\u65e5\u672c", "a (copy)", "it's", "a,b;c=d&e")


def test_keys_as_people_have_them(bucket: Bucket, tmp_path: Path) -> None:
    for name in ODD:
        url = bucket.put(f"odd/{name}", {"config.json": b"{}", f"{name}.txt": name.encode()})
        assert surgery.pull(url, tmp_path / name).address == url
        assert held(tmp_path / name) == {"config.json": b"{}", f"{name}.txt": name.encode()}
        assert surgery.describe(f"{url}/{name}.txt").path == f"{url}/{name}.txt"
    surgery.pull("s3://bucket/odd", tmp_path / "all")
    assert {path.name for path in (tmp_path / "all").iterdir()} == set(ODD)


def test_markers_of_folders_are_no_files(bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    url = bucket.upload(tiny_hf("llama"), "marked/model")
    bucket.put("marked", {"": b"", "model/": b""})
    assert surgery.describe("s3://bucket/marked").kind == "parent" and surgery.describe(url).kind == "checkpoint"
    surgery.pull("s3://bucket/marked", tmp_path / "got")
    assert held(tmp_path / "got" / "model") == held(tiny_hf("llama"))


def test_what_cannot_be_files_says_so(bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.put("both", {"model": b"a file", "model/config.json": b"{}"})
    for work in (surgery.describe, lambda url: surgery.pull(url, tmp_path / "got")):
        with pytest.raises(FileError, match=r"s3://bucket/both: model: both an object and a folder of others"):
            work(url)
    assert not (tmp_path / "got").exists() and surgery.describe(f"{url}/model").kind != "parent"
    url = bucket.put("double", {"a//config.json": b"{}"})
    with pytest.raises(FileError, match=r"double: holds the key 'double/a//config.json', which names no file"):
        surgery.describe(url)


def test_a_place_that_would_hide_an_object_or_be_a_pattern_is_not_written_to(
    bucket: Bucket, tiny_hf: Callable[[str], Path]
) -> None:
    bucket.put("taken", {"x.safetensors": b"mine"})
    source, url = tiny_hf("llama"), f"s3://{BUCKET}/taken/x.safetensors"
    for work in (lambda at: surgery.push(source, at), lambda at: surgery.convert(source, at, to="meta")):
        with pytest.raises(OutputError, match="is an object, which a folder of the same name would hide"):
            work(url)
        with pytest.raises(UsageError, match="would be taken for a pattern"):
            work(f"s3://{BUCKET}/run*")
    assert bucket.objects("taken") == {"x.safetensors": b"mine"}


def test_a_cache_that_cannot_be_written_is_named(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.upload(tiny_hf("llama"), "cached")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "file"))
    for work in (open_checkpoint, lambda url: surgery.convert(tiny_hf("llama"), f"{url}-out", to="meta")):
        with pytest.raises(FileError, match=r"file/\w+/\S+: cannot be written[\s\S]*SURGERY_CACHE says where"):
            work(url)
