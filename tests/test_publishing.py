"""What appears at the destination or among the data while a run writes is never taken away, and --force is no axe."""

import os
from functools import partial

import pytest

from surgery.containers.output import text_file
from surgery.errors import OutputError, UsageError
from surgery.writing import renaming
from surgery.writing.atomic import atomic_file
from surgery.writing.journal import State
from surgery.writing.replaceable import others
from surgery.writing.staging import Staging, check_free
from surgery.writing.stream import write

FILES = [text_file("config.json", b"{}"), text_file("rank0/model.pt", b"weights")]
OLD = {"model.safetensors": b"old", "config.json": b"old"}


def hidden(dst):
    return dst.with_name(f".{dst.name}.surgery-partial")


def fill(folder, content):
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(dst, meanwhile=lambda: None, **kw):
    """Write FILES; `meanwhile` is done when all of them are written and nothing is published."""

    def closing(done):
        meanwhile()
        return [text_file("surgery.json", b'{"output": {"files": {"config.json": 2, "rank0/model.pt": 7}}}')]

    return write(FILES, dst, max_memory=1 << 20, job={}, closing=closing, **kw)


WRITTEN = {"config.json": b"{}", "rank0/model.pt": b"weights",
           "surgery.json": b'{"output": {"files": {"config.json": 2, "rank0/model.pt": 7}}}'}  # fmt: skip


@pytest.fixture(params=["renameat2", "none"])
def renames(request, monkeypatch):
    """With the system's own call, and where it is missing."""
    if request.param == "none":
        monkeypatch.setattr(renaming, "_renameat2", lambda *args: False)


def folder(dst):
    fill(dst, {"thesis.txt": b"three weeks"})


def file(dst):
    dst.write_bytes(b"three weeks")


def link(dst):
    (dst.parent / "elsewhere").mkdir()
    fill(dst.parent / "elsewhere", {"thesis.txt": b"three weeks"})
    dst.symlink_to("elsewhere")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("make", [folder, file, link])
def test_what_appears_meanwhile_stays(make, force, renames, tmp_path):
    dst = tmp_path / "out"
    with pytest.raises(OutputError, match=r"meanwhile|part of no checkpoint|is no folder"):
        run(dst, lambda: make(dst), force=force)
    kept = dst / "thesis.txt" if dst.is_dir() else dst
    assert kept.read_bytes() == b"three weeks"
    dst.rename(tmp_path / "aside")
    done = run(dst)
    assert done.resumed_bytes == 9  # all was kept
    assert tree(dst) == WRITTEN and not hidden(dst).exists()


def test_an_empty_folder_that_appears_meanwhile_stays_and_one_that_was_there_is_taken(renames, tmp_path):
    with pytest.raises(OutputError, match="made by another program meanwhile"):
        run(tmp_path / "out", lambda: (tmp_path / "out").mkdir())
    assert not list((tmp_path / "out").iterdir())
    run(tmp_path / "out")
    assert tree(tmp_path / "out") == WRITTEN
    (tmp_path / "filled").mkdir()
    with pytest.raises(OutputError, match="made by another program meanwhile"):
        run(tmp_path / "filled", lambda: folder(tmp_path / "filled"))
    assert tree(tmp_path / "filled") == {"thesis.txt": b"three weeks"}


def test_force_replaces_a_checkpoint_and_spares_what_joins_it_meanwhile(renames, tmp_path):
    dst = tmp_path / "out"
    fill(dst, OLD)
    with pytest.raises(OutputError, match=r"part of no checkpoint.*: thesis\.txt"):
        run(dst, lambda: folder(dst), force=True)
    assert tree(dst) == {**OLD, "thesis.txt": b"three weeks"}
    (dst / "thesis.txt").unlink()
    assert run(dst, force=True).resumed_bytes == 9
    assert tree(dst) == WRITTEN and not hidden(dst).exists()


def test_what_comes_between_the_last_look_and_the_renaming_is_put_back(monkeypatch, tmp_path):
    dst = tmp_path / "out"
    real, calls = renaming._renameat2, []

    def late(a, b, at, to, flag):
        if not calls:
            folder(dst)
        calls.append(flag)
        return real(a, b, at, to, flag)

    fill(dst, OLD)
    monkeypatch.setattr(renaming, "_renameat2", late)
    with pytest.raises(OutputError, match=r"part of no checkpoint.*: thesis\.txt"):
        run(dst, force=True)
    assert calls == [renaming.EXCHANGE] * 2
    assert tree(dst) == {**OLD, "thesis.txt": b"three weeks"}


