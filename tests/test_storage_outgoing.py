"""Outputs whose destination is an address: there whole or not at all, also where the disk is too small for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import surgery
from surgery.cli.main import main
from surgery.errors import FileError, OutputError, SurgeryError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.storage.address import parse
from surgery.storage.listing import UNFINISHED
from surgery.storage.streamed import Streamed
from surgery.writing import stream
from tests.buckets import BUCKET, Bucket, every, none

pytest.importorskip("moto")


def test_a_disk_too_small_for_an_output_on_its_way_is_named(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "free_space", lambda dst: 10)
    with pytest.raises(OutputError, match=r"are needed and 10 B are free[\s\S]*/cache first: .*SURGERY_CACHE"):
        surgery.convert(tiny_hf("llama"), f"s3://{BUCKET}/large", to="meta")
    assert "Contents" not in bucket.client.list_objects_v2(Bucket=BUCKET, Prefix="large")


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}


def test_an_output_larger_than_the_disk_is_sent_file_by_file(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, url = tiny_hf("llama"), f"s3://{BUCKET}/streamed"
    whole = surgery.convert(source, tmp_path / "here", to="hf", options={"shard_size": "600KB"})
    held = shards(tmp_path / "here")
    assert len(held) > 3

    def keys() -> dict[str, int]:
        found = bucket.client.list_objects_v2(Bucket=BUCKET, Prefix="streamed/").get("Contents", [])
        return {o["Key"].removeprefix("streamed/"): o["Size"] for o in found}

    most: list[int] = []

    def watch(number: int, method: str, path: str) -> str | None:
        files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
        most.append(sum(p.stat().st_blocks * 512 for p in files))
        stop = "redirect" if fail and method == "PUT" and path.endswith(sorted(held)[2]) else None
        return stop

    monkeypatch.setattr(stream, "free_space", lambda dst: 1_500_000)
    bucket.proxy.fault, fail = watch, True
    with pytest.raises(FileError, match=sorted(held)[2]):
        surgery.convert(source, url, to="hf", options={"shard_size": "600KB"})
    assert keys().keys() == {".surgery-push.json", *sorted(held)[:2]}  # no index and no config, and claimed
    with pytest.raises(FileError, match="a push that has not ended"):
        open_checkpoint(url)
    fail = False
    bucket.proxy.seen.clear()
    done = surgery.convert(source, url, to="hf", options={"shard_size": "600KB"})
    assert any("the disk had room for" in note for note in done.notes)
    assert done.verified and done.content_digest == whole.content_digest and max(most) < 1_500_000
    sent = [path.rpartition("/")[2] for method, path, _ in bucket.proxy.seen if method == "PUT"]
    assert not {*sorted(held)[:2]} & {*sent} and sent[-1] == "surgery.json"
    there = {n: bucket.client.get_object(Bucket=BUCKET, Key=f"streamed/{n}")["Body"].read() for n in held}
    assert there == held and keys().keys() - held.keys() >= {"config.json", "surgery.json"}
    assert bucket.proxy.gets("streamed/model-")  # read back where it is
    assert not list((tmp_path / "cache" / "outgoing").iterdir())
    monkeypatch.undo()


def test_what_is_spoilt_on_its_way_is_found_before_it_is_a_checkpoint(
    bucket: Bucket, tiny_hf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(number: int, method: str, path: str) -> Any:
        if method == "GET" and "spoilt/model-00001" in path and "list-type" not in path:
            return "other bytes"
        return None

    monkeypatch.setattr(stream, "free_space", lambda dst: 1_500_000)
    bucket.proxy.fault = spoil
    with pytest.raises(SurgeryError, match=r"read back differently"):
        surgery.convert(tiny_hf("llama"), f"s3://{BUCKET}/spoilt", to="hf", options={"shard_size": "600KB"})
    found = bucket.client.list_objects_v2(Bucket=BUCKET, Prefix="spoilt/")["Contents"]
    assert not {"spoilt/surgery.json", "spoilt/config.json"} & {o["Key"] for o in found}


@pytest.mark.thorough
def test_upcycling_and_soups_larger_than_the_disk_are_proven_where_they_are(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, small = tiny_hf("llama"), {"options": {"shard_size": "400KB"}}
    shutil.copytree(source, tmp_path / "two")
    monkeypatch.setattr(stream, "free_space", lambda dst: 1_200_000)
    done = surgery.upcycle(source, f"s3://{BUCKET}/small-moe", experts=2, top_k=1, strategy="copy", **small)
    assert done.proof and done.proof.verdict == "exact" and "room for" in " ".join(done.report.notes)
    models = [{"model": str(path), "parameters": {"weight": 1}} for path in (source, tmp_path / "two")]
    merged = surgery.soup({"merge_method": "linear", "models": models}, f"s3://{BUCKET}/small-merged", **small)
    assert "room for" in " ".join(merged.notes)
    assert surgery.verify(source, f"s3://{BUCKET}/small-merged").verdict == "the same model"


@pytest.mark.thorough
def test_soups_and_upcycling_write_to_addresses(bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_hf("llama")
    moe = surgery.upcycle(source, f"s3://{BUCKET}/moe", experts=2, top_k=1, strategy="copy")
    assert moe.report.output == f"s3://{BUCKET}/moe"
    assert surgery.collapse(f"s3://{BUCKET}/moe", f"s3://{BUCKET}/dense").proof
    assert surgery.verify(source, f"s3://{BUCKET}/dense").verdict == "the same model"
    shutil.copytree(source, tmp_path / "two")
    models = [{"model": str(path), "parameters": {"weight": 1}} for path in (source, tmp_path / "two")]
    surgery.soup({"merge_method": "linear", "models": models}, f"s3://{BUCKET}/merged")
    assert surgery.verify(source, f"s3://{BUCKET}/merged").verdict == "the same model"
    assert b"merge_method: linear" in bucket.client.get_object(Bucket=BUCKET, Key="merged/README.md")["Body"].read()


def test_a_conversion_to_an_address_is_there_whole_or_not_at_all(
    bucket: Bucket, tiny_hf: Callable[[str], Path], tmp_path: Path
) -> None:
    source, url = tiny_hf("llama"), f"s3://{BUCKET}/outgoing"

    def keys() -> set[str]:
        return {o["Key"] for o in bucket.client.list_objects_v2(Bucket=BUCKET, Prefix="outgoing/").get("Contents", [])}

    def fail(number: int, method: str, path: str) -> str | None:
        return "redirect" if method == "PUT" and path.endswith("/surgery.json") else None

    bucket.proxy.fault = fail
    with pytest.raises(FileError, match=r"surgery\.json"):
        surgery.convert(source, url, to="hf")
    assert "outgoing/.surgery-push.json" in keys() and "outgoing/surgery.json" not in keys()
    with pytest.raises(FileError, match="a push that has not ended"):
        open_checkpoint(url)
    bucket.proxy.fault = none
    words = ["convert", str(source), url, "--to", "hf", "--dtype", "bf16", "--json"]
    done = CliRunner().invoke(main, words)  # other bytes take the place of what was begun
    assert json.loads(done.stdout)["output"] == url
    assert open_checkpoint(url).dtype == "bfloat16" and "outgoing/.surgery-push.json" not in keys()
    assert not list((tmp_path / "cache" / "outgoing").iterdir())
    with pytest.raises(OutputError, match="holds other objects"):
        surgery.convert(source, url, to="hf")
    with pytest.raises(UsageError, match="--force replaces nothing in a bucket"):
        surgery.convert(source, url, to="hf", force=True)


def test_a_file_that_left_before_is_not_sent_again_where_etags_are_no_digests(bucket: Bucket, tmp_path: Path) -> None:
    address, path = parse(f"s3://{BUCKET}/left"), tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    bucket.proxy.fault = every(1, "opaque")
    first = Streamed(address, tmp_path / "plans", ())
    first.leave(path.name, path)
    bucket.proxy.seen.clear()
    Streamed(address, tmp_path / "plans", first.begun).leave(path.name, path)
    assert bucket.puts() == [UNFINISHED]
    path.write_bytes(b"87654321")
    Streamed(address, tmp_path / "plans", (tmp_path / "plans").read_text().split()).leave(path.name, path)
    assert bucket.objects("left")[path.name] == path.read_bytes()
