"""Addresses wherever a path is taken: data commands, evaluation, recipes, training, as with the files here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.data.files.readers import found_at, sidecars
from surgery.data.plans.batches import Batches
from surgery.data.plans.draft import draft_plan
from surgery.data.plans.plan import open_plan, write_plan
from surgery.data.tokenizing.sources import find_sources
from surgery.errors import ConfigError, FileError, OutputError, SurgeryError, UsageError
from surgery.midtraining.evaluation.rows import rows_of
from surgery.midtraining.run_file import make_run
from surgery.storage import copies, mirror
from surgery.storage.address import parse
from surgery.storage.copies import here
from surgery.storage.listing import matching, with_sidecars
from surgery.storage.pull import pull
from surgery.storage.push import push
from surgery.tensors.files import File
from tests.buckets import Proxy, keys, moto
from tests.servers import web

pytest.importorskip("moto")
TEXT = Path(__file__).parent / "golden" / "tokenize"


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of a bucket that holds the golden texts below `text/`."""
    import boto3

    with moto() as url:
        client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"
        )
        client.create_bucket(Bucket="everywhere")
        for path in TEXT.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "everywhere", f"text/{path.relative_to(TEXT)}")
        yield client


@pytest.fixture
def proxy(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    keys(monkeypatch, tmp_path / "cache")
    with Proxy(s3.meta.endpoint_url) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


def said(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output if code else done.stdout


def test_text_is_tokenized_where_it_lies(proxy: Proxy, tmp_path: Path) -> None:
    words = ("--tokenizer", "s3://everywhere/text/tokenizer.json", "--eos", 0, "--workers", 2, "--json")
    report = json.loads(said("data", "tokenize", "s3://everywhere/text/documents", tmp_path / "out", *words))
    assert (tmp_path / "out/tokens.bin").read_bytes() == (TEXT / "megatron_uint16.bin").read_bytes()
    size = sum(path.stat().st_size for path in (TEXT / "documents").iterdir())
    assert report["bytes_read"] == size
    assert not (tmp_path / "cache/copies").exists()
    paths = [one["path"] for one in json.loads((tmp_path / "out/tokens.json").read_text())["sources"]]
    assert paths == [f"s3://everywhere/text/documents/docs-0{i}.jsonl.gz" for i in range(4)]


def test_a_text_that_is_replaced_before_it_is_read_is_refused(proxy: Proxy, s3: Any) -> None:
    s3.put_object(Bucket="everywhere", Key="changing/a.jsonl", Body=b'{"text": "a"}\n')
    [source], _ = find_sources(["s3://everywhere/changing/*.jsonl"])
    with source.open() as file:
        assert file.read() == b'{"text": "a"}\n' and file.seek(3) == 3 and file.read(4) == b'ext"'
        assert file.read(100) == b': "a"}\n' and file.read() == b"" and file.seek(-2, 2) == 12
    s3.put_object(Bucket="everywhere", Key="changing/a.jsonl", Body=b'{"text": "b"}\n')
    with pytest.raises(FileError, match=r"s3://everywhere/changing/a.jsonl: has changed since the work on it began"):
        source.open()


def test_names_that_fit(proxy: Proxy, s3: Any, tmp_path: Path) -> None:
    for name in ("a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/y/d.txt", ".hidden/e.txt", "x/_f.txt"):
        s3.put_object(Bucket="everywhere", Key=f"fit/{name}", Body=b"{}\n")

    def names(pattern: str) -> list[str]:
        return [name.removeprefix("s3://everywhere/fit/") for name in matching(f"s3://everywhere/fit/{pattern}")]

    assert names("*.jsonl") == ["a.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "x/b.jsonl", "x/y/c.jsonl"]
    assert names("x/*/[cd].*") == ["x/y/c.jsonl", "x/y/d.txt"] and names("x/b.jsonl") == ["x/b.jsonl"]
    sources, notes = find_sources(["s3://everywhere/fit"])
    assert len(sources) == 4 and "_f.txt" in notes[0] and ".hidden/e.txt" in notes[0]
    with pytest.raises(FileError, match="nothing there has such a name"):
        names("*.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    with web(tmp_path) as url:
        assert [s.path for s in find_sources([f"{url}/a.jsonl.gz"])[0]] == [f"{url}/a.jsonl.gz"]
        with pytest.raises(UsageError, match="a web server lists nothing"):
            find_sources([f"{url}/*.jsonl.gz"])


SOURCES = [
    {"name": "dolma", "paths": "AT/dolma/*0000[0-4].npy", "weight": 1},
    {"name": "datatrove", "paths": "AT/datatrove_shuffled", "weight": 1},
    {"name": "megatron", "paths": "AT/megatron_int32.idx", "weight": 1},
    {"name": "docs", "paths": ["AT/documents"], "weight": 1, "eos": 0},
]


def planned(folder: Path, at: str, sources: list[dict[str, Any]] = SOURCES) -> Any:
    folder.mkdir(exist_ok=True)
    value = {"sequence_length": 64, "tokenizer": f"{at}/tokenizer.json", "budget": {"tokens": 64 * 300}, "seed": 3}
    text = json.dumps({**value, "sources": sources}).replace("AT", at)
    (folder / "mix.yaml").write_text(text)
    return write_plan(draft_plan(folder / "mix.yaml"), folder / "plan")


def test_a_folder_at_an_address_without_tokens_and_texts_is_an_error(proxy: Proxy, s3: Any, tmp_path: Path) -> None:
    for name in ("README.md", "x.csv", ".tmp/part.npy"):  # as the files below a hidden folder here
        s3.put_object(Bucket="everywhere", Key=f"odd/{name}", Body=bytes(8))
    docs = {"name": "docs", "paths": ["AT/documents", "s3://everywhere/odd"], "weight": 1, "eos": 0}
    with pytest.raises(ConfigError, match="docs: s3://everywhere/odd holds no token files and no texts"):
        planned(tmp_path / "plan", str(TEXT), [docs])


def test_a_plan_of_tokens_at_addresses_is_that_of_the_same_files_here(
    proxy: Proxy, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, local = planned(tmp_path / "there", "s3://everywhere/text"), planned(tmp_path / "local", str(TEXT))
    assert there.digest == local.digest
    paths = [entry.path for source in there.file.sources for entry in source.entries]
    assert paths[0].startswith("s3://everywhere/text/dolma/") and paths[-1].endswith("tokens.bin")
    assert there.sources[0].files[0].bounds is not None  # the .csv.gz beside it came along
    for path in (tmp_path / "there" / "plan").iterdir():
        s3.upload_file(str(path), "everywhere", f"plan/{path.name}")
    shutil.rmtree(tmp_path / "there")
    shutil.rmtree(tmp_path / "cache" / "copies")  # as another machine has it
    copies._known.clear()
    asked = len(proxy.seen)
    plan = open_plan("s3://everywhere/plan")
    assert (Batches(plan, 8).rows(2).tokens == Batches(local, 8).rows(2).tokens).all()
    assert len(proxy.seen) > asked
    shown = json.loads(said("data", "show", "s3://everywhere/plan", "--step", 0, "--rows-per-step", 4, "--json"))
    assert shown["rows"][0]["passages"] and shown["rows_per_step"] == 4
    copies._known.clear()
    mirror._known.clear()
    changed = bytearray((TEXT / "megatron_int32.bin").read_bytes())
    changed[:8] = bytes(8)
    s3.put_object(Bucket="everywhere", Key="text/megatron_int32.bin", Body=bytes(changed))
    with pytest.raises(SurgeryError, match="megatron"):
        open_plan("s3://everywhere/plan")
    s3.upload_file(str(TEXT / "megatron_int32.bin"), "everywhere", "text/megatron_int32.bin")


def test_a_plan_that_is_pushed_names_no_folder_of_this_machine_and_opens_elsewhere(
    proxy: Proxy, tmp_path: Path
) -> None:
    for name in ("here/near", "here/web", "far/web", "far/math"):
        shutil.copytree(TEXT / "dolma", tmp_path / name)
    shutil.copy(TEXT / "tokenizer.json", tmp_path / "far")
    far = [f"{tmp_path}/far/{name}/part-0-00000.npy" for name in ("web", "math")]
    paths = {"near": "near/*.npy", "web": "web/part-0-00000.npy", "far": far}
    sources = [{"name": name, "paths": found, "weight": 1} for name, found in paths.items()]
    mixture = {"sequence_length": 64, "tokenizer": f"{tmp_path}/far/tokenizer.json", "budget": {"tokens": 6400}}
    (tmp_path / "here/mix.yaml").write_text(json.dumps({**mixture, "sources": sources}))
    digest = write_plan(draft_plan(tmp_path / "here/mix.yaml"), tmp_path / "here/plan").digest
    push(tmp_path / "here/plan", "s3://everywhere/private-plan")
    for name in ("near", "web"):
        shutil.copytree(tmp_path / "here" / name, tmp_path / "there" / name)
    pull("s3://everywhere/private-plan", tmp_path / "there/plan")
    text = (tmp_path / "there/plan/plan.json").read_text()
    assert str(tmp_path) not in text and '"far/web/part-0-00000.npy"' in text
    with pytest.raises(ConfigError, match=r"does not say where its files lie, and in \S*/there there is no far/web/"):
        open_plan(tmp_path / "there/plan")
    for root in (None, tmp_path / "here"):
        with pytest.raises(ConfigError, match=r"does not say where its files lie[\s\S]*beside the plan's folder"):
            open_plan("s3://everywhere/private-plan", root=root)
    for name in ("web", "math"):
        shutil.copytree(tmp_path / "far" / name, tmp_path / "there/far" / name)
    shutil.rmtree(tmp_path / "here")
    shutil.rmtree(tmp_path / "far")
    assert open_plan(tmp_path / "there/plan").digest == digest
    shutil.move(tmp_path / "there/plan", tmp_path / "plan")
    assert open_plan(tmp_path / "plan", root=tmp_path / "there").digest == digest


def test_token_files_of_a_web_server_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    copies._known.clear()
    names = [f"AT/dolma/part-0-0000{i}.npy" for i in range(3)]
    source = [{"name": "dolma", "paths": names, "weight": 1}]
    local = planned(tmp_path / "local", str(TEXT), source)
    with web(TEXT) as url:
        there = planned(tmp_path / "there", url, source)
        assert there.digest == local.digest and there.sources[0].files[0].bounds is not None
        assert open_plan(tmp_path / "there" / "plan").digest == local.digest
    copied = sorted(path.name for path in (tmp_path / "cache" / "copies").rglob("*.*"))
    assert copied == [f"part-0-0000{i}{end}" for i in range(3) for end in (".csv.gz", ".npy")]


def test_token_files_are_inspected_and_not_indexed_elsewhere(proxy: Proxy) -> None:
    words = ("--tokenizer", "s3://everywhere/text", "--json")
    there = json.loads(said("data", "inspect", "s3://everywhere/text/megatron_uint16.bin", *words))
    here_ = json.loads(said("data", "inspect", TEXT / "megatron_uint16.bin", "--tokenizer", TEXT, "--json"))
    assert there[0].pop("path") == "s3://everywhere/text/megatron_uint16.bin"
    assert here_[0].pop("path") == str(TEXT / "megatron_uint16.bin") and there == here_
    several = json.loads(said("data", "inspect", "s3://everywhere/text/dolma/*0000[01].*", "--json"))
    assert [one["path"] for one in several] == [f"s3://everywhere/text/dolma/part-0-0000{i}.npy" for i in (0, 1)]
    assert "surgery pull ADDRESS FOLDER" in said("data", "index", "s3://everywhere/text/megatron_uint16.bin", code=2)
    assert "surgery pull ADDRESS FOLDER" in said("data", "plan", "s3://everywhere/mix.yaml", code=1)


def test_an_address_is_no_folder_for_what_is_written_here_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        json.dumps({"steps": {"a": {"shell": "echo > $out", "outputs": {"out": "s3://b/a"}}}})
    )
    (tmp_path / "mix.yaml").write_text(json.dumps({"sequence_length": 8, "budget": 9, "sources": SOURCES}))
    tokens = ("data", "tokenize", TEXT / "documents", "gs://b/out", "--tokenizer", TEXT / "tokenizer.json", "--eos", 0)
    plan, folder = ("data", "plan", "mix.yaml", "s3://b/plan"), ("run", "r.yaml", "--folder", "s3://b/r")
    for code, words in ((2, tokens), (2, plan), (1, ("run", "r.yaml")), (2, folder)):
        assert "surgery push FOLDER ADDRESS sends it" in said(*words, code=code)
    with pytest.raises(UsageError, match="s3://b/run is an address"):
        make_run({"model": {"path": "model"}, "data": {"plan": "plan"}, "output": "s3://b/run"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mix.yaml", "r.yaml"]


def test_a_copy_is_made_once_of_each_version(proxy: Proxy, s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="everywhere", Key="once/a.bin", Body=b"one")
    path = here("s3://everywhere/once/a.bin", ["a.idx", "a.mask"])
    assert path.read_bytes() == b"one" and here("s3://everywhere/once/a.bin", ["a.idx", "a.mask"]) == path
    got = len(proxy.gets("once/a.bin"))
    copies._known.clear()
    assert here("s3://everywhere/once/a.bin", ["a.idx", "a.mask"]) == path and len(proxy.gets("once/a.bin")) == got == 1
    s3.put_object(Bucket="everywhere", Key="once/a.bin", Body=b"two")
    assert here("s3://everywhere/once/a.bin", ["a.idx", "a.mask"]) == path  # a process keeps to what it has seen
    copies._known.clear()
    assert here("s3://everywhere/once/a.bin", ["a.idx", "a.mask"]).read_bytes() == b"two"
    assert here("s3://everywhere/once").is_dir() and here("plain/path") == Path("plain/path")
    with pytest.raises(FileError, match=r"s3://everywhere/once/b.bin: "):
        with_sidecars(parse("s3://everywhere/once/b.bin"), ["a.bin"])
    with pytest.raises(FileError, match="surgery pull ADDRESS FOLDER"):
        File("s3:/bucket/once/a.bin")


def test_the_folder_of_many_token_files_is_listed_once(
    proxy: Proxy, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path / "plan", "s3://everywhere/text", SOURCES[:1])
    copies._known.clear()  # as another process has it
    mirror._known.clear()
    proxy.seen.clear()
    assert open_plan(plan.folder).digest == plan.digest
    assert proxy.listed() == ["text/dolma/", "text/tokenizer.json/", "/everywhere/text/tokenizer.json"]
    assert len({entry.path for entry in plan.file.sources[0].entries}) == 3
    assert plan.sources[0].files[0].bounds is not None
    monkeypatch.setattr("surgery.storage.listing.PAGE", 1)  # of a larger one what is needed is asked for
    for name in ("a.npy", "b.npy", "b.mask"):
        s3.put_object(Bucket="everywhere", Key=f"many/{name}", Body=b"x")
    copies.bring([f"s3://everywhere/many/{n}.npy" for n in "ab"], sidecars)
    assert {p.name for p in found_at("s3://everywhere/many/b.npy").parent.iterdir()} == {"b.mask", "b.npy"}


def test_a_copy_that_another_process_makes_is_waited_for(
    proxy: Proxy, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.storage.landing import landing

    s3.put_object(Bucket="everywhere", Key="wait/a.bin", Body=b"one")
    waited: list[float] = []
    place = here("s3://everywhere/wait/a.bin").parent
    shutil.rmtree(place)
    copies._known.clear()
    other = landing(place, "elsewhere", {})
    held = other.__enter__()

    def wait(seconds: float) -> None:
        waited.append(seconds)
        place.mkdir()
        (place / "a.bin").write_bytes(b"one")

    monkeypatch.setattr("surgery.storage.copies.time.sleep", wait)
    assert here("s3://everywhere/wait/a.bin").read_bytes() == b"one" and waited == [1]
    assert held.hidden.exists()
    other.__exit__(None, None, None)


def test_a_disk_without_room_for_a_copy_is_named(
    proxy: Proxy, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put_object(Bucket="everywhere", Key="room/a.bin", Body=b"one")
    monkeypatch.setattr("surgery.storage.pull.shutil.disk_usage", lambda place: SimpleNamespace(free=2))
    with pytest.raises(OutputError, match="are to come") as caught:
        here("s3://everywhere/room/a.bin")
    assert f"copies are kept in {tmp_path}/cache, or where SURGERY_CACHE says" in str(caught.value.hint)


@pytest.mark.thorough  # it imports what runs models
def test_an_evaluation_from_addresses_gives_the_numbers_of_the_same_files_here(
    proxy: Proxy, s3: Any, tmp_path: Path
) -> None:
    golden = TEXT.parent / "lm_eval"
    (tmp_path / "held-out.txt").write_text("the cat sat on a mat while rain fell over quiet fields. " * 9)
    shutil.copytree(golden, tmp_path / "there", ignore=lambda folder, names: {"golden.json"} & set(names))
    shutil.copy(tmp_path / "held-out.txt", tmp_path / "there")
    for path in (tmp_path / "there").rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "everywhere", f"eval/{path.relative_to(tmp_path / 'there')}")

    def numbers(at: str, model: str) -> Any:
        words = ("--text", f"{at}/held-out.txt", "--tasks", "chosen/*", "--task-data", f"{at}/tasks", "--limit", 4)
        found = json.loads(said("eval", model, *words, "--json"))
        assert found["model"].pop("path") == model
        found["model"].pop("tokenizer")
        return found | {"texts": list(found["texts"].values())}

    there = numbers("s3://everywhere/eval", "s3://everywhere/eval/model")
    assert there == numbers(str(tmp_path / "there"), str(golden / "model"))


def test_a_folder_that_cannot_be_asked_is_not_copied(proxy: Proxy, tmp_path: Path) -> None:
    assert "surgery convert s3://everywhere/text NEW_FOLDER" in said("ask", "s3://everywhere/text", "who?", code=1)
    assert not (tmp_path / "cache" / "copies").exists()


def copied(folder: Path) -> set[str]:
    """The files that were copied into a cache, by their names."""
    return {path.name for path in (folder / "copies").rglob("*") if path.is_file()}


def test_of_a_run_only_what_is_shown_is_copied(proxy: Proxy, s3: Any, tmp_path: Path) -> None:
    plan = planned(tmp_path / "run", str(TEXT), SOURCES[:2])
    for path in plan.folder.iterdir():
        s3.upload_file(str(path), "everywhere", f"run/plan/{path.name}")
        s3.upload_file(str(path), "everywhere", f"planned/{path.name}")
    config = {"model": {"max_sequence_length": 64, "vocab_size": 1000}, "global_train_batch_size": 2, "seed": 1,
              "data": {"paths": [str(TEXT / "dolma/part-0-00000.npy")]}}  # fmt: skip
    s3.put_object(Bucket="everywhere", Key="olmo/config.yaml", Body=json.dumps(config).encode())
    for name in ("run/model.safetensors", "olmo/step10/model.pt", "olmo/train_data/x", "planned/checkpoints/x.bin"):
        s3.put_object(Bucket="everywhere", Key=name, Body=bytes(1 << 16))
    words = ("--step", 0, "--rows-per-step", 2, "--json")
    assert json.loads(said("data", "show", "s3://everywhere/olmo", *words))["rows"]
    assert copied(tmp_path / "cache") == {"config.yaml"}
    assert json.loads(said("data", "show", "s3://everywhere/planned", *words))["rows"]
    assert "name one of plan" in said("data", "show", "s3://everywhere/run", *words, code=1)
    with pytest.raises(UsageError, match="holds no row"):
        rows_of("s3://everywhere/planned", 2, 64, 1000)
    assert copied(tmp_path / "cache") == {"config.yaml", *(path.name for path in plan.folder.iterdir())}


@pytest.mark.thorough
def test_a_question_is_asked_of_an_address_of_which_only_the_model_is_copied(
    proxy: Proxy, s3: Any, tmp_path: Path
) -> None:
    folder = TEXT.parent / "lm_eval" / "model"
    names = {path.name for path in folder.iterdir()}
    for name in names:
        for at in ("ask", "ask/checkpoint-1"):
            s3.upload_file(str(folder / name), "everywhere", f"{at}/{name}")
    for name in ("optimizer.pt", "consolidated.safetensors", "checkpoint-1/optimizer.pt"):
        s3.put_object(Bucket="everywhere", Key=f"ask/{name}", Body=bytes(1 << 16))
    words = ("the cat sat", "--max-new-tokens", 4)
    assert said("ask", "s3://everywhere/ask", *words) == said("ask", folder, *words)
    assert copied(tmp_path / "cache") == names
