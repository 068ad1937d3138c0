"""Reading where checkpoints lie: the right bytes or a clear error, whatever the store does, by few requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import FileError
from surgery.formats.registry import open_checkpoint
from surgery.storage import mirror
from surgery.tensors import elsewhere
from surgery.tensors.files import File, check_unchanged
from tests.buckets import BUCKET, Bucket, every, none

pytest.importorskip("moto")


def sharded(source: Path, into: Path, shards: int) -> Path:
    """The same checkpoint with an index and so many shards."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, into)
    tensors, index = load_file(into / "model.safetensors"), {}
    (into / "model.safetensors").unlink()
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = {k: tensors[k] for k in sorted(tensors)[i::shards]}
        save_file(mine, into / name, {"format": "pt"})
        index |= dict.fromkeys(mine, name)
    (into / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return into


def equal(a: Any, b: Any) -> bool:
    return a.parts.keys() == b.parts.keys() and all(torch.equal(a.parts[n].full(), b.parts[n].full()) for n in a.parts)


def test_inspect_asks_at_most_four_times_a_shard(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path
) -> None:
    url = bucket.upload(sharded(tiny_hf("llama"), tmp_path / "model", 5), "five")
    checkpoint = open_checkpoint(url)
    assert repr(checkpoint).startswith(f"Checkpoint(path '{url}', format hf")
    assert len(checkpoint.files) == 5
    for i in range(1, 6):
        assert len(bucket.proxy.gets(f"model-{i:05d}-of")) <= 2
    assert len(bucket.proxy.seen) <= 4 * 5
    assert [m for m, path, _ in bucket.proxy.seen if "list-type" in path] == ["GET"]


def test_a_conversion_reads_the_same_in_few_requests(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_hf("llama")
    url = bucket.upload(source, "convert")
    there = surgery.convert(url, tmp_path / "there", to="meta", tp=2)
    here = surgery.convert(source, tmp_path / "here", to="meta", tp=2)
    assert (there.content_digest, there.source) == (here.content_digest, url)
    assert len(bucket.proxy.gets("model.safetensors")) <= 10
    assert surgery.verify(url, tmp_path / "there").verdict.startswith("the same model")
    record = json.loads((tmp_path / "there" / "surgery.json").read_text())
    assert record["source"]["path"] == url
    assert record["source"]["files"]["model.safetensors"] == (source / "model.safetensors").stat().st_size


@pytest.mark.parametrize("fault", ["drop", "half", "503", "lost"])
def test_faults_on_the_way_change_no_byte(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path, fault: str
) -> None:
    source = sharded(tiny_hf("llama"), tmp_path / "model", 3)
    url = bucket.upload(source, f"fault-{fault}")
    bucket.proxy.fault = every(3, fault)
    assert equal(open_checkpoint(url), open_checkpoint(source))
    assert any(bucket.proxy.fault(i, "GET", "") for i in range(3))


@pytest.mark.parametrize("fault", ["longer", "endless", "shifted", "huge", "other tag", "redirect"])
def test_a_server_that_lies_is_an_error_in_bounded_memory(bucket: Bucket, tmp_path: Path, fault: str) -> None:
    (tmp_path / "in").mkdir()
    data = bytes(range(256)) * 8192
    (tmp_path / "in" / "x.bin").write_bytes(data)
    url = bucket.upload(tmp_path / "in", f"lies-{fault.replace(' ', '-')}")
    path = mirror.folder_of(url) / "x.bin"
    bucket.proxy.fault = every(1, fault, "GET")
    with pytest.raises(FileError) as caught:
        File(path).read(0, 1000)
    assert f"{url}/x.bin" in str(caught.value)
    assert bucket.proxy.sent < 20_000_000
    bucket.proxy.fault = none
    assert File(path).read(300_000, 600_000) == data[300_000:900_000]  # and nothing of it was kept


def test_an_object_that_is_replaced_midway_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.bin").write_bytes(bytes(1 << 20))
    url = bucket.upload(tmp_path / "in", "replaced")
    file = File(mirror.folder_of(url) / "x.bin")
    assert file.read(0, 10) == bytes(10)
    bucket.client.put_object(Bucket=BUCKET, Key="replaced/x.bin", Body=b"\1" * (1 << 20))
    with pytest.raises(FileError, match="was replaced or removed while it was read"):
        file.read(900_000, 10)
    with pytest.raises(FileError, match="was changed while it was read"):
        check_unchanged({file.path: file.stamp})


def test_a_conversion_whose_source_is_replaced_publishes_nothing(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path
) -> None:
    url = bucket.upload(tiny_hf("llama"), "midway")
    asked = 0

    def replace(number: int, method: str, path: str) -> Any:
        nonlocal asked
        asked += "midway/model.safetensors" in path
        if asked == 2:
            bucket.client.put_object(Bucket=BUCKET, Key="midway/model.safetensors", Body=b"x" * 2431448)

    bucket.proxy.fault = replace
    with pytest.raises(FileError, match="replaced or removed"):
        surgery.convert(url, tmp_path / "out", to="meta")
    assert not (tmp_path / "out").exists()


def test_torch_files_are_read_in_ranges_too(bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    surgery.convert(tiny_hf("llama"), tmp_path / "meta", to="meta", tp=2)
    url = bucket.upload(tmp_path / "meta", "torch")
    assert equal(open_checkpoint(url), open_checkpoint(tmp_path / "meta"))
    assert len(bucket.proxy.gets(".pth")) <= 2 * 10


def test_a_single_object_is_described(bucket: Bucket, tiny_hf: Callable[[str], Path]) -> None:
    url = bucket.upload(tiny_hf("llama"), "single")
    answer = surgery.describe(f"{url}/model.safetensors")
    assert answer.kind == "safetensors"
    assert answer.path == f"{url}/model.safetensors"


def test_copies_serve_again_and_pointers_are_no_weights(
    bucket: Bucket, tiny_hf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.upload(tiny_hf("llama"), "again")
    folder = mirror.folder_of(url)
    before = len(bucket.proxy.gets("config.json"))
    mirror._known.clear()
    assert mirror.folder_of(url) == folder
    assert len(bucket.proxy.gets("config.json")) == before
    monkeypatch.setattr(elsewhere, "_places", {})  # as another process sees it
    assert (folder / "model.safetensors").stat().st_size < 200
    with pytest.raises(FileError, match="stands for an object that lies elsewhere"):
        open_checkpoint(folder)


def test_of_a_run_with_many_checkpoints_only_what_is_looked_at_is_read(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_hf("llama")
    url = bucket.upload(source, "many")
    for i in range(30):
        bucket.put(f"many/checkpoint-{i}", {"config.json": (source / "config.json").read_bytes(), "x.json": b"{}"})
    bucket.upload(source, "many/checkpoint-7")
    assert equal(open_checkpoint(url), open_checkpoint(source)) and not bucket.proxy.gets("checkpoint-")
    assert equal(open_checkpoint(f"{url}/checkpoint-7"), open_checkpoint(source))
    bucket.proxy.seen.clear()
    assert surgery.describe("s3://bucket/many/").kind == "checkpoint"
    mirror._known.clear()
    assert equal(open_checkpoint(mirror.folder_of(url) / "checkpoint-7"), open_checkpoint(source))
    assert not bucket.proxy.gets("checkpoint-8")


def test_what_is_kept_stays_within_the_budget(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.bin").write_bytes(bytes(24 << 20))
    file = File(mirror.folder_of(bucket.upload(tmp_path / "in", "budget")) / "x.bin")
    before = len(bucket.proxy.gets("x.bin"))
    with elsewhere.limited(64 << 20) as left:
        assert left == 56 << 20
        for at in range(0, 24 << 20, 1 << 20):
            file.read(at, 1 << 20)
            assert elsewhere._cache.size <= 8 << 20
    assert len(bucket.proxy.gets("x.bin")) - before <= 24 // 2 + 6


@pytest.mark.slow  # both import what runs models
def test_soups_and_upcycling_take_addresses(bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_hf("llama")
    url = bucket.upload(source, "soup")
    config = {"merge_method": "linear", "models": [{"model": url, "parameters": {"weight": 1}},
                                                   {"model": str(source), "parameters": {"weight": 1}}]}  # fmt: skip
    assert surgery.soup(config, tmp_path / "merged").content_digest
    assert surgery.verify(tmp_path / "merged", source).verdict == "the same model"
    done = surgery.upcycle(url, tmp_path / "moe", experts=2, top_k=1, strategy="copy")
    assert done.proof and done.proof.verdict == "exact"
