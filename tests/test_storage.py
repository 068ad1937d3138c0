"""Reading where checkpoints lie: the right bytes or a clear error, whatever the store does, by few requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import surgery
from surgery.cli.main import main
from surgery.errors import FileError, OutputError, SurgeryError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.storage import mirror
from surgery.storage.address import is_address, parse
from surgery.tensors import elsewhere
from surgery.tensors.files import File, check_unchanged
from surgery.writing import stream
from tests.buckets import Proxy, every, keys, moto, none

pytest.importorskip("moto")
BUCKET = "bucket"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with moto() as url:
        yield url


@pytest.fixture
def store(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A bucket behind a proxy without faults, and no copies of anything."""
    import boto3

    keys(monkeypatch, tmp_path / "cache")
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket=BUCKET)
    with Proxy(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield Store(client, proxy)
    listed = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    for item in listed:
        client.delete_object(Bucket=BUCKET, Key=item["Key"])


class Store:
    """What lies in a bucket, and the proxy before it."""

    def __init__(self, client: Any, proxy: Proxy) -> None:
        self.client, self.proxy = client, proxy

    def put(self, folder: Path, prefix: str) -> str:
        for path in folder.rglob("*"):
            if path.is_file():
                self.client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
        return f"s3://{BUCKET}/{prefix}"


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


def test_inspect_asks_at_most_four_times_a_shard(store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    url = store.put(sharded(tiny_hf("llama"), tmp_path / "model", 5), "five")
    checkpoint = open_checkpoint(url)
    assert repr(checkpoint).startswith(f"Checkpoint(path '{url}', format hf")
    assert len(checkpoint.files) == 5
    for i in range(1, 6):
        assert len(store.proxy.gets(f"model-{i:05d}-of")) <= 2
    assert len(store.proxy.seen) <= 4 * 5
    assert [m for m, path, _ in store.proxy.seen if "list-type" in path] == ["GET"]


def test_a_conversion_reads_the_same_in_few_requests(
    store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_hf("llama")
    url = store.put(source, "convert")
    there = surgery.convert(url, tmp_path / "there", to="meta", tp=2)
    here = surgery.convert(source, tmp_path / "here", to="meta", tp=2)
    assert (there.content_digest, there.source) == (here.content_digest, url)
    assert len(store.proxy.gets("model.safetensors")) <= 10
    assert surgery.verify(url, tmp_path / "there").verdict.startswith("the same model")
    record = json.loads((tmp_path / "there" / "surgery.json").read_text())
    assert record["source"]["path"] == url
    assert record["source"]["files"]["model.safetensors"] == (source / "model.safetensors").stat().st_size


@pytest.mark.parametrize("fault", ["drop", "half", "503", "lost"])
def test_faults_on_the_way_change_no_byte(
    store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path, fault: str
) -> None:
    source = sharded(tiny_hf("llama"), tmp_path / "model", 3)
    url = store.put(source, f"fault-{fault}")
    store.proxy.fault = every(3, fault)
    assert equal(open_checkpoint(url), open_checkpoint(source))
    assert any(store.proxy.fault(i, "GET", "") for i in range(3))


@pytest.mark.parametrize("fault", ["longer", "endless", "shifted", "huge", "other tag", "redirect"])
def test_a_server_that_lies_is_an_error_in_bounded_memory(store: Store, tmp_path: Path, fault: str) -> None:
    (tmp_path / "in").mkdir()
    data = bytes(range(256)) * 8192
    (tmp_path / "in" / "x.bin").write_bytes(data)
    url = store.put(tmp_path / "in", f"lies-{fault.replace(' ', '-')}")
    path = mirror.folder_of(url) / "x.bin"
    store.proxy.fault = every(1, fault, "GET")
    with pytest.raises(FileError) as caught:
        File(path).read(0, 1000)
    assert f"{url}/x.bin" in str(caught.value)
    assert store.proxy.sent < 20_000_000
    store.proxy.fault = none
    assert File(path).read(300_000, 600_000) == data[300_000:900_000]  # and nothing of it was kept


def test_an_object_that_is_replaced_midway_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.bin").write_bytes(bytes(1 << 20))
    url = store.put(tmp_path / "in", "replaced")
    file = File(mirror.folder_of(url) / "x.bin")
    assert file.read(0, 10) == bytes(10)
    store.client.put_object(Bucket=BUCKET, Key="replaced/x.bin", Body=b"\1" * (1 << 20))
    with pytest.raises(FileError, match="was replaced or removed while it was read"):
        file.read(900_000, 10)
    with pytest.raises(FileError, match="was changed while it was read"):
        check_unchanged({file.path: file.stamp})


def test_a_conversion_whose_source_is_replaced_publishes_nothing(
    store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path
) -> None:
    url = store.put(tiny_hf("llama"), "midway")
    asked = 0

    def replace(number: int, method: str, path: str) -> Any:
        nonlocal asked
        asked += "midway/model.safetensors" in path
        if asked == 2:
            store.client.put_object(Bucket=BUCKET, Key="midway/model.safetensors", Body=b"x" * 2431448)

    store.proxy.fault = replace
    with pytest.raises(FileError, match="replaced or removed"):
        surgery.convert(url, tmp_path / "out", to="meta")
    assert not (tmp_path / "out").exists()


def test_torch_files_are_read_in_ranges_too(store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    surgery.convert(tiny_hf("llama"), tmp_path / "meta", to="meta", tp=2)
    url = store.put(tmp_path / "meta", "torch")
    assert equal(open_checkpoint(url), open_checkpoint(tmp_path / "meta"))
    assert len(store.proxy.gets(".pth")) <= 2 * 10


def test_a_single_object_is_described(store: Store, tiny_hf: Callable[[str], Path]) -> None:
    url = store.put(tiny_hf("llama"), "single")
    answer = surgery.describe(f"{url}/model.safetensors")
    assert answer.kind == "safetensors"
    assert answer.path == f"{url}/model.safetensors"


def test_what_is_not_there_says_so(store: Store) -> None:
    with pytest.raises(FileError, match=r"s3://bucket/nothing: holds no files, or does not exist"):
        open_checkpoint("s3://bucket/nothing")
    with pytest.raises(FileError, match=r"s3://no-bucket/nothing"):
        open_checkpoint("s3://no-bucket/nothing")


def test_a_push_that_has_not_ended_is_no_checkpoint(store: Store, tiny_hf: Callable[[str], Path]) -> None:
    url = store.put(tiny_hf("llama"), "unfinished")
    store.client.put_object(Bucket=BUCKET, Key="unfinished/.surgery-push.json", Body=b"{}")
    with pytest.raises(FileError, match="a push that has not ended"):
        open_checkpoint(url)


def test_names_in_a_bucket_lead_nowhere(store: Store) -> None:
    store.client.put_object(Bucket=BUCKET, Key="evil/a\\b/config.json", Body=b"{}")
    with pytest.raises(SurgeryError, match=r"not a plain file name|as it should"):
        open_checkpoint("s3://bucket/evil")


def test_copies_serve_again_and_pointers_are_no_weights(
    store: Store, tiny_hf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = store.put(tiny_hf("llama"), "again")
    folder = mirror.folder_of(url)
    before = len(store.proxy.gets("config.json"))
    mirror._known.clear()
    assert mirror.folder_of(url) == folder
    assert len(store.proxy.gets("config.json")) == before
    monkeypatch.setattr(elsewhere, "_places", {})  # as another process sees it
    assert (folder / "model.safetensors").stat().st_size < 200
    with pytest.raises(FileError, match="stands for an object that lies elsewhere"):
        open_checkpoint(folder)


def test_what_is_kept_stays_within_the_budget(store: Store, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.bin").write_bytes(bytes(24 << 20))
    file = File(mirror.folder_of(store.put(tmp_path / "in", "budget")) / "x.bin")
    before = len(store.proxy.gets("x.bin"))
    with elsewhere.limited(64 << 20) as left:
        assert left == 56 << 20
        for at in range(0, 24 << 20, 1 << 20):
            file.read(at, 1 << 20)
            assert elsewhere._cache.size <= 8 << 20
    assert len(store.proxy.gets("x.bin")) - before <= 24 // 2 + 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://bucket/a/../b", "an empty part"),
        ("https://host/x?token=1", "a query"),
        ("http://example.org/x", "in the clear"),
        ("hf://name", "names no repository"),
        ("https://me:pw@host/x", "password"),
        ("s3://bucket/a b", "blanks"),
    ],
)
def test_addresses_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text)


def test_addresses() -> None:
    assert str(parse("r2://olmo-data/preprocessed/x")) == "https://olmo-data.org/preprocessed/x"
    assert str(parse("hf://org/name@v1/sub")) == "hf://org/name@v1/sub"
    assert parse("hf://datasets/org/name").kind == "datasets"
    assert is_address(Path("s3://bucket/x")) and parse(Path("s3://bucket/x")).place == "bucket"
    assert not any(map(is_address, ["model", "org/name", "/s3/x", "C:/x", "file:///etc/passwd", "s3", 7]))


def test_a_disk_too_small_for_an_output_on_its_way_is_named(
    store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "free_space", lambda dst: 10)
    with pytest.raises(OutputError, match=r"are needed and 10 B are free[\s\S]*/cache first: .*SURGERY_CACHE"):
        surgery.convert(tiny_hf("llama"), f"s3://{BUCKET}/large", to="meta")
    assert "Contents" not in store.client.list_objects_v2(Bucket=BUCKET, Prefix="large")


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}


def test_an_output_larger_than_the_disk_is_sent_file_by_file(
    store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, url = tiny_hf("llama"), f"s3://{BUCKET}/streamed"
    whole = surgery.convert(source, tmp_path / "here", to="hf", options={"shard_size": "600KB"})
    held = shards(tmp_path / "here")
    assert len(held) > 3

    def keys() -> dict[str, int]:
        found = store.client.list_objects_v2(Bucket=BUCKET, Prefix="streamed/").get("Contents", [])
        return {o["Key"].removeprefix("streamed/"): o["Size"] for o in found}

    most: list[int] = []

    def watch(number: int, method: str, path: str) -> str | None:
        files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
        most.append(sum(p.stat().st_blocks * 512 for p in files))
        stop = "redirect" if fail and method == "PUT" and path.endswith(sorted(held)[2]) else None
        return stop

    monkeypatch.setattr(stream, "free_space", lambda dst: 1_500_000)
    store.proxy.fault, fail = watch, True
    with pytest.raises(FileError, match=sorted(held)[2]):
        surgery.convert(source, url, to="hf", options={"shard_size": "600KB"})
    assert keys().keys() == {".surgery-push.json", *sorted(held)[:2]}  # no index and no config, and claimed
    with pytest.raises(FileError, match="a push that has not ended"):
        open_checkpoint(url)
    fail = False
    store.proxy.seen.clear()
    done = surgery.convert(source, url, to="hf", options={"shard_size": "600KB"})
    assert any("the disk had room for" in note for note in done.notes)
    assert done.verified and done.content_digest == whole.content_digest and max(most) < 1_500_000
    sent = [path.rpartition("/")[2] for method, path, _ in store.proxy.seen if method == "PUT"]
    assert not {*sorted(held)[:2]} & {*sent} and sent[-1] == "surgery.json"
    there = {n: store.client.get_object(Bucket=BUCKET, Key=f"streamed/{n}")["Body"].read() for n in held}
    assert there == held and keys().keys() - held.keys() >= {"config.json", "surgery.json"}
    assert store.proxy.gets("streamed/model-")  # read back where it is
    assert not list((tmp_path / "cache" / "outgoing").iterdir())
    monkeypatch.undo()


def test_what_is_spoilt_on_its_way_is_found_before_it_is_a_checkpoint(
    store: Store, tiny_hf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(number: int, method: str, path: str) -> Any:
        if method == "GET" and "spoilt/model-00001" in path and "list-type" not in path:
            return "other bytes"
        return None

    monkeypatch.setattr(stream, "free_space", lambda dst: 1_500_000)
    store.proxy.fault = spoil
    with pytest.raises(SurgeryError, match=r"read back differently"):
        surgery.convert(tiny_hf("llama"), f"s3://{BUCKET}/spoilt", to="hf", options={"shard_size": "600KB"})
    found = store.client.list_objects_v2(Bucket=BUCKET, Prefix="spoilt/")["Contents"]
    assert not {"spoilt/surgery.json", "spoilt/config.json"} & {o["Key"] for o in found}


@pytest.mark.slow  # both import what runs models
def test_soups_and_upcycling_take_addresses(store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_hf("llama")
    url = store.put(source, "soup")
    config = {"merge_method": "linear", "models": [{"model": url, "parameters": {"weight": 1}},
                                                   {"model": str(source), "parameters": {"weight": 1}}]}  # fmt: skip
    assert surgery.soup(config, tmp_path / "merged").content_digest
    assert surgery.verify(tmp_path / "merged", source).verdict == "the same model"
    done = surgery.upcycle(url, tmp_path / "moe", experts=2, top_k=1, strategy="copy")
    assert done.proof and done.proof.verdict == "exact"


@pytest.mark.thorough
def test_upcycling_and_soups_larger_than_the_disk_are_proven_where_they_are(
    store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
def test_soups_and_upcycling_write_to_addresses(store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_hf("llama")
    moe = surgery.upcycle(source, f"s3://{BUCKET}/moe", experts=2, top_k=1, strategy="copy")
    assert moe.report.output == f"s3://{BUCKET}/moe"
    assert surgery.collapse(f"s3://{BUCKET}/moe", f"s3://{BUCKET}/dense").proof
    assert surgery.verify(source, f"s3://{BUCKET}/dense").verdict == "the same model"
    shutil.copytree(source, tmp_path / "two")
    models = [{"model": str(path), "parameters": {"weight": 1}} for path in (source, tmp_path / "two")]
    surgery.soup({"merge_method": "linear", "models": models}, f"s3://{BUCKET}/merged")
    assert surgery.verify(source, f"s3://{BUCKET}/merged").verdict == "the same model"
    assert b"merge_method: linear" in store.client.get_object(Bucket=BUCKET, Key="merged/README.md")["Body"].read()


def test_a_conversion_to_an_address_is_there_whole_or_not_at_all(
    store: Store, tiny_hf: Callable[[str], Path], tmp_path: Path
) -> None:
    source, url = tiny_hf("llama"), f"s3://{BUCKET}/outgoing"

    def keys() -> set[str]:
        return {o["Key"] for o in store.client.list_objects_v2(Bucket=BUCKET, Prefix="outgoing/").get("Contents", [])}

    def fail(number: int, method: str, path: str) -> str | None:
        return "redirect" if method == "PUT" and path.endswith("/surgery.json") else None

    store.proxy.fault = fail
    with pytest.raises(FileError, match=r"surgery\.json"):
        surgery.convert(source, url, to="hf")
    assert "outgoing/.surgery-push.json" in keys() and "outgoing/surgery.json" not in keys()
    with pytest.raises(FileError, match="a push that has not ended"):
        open_checkpoint(url)
    store.proxy.fault = none
    words = ["convert", str(source), url, "--to", "hf", "--dtype", "bf16", "--json"]
    done = CliRunner().invoke(main, words)  # other bytes take the place of what was begun
    assert json.loads(done.stdout)["output"] == url
    assert open_checkpoint(url).dtype == "bfloat16" and "outgoing/.surgery-push.json" not in keys()
    assert not list((tmp_path / "cache" / "outgoing").iterdir())
    with pytest.raises(OutputError, match="holds other objects"):
        surgery.convert(source, url, to="hf")
    with pytest.raises(UsageError, match="--force replaces nothing in a bucket"):
        surgery.convert(source, url, to="hf", force=True)