@pytest.mark.parametrize(
    ("content", "strange"),
    [
        (["model.safetensors", "config.json"], []),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "merges.txt",
          "README.md", "LICENSE", ".gitattributes", ".cache/huggingface/download/x.metadata"], []),
        (["iter_0000001/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt", ".DS_Store"], []),
        (["iter_0000001/.metadata", "iter_0000001/common.pt", "iter_0000001/__0_0.distcp"], []),
        (["global_step0/layer_00-model_00-model_states.pt", "global_step0/configs/model.yml", "latest"], []),
        (["consolidated.00.pth", "params.json", "tokenizer.model"], []),
        (["model.safetensors", "config.json", "results.json"], ["results.json"]),
        (["model.safetensors", "runs/events.out.tfevents.1"], ["runs/events.out.tfevents.1"]),
        (["pytorch_model.bin", "config.json", "train.py"], ["train.py"]),
        (["train.bin", "val.bin"], ["train.bin", "val.bin"]),
        (["config.json", "README.md"], ["README.md", "config.json"]),
        (["tokens.npy"], ["tokens.npy"]),
        (["run1/model.safetensors", "run2/model.safetensors"], ["run1/model.safetensors", "run2/model.safetensors"]),
        (["model.safetensors", "checkpoint-9/model.safetensors"], ["checkpoint-9/model.safetensors"]),
        (["iter_1/mp_rank_00/model_optim_rng.pt", "iter_2/mp_rank_00/model_optim_rng.pt"],
         ["iter_1/mp_rank_00/model_optim_rng.pt", "iter_2/mp_rank_00/model_optim_rng.pt"]),
        (["model_and_optim/.metadata", "model_and_optim/__0_0.distcp", "config.json", ".metadata.json"], []),
        (["tokens.bin", "tokens.idx", "bad_lines.jsonl", "essay.txt"], ["bad_lines.jsonl", "essay.txt", "tokens.bin",
                                                                       "tokens.idx"]),
    ],
)  # fmt: skip
def test_force_takes_checkpoints_and_nothing_else(content, strange, tmp_path):
    dst = tmp_path / "out"
    fill(dst, dict.fromkeys(content, b"x"))
    assert others(dst) == strange
    if strange:
        with pytest.raises(OutputError, match="part of no checkpoint"):
            run(dst, force=True)
        assert tree(dst) == dict.fromkeys(content, b"x")
    else:
        run(dst, force=True)
        assert tree(dst) == WRITTEN


def test_force_takes_what_records_list_and_not_a_linked_folder(tmp_path):
    dst = tmp_path / "out"
    fill(dst, {"odd.name": b"", "surgery.json": b'{"output": {"files": {"odd.name": 0}}}'})
    assert others(dst) == []
    tokens = b'{"files": {"tokens-00000.bin": {"documents": 1}}}'
    fill(tmp_path / "text", {"tokens-00000.bin": b"", "tokens-00000.idx": b"", "tokens.json": tokens, "essay.txt": b""})
    assert others(tmp_path / "text") == ["essay.txt"]
    fill(tmp_path / "plan", {"order.u64": b"", "plan.json": b'{"files": {"order.u64": "digest"}}', "x.json": b""})
    assert others(tmp_path / "plan") == ["x.json"]
    fill(tmp_path / "data", {"model.safetensors": b"x"})
    (dst / "more").symlink_to(tmp_path / "data")
    assert others(dst) == ["more"]


@pytest.mark.parametrize("name", [".DS_Store", "rank0/.nfs0000012", ".fuse_hidden00001", "._config.json", "@eaDir/x"])
def test_what_the_system_puts_among_the_data_does_not_matter(name, tmp_path):
    dst = tmp_path / "out"
    run(dst, lambda: fill(hidden(dst) / "data", {name: b"junk"}))
    assert tree(dst) == WRITTEN and not hidden(dst).exists()


