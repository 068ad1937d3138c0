"""A source that changes while it is read ends in an error that names the file; no link leads out of it."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FileError, SurgeryError
from surgery.tensors import files
from surgery.tensors.files import File, check_unchanged, watched

MEMORY = 1 << 18
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}


@pytest.fixture
def source(tiny_hf, tmp_path):
    """A model of its own, with a tokenizer, written long enough ago for a change to be seen."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_hf("llama"), folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    time.sleep(0.02)
    return folder


def tree(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "surgery.json"}


def at_read(monkeypatch, number, act):
    """Do something before the n-th read."""
    real, count = os.preadv, [0]

    def preadv(*args):
        count[0] += 1
        if count[0] == number:
            act()
        return real(*args)

    monkeypatch.setattr(os, "preadv", preadv)


def overwrite(path):
    """New weights in place, with the old time of writing, as `cp -p` and `rsync -t` leave them."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 4)
        file.write(os.urandom(before.st_size // 2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path):
    shutil.copy2(path, path.with_name("new"))
    overwrite(path.with_name("new"))
    os.rename(path.with_name("new"), path)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [overwrite, replace, grow, os.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_change_in_the_middle_is_an_error(name, change, source, tmp_path, monkeypatch):
    at_read(monkeypatch, 60, lambda: change(source / name))
    with pytest.raises(FileError, match=rf"{name}: was changed while it was read"):
        surgery.convert(source, tmp_path / "out", to="meta", max_memory=MEMORY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_verify_does_not_judge_a_mixture(name, source, tiny_hf, monkeypatch):
    at_read(monkeypatch, 30, lambda: overwrite(source / name))
    with pytest.raises(FileError, match=rf"{name}: was changed while it was read"):
        surgery.verify(source, tiny_hf("llama"), max_memory=MEMORY)


def test_a_run_does_not_go_on_from_another_save(source, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    done = [0]

    def progress(n):
        done[0] += n
        if done[0] > 600_000:
            raise Stop

    with pytest.raises(Stop):
        surgery.convert(source, tmp_path / "out", to="hf", max_memory=MEMORY, progress=progress)
    overwrite(source / "model.safetensors")
    report = surgery.convert(source, tmp_path / "out", to="hf", max_memory=MEMORY)
    assert report.resumed_bytes == 0
    assert any("another job" in note for note in report.notes)
    surgery.convert(source, tmp_path / "afresh", to="hf", max_memory=MEMORY)
    assert tree(tmp_path / "out") == tree(tmp_path / "afresh")


def test_a_descriptor_that_is_opened_again_is_that_of_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_OPEN", 1)
    (tmp_path / "a").write_bytes(b"old save")
    (tmp_path / "b").write_bytes(b"other")
    a, b = File(tmp_path / "a"), File(tmp_path / "b")
    assert a.read(0, 3) == b"old" and b.read(0, 5) == b"other"
    (tmp_path / "c").write_bytes(b"new save")
    os.rename(tmp_path / "c", tmp_path / "a")
    with pytest.raises(FileError, match="was changed while it was read"):
        a.read(0, 3)
    assert File(tmp_path / "a").read(0, 3) == b"new"  # whoever opens it now, knows what they get


def test_stamps_are_of_the_first_opening_and_every_changed_file_is_named(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    with watched() as outer, watched() as stamps:
        for name in "abc":
            File(tmp_path / name)
    assert list(stamps) == [str(tmp_path / name) for name in "abc"] and outer == stamps
    check_unchanged(stamps)
    time.sleep(0.02)
    for name in "ac":
        (tmp_path / name).write_text("x")
    with pytest.raises(FileError, match=r"/a: was changed while it was read \(and so were .*/c\)"):
        check_unchanged(stamps)
    with watched():
        File(tmp_path / "a")
        (tmp_path / "a").unlink()
        (tmp_path / "a").write_text("again")
        with pytest.raises(FileError, match="was changed"):
            File(tmp_path / "a")


SHARDS = """
import resource, sys, surgery, torch
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print(surgery.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], sync=False, options=dict(o.split("=") for o in sys.argv[4:])).verified)
"""  # noqa: E501


@pytest.mark.slow
def test_any_number_of_shards_with_forty_descriptors(tiny_hf, tmp_path):
    source, tensors = tmp_path / "many", load_file(tiny_hf("qwen3_moe") / "model.safetensors")
    source.mkdir()
    shutil.copy(tiny_hf("qwen3_moe") / "config.json", source)
    names = {name: f"model-{i:05d}-of-{len(tensors):05d}.safetensors" for i, name in enumerate(tensors, 1)}
    for name, file in names.items():
        save_file({name: tensors[name]}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert len(names) > 100
    env = os.environ | {"PYTHONPATH": str(Path(surgery.__file__).parents[1])}
    for to, *options in (["hf", "shard_size=20KB"], ["megatron"]):
        command = [sys.executable, "-c", SHARDS, source, tmp_path / to, to, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.stdout == "True\n", done.stderr
    assert len(list((tmp_path / "hf").iterdir())) > 50


def test_few_descriptors_are_kept_where_few_are_allowed(monkeypatch):
    for allowed, kept in ((1024, 128), (256, 64), (40, 10), (3, 1), (resource.RLIM_INFINITY, 128)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, n=allowed: (n, n))
        assert files.kept_open() == kept


# -- links


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text('{"PRIVATE": "KEY"}')
    return tmp_path / "secret"


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "generation_config.json", "vocab.json",
                                  "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("to", ["hf", "meta"])
def test_no_link_out_of_a_checkpoint_is_copied(to, name, source, secret, tmp_path):
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    with pytest.raises(FileError, match="is a link out of its folder") as caught:
        surgery.convert(source, tmp_path / "out", to=to)
    assert caught.value.file == str(source / name)
    assert not (tmp_path / "out").exists()
    assert surgery.open_checkpoint(source).spec.layers == 6  # looking at it is another matter


def test_nor_a_link_of_links_or_through_a_folder(source, secret, tmp_path):
    (source / "inner").symlink_to("inner2")
    (source / "inner2").symlink_to(secret)
    (source / "chat_template.jinja").symlink_to("inner")
    with pytest.raises(FileError, match="is a link out of its folder"):
        surgery.convert(source, tmp_path / "out", to="hf")
    (source / "chat_template.jinja").unlink()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(source / "tokenizer.json", tmp_path / "elsewhere/tokenizer.model")
    (source / "original").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SurgeryError):
        surgery.convert(source, tmp_path / "out", to="hf")


def test_a_soup_takes_no_template_through_a_link(source, secret, tmp_path):
    (source / "chat_template.jinja").symlink_to(secret)
    recipe = {"merge_method": "linear", "models": [{"model": str(source), "parameters": {"weight": 1}}],
              "dtype": "float32", "chat_template": "auto"}  # fmt: skip
    with pytest.raises(FileError, match="is a link out of its folder"):
        surgery.soup(recipe, tmp_path / "out")


def test_links_within_the_folder_and_to_the_blobs_of_a_hub_cache_are_followed(source, tmp_path):
    (source / "chat.txt").write_text("{{ messages }}")
    (source / "chat_template.jinja").symlink_to("chat.txt")
    surgery.convert(source, tmp_path / "one", to="hf")
    assert (tmp_path / "one/chat_template.jinja").read_text() == "{{ messages }}"
    (source / "chat_template.jinja").unlink()
    (source / "chat.txt").rename(source / "chat_template.jinja")
    snapshot, blobs = tmp_path / "hub/models--a--b/snapshots/0123", tmp_path / "hub/models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    surgery.convert(snapshot, tmp_path / "two", to="hf")
    assert tree(tmp_path / "two").keys() == tree(tmp_path / "one").keys()
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    shutil.move(blobs, tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")  # a cache is no cover for a link to anywhere
    with pytest.raises(FileError, match="is a link out of its folder"):
        surgery.convert(snapshot, tmp_path / "three", to="hf")


def test_a_tokenizer_that_the_user_names_may_be_a_link(source, tiny_hf, tmp_path):
    (tmp_path / "link.json").symlink_to(source / "tokenizer.json")
    surgery.convert(tiny_hf("llama"), tmp_path / "out", to="hf", tokenizer=tmp_path / "link.json")
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == TOKENIZER


def test_hard_links_to_a_source_are_replaced_and_never_written_into(source, tmp_path):
    before, copy = tree(source), tmp_path / "copy"
    shutil.copytree(source, copy, copy_function=os.link)
    assert surgery.verify(source, copy).same
    report = surgery.convert(copy, tmp_path / "from-links", to="hf", max_memory=MEMORY)
    assert report.content_digest == surgery.convert(source, copy, to="hf", force=True, dtype="bf16").source_digest
    assert tree(source) == before
    assert {path.stat().st_nlink for path in source.iterdir()} == {1}