def test_what_others_put_among_the_data_is_named_and_kept(tmp_path):
    dst = tmp_path / "out"
    data = hidden(dst) / "data"
    with pytest.raises(OutputError, match=r"among the data: 'rank0/thesis\.txt'"):
        run(dst, lambda: fill(data / "rank0", {"thesis.txt": b"three weeks"}))
    assert not dst.exists()
    (data / "rank0/thesis.txt").rename(tmp_path / "thesis.txt")
    assert run(dst, (data / "al").mkdir).resumed_bytes == 9
    assert tree(dst) == WRITTEN and not (dst / "al").exists()


def test_a_file_that_vanishes_from_the_data_is_written_again(tmp_path):
    dst = tmp_path / "out"
    with pytest.raises(OutputError, match=r"rank0/model\.pt vanished"):
        run(dst, (hidden(dst) / "data/rank0/model.pt").unlink, compare=False)
    run(dst)
    assert tree(dst) == WRITTEN


def test_junk_in_the_hidden_folder_is_no_obstacle(tmp_path):
    dst = tmp_path / "out"
    hidden(dst).mkdir()
    fill(hidden(dst), {".DS_Store": b"", "data/.DS_Store": b""})
    run(dst)
    assert tree(dst) == WRITTEN and not hidden(dst).exists()


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "journal.jsonl"], ["lock", "swap"]])
def test_what_a_kill_after_the_last_step_left_is_tidied_up(left, tmp_path):
    dst = tmp_path / "out"
    run(dst)
    hidden(dst).mkdir()
    fill(hidden(dst), dict.fromkeys(left, b""))
    with pytest.raises(OutputError, match="exists already"):
        check_free(dst, force=False)
    assert not hidden(dst).exists() and tree(dst) == WRITTEN


def test_a_kill_right_after_the_exchange_removes_the_old_folder(tmp_path):
    dst = tmp_path / "out"
    fill(dst, OLD)
    with Staging.open(dst, force=True) as stage:
        stage.begin("job", partial(State, sizes={"config.json": 2}))[0].close()
        fill(hidden(dst) / "data", {"config.json": b"{}"})
        stage.remove = interrupt
        with pytest.raises(KeyboardInterrupt):
            stage.publish({"config.json"})
    assert (hidden(dst) / "swap").exists()
    os.rename(hidden(dst) / "old", hidden(dst) / "data")  # as if it had been killed before that
    with pytest.raises(OutputError, match="exists already"):
        check_free(dst, force=False)
    assert tree(dst) == {"config.json": b"{}"} and not hidden(dst).exists()


def interrupt(name):
    raise KeyboardInterrupt


def test_an_unfinished_file_that_lost_its_tail_is_written_again(tmp_path):
    """The disk may have lost it, as after a power cut: the file is shorter than its journal says."""
    dst = tmp_path / "out"
    with Staging.open(dst) as stage:
        journal, _, _ = stage.begin("job", partial(State, sizes={"a": 100}))
        os.close(stage.create("a", 100))
        journal.append([{"file": "a", "region": 0, "offset": 50, "crcs": [], "counts": {}}])
        journal.close()
    os.truncate(hidden(dst) / "data/a", 60)
    with Staging.open(dst) as stage:
        journal, state, notes = stage.begin("job", partial(State, sizes={"a": 100}))
        journal.close()
        assert state.file is None and notes == ["discarded an unfinished output that does not fit its journal"]


@pytest.mark.parametrize("links", [True, False])
def test_a_single_file_takes_no_name_that_another_program_has_taken(links, tmp_path, monkeypatch):
    def fail(*args, **kw):
        raise OSError(1, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", fail)
    with atomic_file(tmp_path / "a", force=False) as file:
        file.write(b"ours")
    assert tree(tmp_path) == {"a": b"ours"}
    with pytest.raises(OutputError, match="exists already"), atomic_file(tmp_path / "b", force=False):
        (tmp_path / "b").write_bytes(b"three weeks")
    assert tree(tmp_path) == {"a": b"ours", "b": b"three weeks"}


def test_the_working_folder_may_be_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match="the working folder has been removed"):
        check_free("out", force=False)
    run(tmp_path / "out")
    assert tree(tmp_path / "out") == WRITTEN
