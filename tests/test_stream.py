"""The writing loop: right bytes, bounded memory, whole or not at all, resumable, never through links."""

import errno
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.containers.output import OutputFile, Region, text_file
from surgery.containers.safetensors import safetensors_file
from surgery.containers.torch_writer import torch_file
from surgery.errors import FileError, LayoutError, OutputError
from surgery.tensors.extent import Extent
from surgery.tensors.files import IO, File
from surgery.tensors.fingerprint import Ledger
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import Concat, Fill, Lazy, Map, Slice, bytes_of, lengths, whole
from surgery.writing import journal, sink, stream
from surgery.writing.ahead import SPARE, ahead
from surgery.writing.interrupt import Interrupted
from surgery.writing.staging import Staging
from surgery.writing.stream import boxes_from, read_through, write

KB = 1 << 10


class Held(InMemory):
    """A tensor in memory, which remembers the boxes that were read."""

    def __init__(self, tensor):
        super().__init__(tensor)
        self.boxes = []

    def read(self, box):
        self.boxes.append(box)
        return super().read(box)


class Failing(Lazy):
    """Raises when what lies behind the first rows is read."""

    def __init__(self, shape, error, good=0):
        self.shape, self.dtype, self.error, self.good = shape, "uint8", error, good

    def read(self, box):
        if box[0][1] > self.good:
            raise self.error
        return torch.ones(lengths(box), dtype=torch.uint8)


def region_file(name, *tensors):
    at, regions = 0, []
    for i, tensor in enumerate(tensors):
        regions.append(Region(f"r{i}", tensor, at))
        at += tensor.nbytes
    return OutputFile(name, at, regions=tuple(regions))


def hidden(dst):
    return dst.with_name(f".{dst.name}.surgery-partial")


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def source(tmp_path):
    """A file of random bytes and 60 extents that cover a part of it."""
    torch.manual_seed(0)
    path = tmp_path / "source"
    path.write_bytes(bytes(bytes_of(torch.randint(0, 256, (600_000,), dtype=torch.uint8))))
    file = File(path)
    return {f"t{i}": Extent(file, 10_000 * i, (40, 125), "bfloat16") for i in range(60)}


def plan(parts):
    names = list(parts)
    return [
        safetensors_file("a/one.safetensors", {n: parts[n] for n in names[:20]}),
        torch_file("two.pt", {n: parts[n] for n in names[20:50]}),
        safetensors_file("three.safetensors", {n: Slice(parts[n], 0, 0, 40) for n in names[50:]}),
        text_file("config.json", b"{}"),
    ]


# -- boxes and threads


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=4), st.integers(1, 60), st.integers(0, 1300))
def test_boxes_from_cover_what_lies_behind_the_start(shape, limit, start):
    n = int(torch.Size(shape).numel())
    flat = torch.arange(n).reshape(shape)
    got = []
    for box in boxes_from(tuple(shape), 4, limit, start):
        part = flat[tuple(slice(a, b) for a, b in box)].reshape(-1).tolist()
        assert 0 < len(part) <= max(1, limit // 4)
        got += part
    assert got == list(range(start, n))


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_ahead_is_bounded(threads):
    made = []

    def maker(i):
        def make():
            made.append(i)
            return i

        return make

    with ahead(map(maker, range(12)), threads) as items:
        for i, item in enumerate(items):
            time.sleep(0.02)
            assert item == i and len(made) <= i + 1 + threads + SPARE
        assert sorted(made) == list(range(12))


def test_things_are_taken_in_order_however_long_each_takes():
    def maker(i):
        def make():
            time.sleep(0.02 * (3 - i % 4))
            return i

        return make

    with ahead(map(maker, range(12)), 4) as items:
        assert list(items) == list(range(12))


def test_an_error_is_raised_in_turn_and_the_threads_end_when_left():
    def fail():
        raise ValueError("two")

    with ahead(iter([lambda: 1, fail, lambda: 3])) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="two"):
            next(items)
    with ahead(itertools.repeat(lambda: 0)) as items:
        next(items)
    assert not [t for t in threading.enumerate() if t.name.startswith("surgery-read")]


# -- what is written


@pytest.mark.parametrize("memory", [1, stream.PARTS * 7 * KB, 64 << 20])
def test_bytes_counts_and_progress(memory, source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MIN_BLOCK", 1000)
    ledger, steps = Ledger(), []
    parts = {name: ledger.tap(name, part) for name, part in source.items()}
    read = IO["bytes"]
    files = plan(parts)
    done = write(files, tmp_path / "out", max_memory=memory, job={}, ledger=ledger, progress=steps.append)
    assert IO["bytes"] - read == done.read_bytes == 600_000
    assert sum(steps) == done.bytes == sum(f.size for f in files) == sum(map(len, tree(tmp_path / "out").values()))
    assert done.resumed_bytes == 0 and done.seconds > 0
    assert torch.load(tmp_path / "out/two.pt", weights_only=True).keys() == {f"t{i}" for i in range(20, 50)}
    again = Ledger()
    read_through(source, again, memory)
    assert again.content_digest() == ledger.content_digest()
    assert not hidden(tmp_path / "out").exists()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask()


def umask():
    old = os.umask(0)
    os.umask(old)
    return old


def test_gaps_between_regions_are_zero(tmp_path):
    file = OutputFile("x", 20, b"ab", (Region("r", Fill((2,), "uint8", 7), 4), Region("s", Fill((1,), "uint8", 9), 10)))
    write([file], tmp_path / "out", max_memory=1, job={})
    assert (tmp_path / "out/x").read_bytes() == b"ab\0\0\7\7\0\0\0\0\x09" + bytes(9)


def test_tensors_that_are_not_contiguous_are_written_in_order(tmp_path):
    held = Held(torch.arange(12, dtype=torch.uint8).reshape(3, 4).T)
    write([region_file("x", held)], tmp_path / "out", max_memory=1, job={})
    assert (tmp_path / "out/x").read_bytes() == bytes(held.tensor.contiguous().reshape(-1).tolist())


def test_copies_are_written_and_not_counted(tmp_path):
    ledger = Ledger()
    tap = ledger.tap("w", Held(torch.ones(3, 3)))
    files = [
        safetensors_file("a.safetensors", {"w": tap}),
        safetensors_file("b.safetensors", {"again": tap}, copies=frozenset({"again"})),
    ]
    write(files, tmp_path / "out", max_memory=1, job={}, ledger=ledger)
    assert ledger.counts["w"][1] == 9
    assert (tmp_path / "out/a.safetensors").read_bytes()[-36:] == (tmp_path / "out/b.safetensors").read_bytes()[-36:]


def test_parts_that_are_not_written_exactly_once_are_named(tmp_path):
    ledger = Ledger()
    taps = {n: ledger.tap(n, Held(torch.ones(2, 2))) for n in ("once", "twice", "never")}
    files = [region_file("x", taps["once"], taps["twice"], Concat([taps["twice"]], 0))]
    with pytest.raises(LayoutError, match=r"twice \(8 of 4 elements\), never \(0 of 4 elements\)"):
        write(files, tmp_path / "out", max_memory=1, job={}, ledger=ledger)
    assert not (tmp_path / "out").exists()


def test_what_is_computed_whole_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MIN_BLOCK", 16)
    held = Held(torch.arange(64, dtype=torch.uint8).reshape(8, 8))
    flipped = Map(lambda t: t.flip(0), [held], whole=True)
    write([region_file("x", flipped)], tmp_path / "out", max_memory=1, job={})
    assert held.boxes == [whole((8, 8))]
    assert (tmp_path / "out/x").read_bytes() == bytes(held.tensor.flip(0).reshape(-1).tolist())


def test_closing_files_know_the_outcome(source, tmp_path):
    ledger = Ledger()
    files = plan({n: ledger.tap(n, p) for n, p in source.items()})

    def closing(done):
        return [text_file("surgery.json", json.dumps([ledger.content_digest(), done.bytes]).encode())]

    done = write(files, tmp_path / "out", max_memory=1 << 20, job={}, ledger=ledger, closing=closing)
    digest, size = json.loads((tmp_path / "out/surgery.json").read_bytes())
    assert digest == ledger.content_digest()
    assert size == sum(f.size for f in files) < done.bytes


def test_a_name_planned_twice_is_refused(tmp_path):
    for names in (["a", "a"], ["a", "a/b"]):
        with pytest.raises(LayoutError, match="planned twice in one output: a"):
            write([text_file(n, b"") for n in names], tmp_path / "out", max_memory=1, job={})
    assert not (tmp_path / "out").exists() and not hidden(tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_stays_within_the_budget(tmp_path):
    """Measured in a process of its own: copying, weaving and slicing columns of 192 MiB within 64 MiB."""
    code = """
import sys
from pathlib import Path
import torch, numpy
from surgery.containers.safetensors import safetensors_file
from surgery.tensors.files import File
from surgery.tensors.fingerprint import Ledger
from surgery.tensors.extent import Extent
from surgery.tensors.lazy import Concat, Slice
from surgery.writing.stream import write
torch.set_num_threads(1)
root, ledger = Path(sys.argv[1]), Ledger()
with (root / "source").open("wb") as f: f.truncate(192 << 20)
file = File(root / "source")
p, q, r = (ledger.tap(f"p{i}", Extent(file, i << 26, (8192, 4096), "bfloat16")) for i in range(3))
rows = Concat([Slice(q, 0, 4096, 8192), Slice(q, 0, 0, 4096)], 0)
cols = Concat([Slice(r, 1, 2048, 4096), Slice(r, 1, 0, 2048)], 0)
files = [safetensors_file("a", {"copy": p, "rows": rows, "cols": cols})]
done = write(files, root / "out", max_memory=64 << 20, job={}, ledger=ledger, durable=False)
print(done.peak, done.read_bytes)
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=env, check=True)
    peak, read = map(int, out.stdout.split())
    assert read == 192 << 20
    assert 0 < peak < 64 << 20


# -- whole or not at all


def test_an_existing_output_is_refused_unless_forced(source, tmp_path):
    dst = tmp_path / "out"
    dst.mkdir()
    (dst / "model.safetensors").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        write(plan(source), dst, max_memory=1 << 20, job={})
    assert tree(dst) == {"model.safetensors": b"precious"} and not hidden(dst).exists()
    write(plan(source), dst, max_memory=1 << 20, job={}, force=True)
    assert sorted(tree(dst)) == ["a/one.safetensors", "config.json", "three.safetensors", "two.pt"]
    assert not hidden(dst).exists()


def test_an_empty_folder_is_taken_for_nothing(source, tmp_path):
    (tmp_path / "out").mkdir()
    write(plan(source), tmp_path / "out", max_memory=1 << 20, job={})
    assert len(tree(tmp_path / "out")) == 4


@pytest.mark.parametrize("force", [False, True])
def test_files_and_links_are_never_replaced(force, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x").write_text("x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    for name in ("link", "dangling", "file"):
        with pytest.raises(OutputError, match="is no folder"):
            write([text_file("a", b"")], tmp_path / name, max_memory=1, job={}, force=force)
    assert tree(tmp_path / "real") == {"x": b"x"}


def test_force_spares_home_and_where_we_are(tmp_path, monkeypatch):
    inner = tmp_path / "here/below"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for dst in (inner, tmp_path / "here", Path.home(), Path("/")):
        if any(dst.iterdir()):
            with pytest.raises(OutputError, match=r"never replaced|cannot be written"):
                write([text_file("a", b"")], dst, max_memory=1, job={}, force=True)


def test_force_spares_the_source(source, tmp_path):
    with pytest.raises(OutputError, match="holds the source"):
        write(plan(source), tmp_path, max_memory=1 << 20, job={}, force=True)
    assert (tmp_path / "source").exists()


def test_a_second_run_on_the_same_output_is_refused(source, tmp_path):
    dst = tmp_path / "out"
    with Staging.open(dst), pytest.raises(OutputError, match="another run is writing"):
        write(plan(source), dst, max_memory=1 << 20, job={})
    write(plan(source), dst, max_memory=1 << 20, job={})


def test_without_file_locks_it_works_too(source, tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(fcntl, "flock", flock)
    write(plan(source), tmp_path / "out", max_memory=1 << 20, job={})
    assert len(tree(tmp_path / "out")) == 4


@pytest.mark.parametrize("at", ["swapped out", "swapped in"])
def test_a_kill_between_the_renames_is_undone_or_finished(at, source, tmp_path):
    dst = tmp_path / "out"
    dst.mkdir()
    (dst / "mine").write_text("precious")
    hidden(dst).mkdir()
    os.rename(dst, hidden(dst) / "old")
    if at == "swapped out":
        with pytest.raises(OutputError, match="exists already"):
            write(plan(source), dst, max_memory=1 << 20, job={})
        assert tree(dst) == {"mine": b"precious"}
    else:
        dst.mkdir()
        (dst / "new").write_text("new")
        with pytest.raises(OutputError, match="exists already"):
            write(plan(source), dst, max_memory=1 << 20, job={})
        assert tree(dst) == {"new": b"new"}
    assert not hidden(dst).exists()


def test_a_hidden_folder_that_is_not_ours_is_refused(source, tmp_path):
    dst = tmp_path / "out"
    hidden(dst).mkdir()
    (hidden(dst) / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"'thesis.tex': not the unfinished output"):
        write(plan(source), dst, max_memory=1 << 20, job={})
    (hidden(dst) / "thesis.tex").unlink()
    (hidden(dst) / "data").mkdir()
    (hidden(dst) / "data/w").write_text("x")
    with pytest.raises(OutputError, match="has no journal"):
        write(plan(source), dst, max_memory=1 << 20, job={})
    assert (hidden(dst) / "data/w").read_text() == "x"
    (hidden(dst) / "journal.jsonl").write_text("something else\n")
    with pytest.raises(OutputError, match="has no journal"):
        write(plan(source), dst, max_memory=1 << 20, job={})


def test_links_in_the_way_are_not_followed(source, tmp_path):
    dst, victim = tmp_path / "out", tmp_path / "victim"
    victim.mkdir()
    (victim / "data").mkdir()
    hidden(dst).symlink_to(victim)
    with pytest.raises(OutputError, match="cannot be written"):
        write(plan(source), dst, max_memory=1 << 20, job={})
    hidden(dst).unlink()
    hidden(dst).mkdir()
    for name in ("data", "lock", "journal.jsonl"):
        (hidden(dst) / "lock").unlink(missing_ok=True)
        (hidden(dst) / name).symlink_to(victim / name)
        with pytest.raises(OutputError):
            write(plan(source), dst, max_memory=1 << 20, job={})
        (hidden(dst) / name).unlink(missing_ok=True)
    assert not tree(victim) and not dst.exists()


# -- failures and resuming


class Stop(Exception):
    """Ends a run in the middle, as a kill would, only that threads are joined."""


def interrupted(files, dst, after, **kw):
    """Run until `after` bytes are done."""
    done = 0

    def progress(n):
        nonlocal done
        done += n
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        write(files, dst, progress=progress, **kw)
    assert not dst.exists()


@pytest.mark.parametrize("after", [1, 150_000, 250_000, 430_000, 590_000, 600_000])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(after, source, tmp_path):
    memory = stream.PARTS * 4 * KB

    def taps():
        ledger = Ledger()
        return ledger, plan({n: ledger.tap(n, p) for n, p in source.items()})

    ledger, files = taps()
    write(files, tmp_path / "whole", max_memory=memory, job={"j": 1}, ledger=ledger)
    again, files = taps()
    interrupted(files, tmp_path / "out", after, max_memory=memory, job={"j": 1}, ledger=again)
    resumed, files = taps()
    steps = []
    done = write(files, tmp_path / "out", max_memory=memory, job={"j": 1}, ledger=resumed, progress=steps.append)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert resumed.counts == ledger.counts
    assert resumed.content_digest() == ledger.content_digest()
    assert sum(steps) == done.bytes
    assert done.read_bytes == 600_000 - sum(len(b) for b in resumed_bytes(done, files))
    assert done.resumed_bytes >= after - 2 * 4 * KB - 1000
    assert done.notes == ()


def resumed_bytes(done, files):
    """Tensor bytes that were not read again."""
    left = done.resumed_bytes
    for file in files:
        n = min(left, file.size)
        left -= n
        for region in file.regions:
            yield bytes(max(0, min(region.stop, n) - region.offset))


def test_a_run_may_go_on_with_another_memory_budget(source, tmp_path):
    write(plan(source), tmp_path / "whole", max_memory=1 << 20, job={})
    interrupted(plan(source), tmp_path / "out", 100_000, max_memory=stream.PARTS * 4 * KB, job={})
    done = write(plan(source), tmp_path / "out", max_memory=stream.PARTS * 7 * KB, job={})
    assert done.resumed_bytes > 90_000
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("change", ["job", "plan", "ledger"])
def test_another_job_starts_afresh_and_says_so(change, source, tmp_path):
    memory = stream.PARTS * 4 * KB
    interrupted(plan(source), tmp_path / "out", 300_000, max_memory=memory, job={"j": 1})
    job, files, ledger = {"j": 1}, plan(source), None
    if change == "job":
        job = {"j": 2}
    elif change == "plan":
        files = plan(source | {"t7": Fill((40, 125), "float16")})
    else:
        ledger = Ledger()
    done = write(files, tmp_path / "out", max_memory=memory, job=job, ledger=ledger)
    assert done.resumed_bytes == 0
    assert done.notes == ("discarded the unfinished output of another job",)


@pytest.mark.parametrize("damage", ["file gone", "file short", "hard link"])
def test_an_unfinished_output_that_was_tampered_with_is_not_believed(damage, source, tmp_path):
    memory, dst = stream.PARTS * 4 * KB, tmp_path / "out"
    interrupted(plan(source), dst, 300_000, max_memory=memory, job={})
    path = hidden(dst) / "data/a/one.safetensors"
    if damage == "file gone":
        path.unlink()
    elif damage == "file short":
        os.truncate(path, 10)
    else:
        os.link(path, tmp_path / "other")
    before = (tmp_path / "other").read_bytes() if damage == "hard link" else None
    done = write(plan(source), dst, max_memory=memory, job={})
    assert done.resumed_bytes == 0 and "does not fit its journal" in done.notes[0]
    if before is not None:
        assert (tmp_path / "other").read_bytes() == before


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.5, 0.2])
def test_a_torn_or_damaged_journal_is_believed_up_to_there(keep, source, tmp_path):
    memory, dst = stream.PARTS * 4 * KB, tmp_path / "out"
    write(plan(source), tmp_path / "whole", max_memory=memory, job={})
    interrupted(plan(source), dst, 500_000, max_memory=memory, job={})
    path = hidden(dst) / "journal.jsonl"
    data = path.read_bytes()
    if keep == 1.0:
        data = data[:-30] + b"#" + data[-29:]
    path.write_bytes(data[: int(len(data) * keep)])
    write(plan(source), dst, max_memory=memory, job={})
    assert tree(dst) == tree(tmp_path / "whole")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_tail_of_a_journal_is_survived(tail, cut):
    lines = [{"surgery-journal": 1, "job": "x"}]
    lines += [{"file": "a", "region": i, "offset": 0, "crcs": [[i, 5]], "counts": {"p": [i, 1]}} for i in range(3)]
    good = b"".join(map(journal._encode, lines))
    state, size = journal._replay(good[:cut] + tail, journal.State)
    assert size <= len(good) or tail
    assert (state is None) == (size < len(journal._encode(lines[0])))
    if state and state.file:
        assert state.crcs == dict.fromkeys(range(state.region + 1), 5)


def full_after(n, number=errno.ENOSPC):
    """pwrite of a disk that takes n more bytes."""
    real, left = os.pwrite, [n]

    def pwrite(fd, data, offset):
        if left[0] <= 0:
            raise OSError(number, os.strerror(number))
        size = real(fd, data[: left[0]], offset)
        left[0] -= size
        return size

    return pwrite


def test_a_full_disk_says_how_much_is_missing_and_keeps_what_is_written(source, tmp_path, monkeypatch):
    memory, dst = stream.PARTS * 4 * KB, tmp_path / "out"
    write(plan(source), tmp_path / "whole", max_memory=memory, job={})
    total = sum(map(len, tree(tmp_path / "whole").values()))
    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", full_after(300_001))
        m.setattr(stream, "free_space", lambda dst: 0 if os.path.lexists(hidden(dst) / "data/two.pt") else 1 << 40)
        with pytest.raises(OutputError, match=r"disk is full: (\d+) more bytes") as caught:
            write(plan(source), dst, max_memory=memory, job={})
    missing = int(str(caught.value).split("full: ")[1].split()[0])
    assert abs(missing - (total - 300_001)) < 10 * KB
    assert "resume" in str(caught.value) or "go on" in str(caught.value)
    assert not dst.exists()
    done = write(plan(source), dst, max_memory=memory, job={})
    assert done.resumed_bytes > 280_000
    assert tree(dst) == tree(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS])
def test_other_errors_of_the_disk(number, source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full_after(200_000, number))
    with pytest.raises(OutputError, match="cannot be written"):
        write(plan(source), tmp_path / "out", max_memory=stream.PARTS * 4 * KB, job={})
    monkeypatch.undo()
    assert write(plan(source), tmp_path / "out", max_memory=stream.PARTS * 4 * KB, job={}).resumed_bytes > 150_000


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_an_error_that_only_fsync_reports(call, source, tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match="cannot be written"):
        write(plan(source), tmp_path / "out", max_memory=stream.PARTS * 4 * KB, job={})
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    write(plan(source), tmp_path / "out", max_memory=stream.PARTS * 4 * KB, job={})


def test_too_little_space_is_seen_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "free_space", lambda dst: 1000)
    with pytest.raises(OutputError, match=r"[\d.]+ k?B are needed and 1\.0 kB are free: [\d.]+ k?B are missing"):
        write(plan(source), tmp_path / "out", max_memory=1 << 20, job={})
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(source, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        write(plan(source), tmp_path / "out", max_memory=1 << 20, job={})
    tmp_path.chmod(0o700)


def test_a_parent_that_is_a_file(source, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write(plan(source), tmp_path / "source/out", max_memory=1 << 20, job={})


def test_what_the_source_raises_is_passed_on_and_nothing_hangs(source, tmp_path):
    bad = region_file("x", source["t0"], Failing((100, 1000), FileError("the file is truncated"), good=50))
    with pytest.raises(FileError, match="truncated"):
        write([bad], tmp_path / "out", max_memory=stream.PARTS * 4 * KB, job={})
    assert not (tmp_path / "out").exists()
    assert {t.name for t in threading.enumerate()} & {"surgery-read", "surgery-sync"} == set()
    fixed = region_file("x", source["t0"], Fill((100, 1000), "uint8", 1))
    assert write([fixed], tmp_path / "out", max_memory=stream.PARTS * 4 * KB, job={}).resumed_bytes >= 10_000


def test_data_are_durable_before_the_journal_says_so(source, tmp_path, monkeypatch):
    """Between the last write to a file and a line about it lies an fdatasync of that file."""
    log, lock = [], threading.Lock()
    pwrite, fdatasync, append = os.pwrite, os.fdatasync, journal.Journal.append

    def name(fd):
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def note(*what):
        with lock:
            log.append(what)

    def logged_append(self, lines):
        note("line", [(x.get("file", "").rpartition("/")[2], x.get("region"), x.get("offset")) for x in lines])
        append(self, lines)

    monkeypatch.setattr(os, "pwrite", lambda fd, d, at: (pwrite(fd, d, at), note("write", name(fd), at))[0])
    monkeypatch.setattr(os, "fdatasync", lambda fd: (note("sync", name(fd)), fdatasync(fd))[0])
    monkeypatch.setattr(journal.Journal, "append", logged_append)
    monkeypatch.setattr(stream, "CHECKPOINT", 8)
    files = plan(source)
    write(files, tmp_path / "out", max_memory=stream.PARTS * 4 * KB, job={})
    regions = {f.name.rpartition("/")[2]: f.regions for f in files}
    writes = [(i, file, at) for i, (kind, file, *at) in enumerate(log) if kind == "write"]
    checked = 0
    for i, (kind, *what) in enumerate(log):
        for file, region, offset in what[0] if kind == "line" else ():
            if not file:
                continue
            synced = max(j for j in range(i) if log[j] == ("sync", file))
            claimed = [(r.offset, r.stop) for r in regions[file][:region]]
            if region is None:  # the whole file
                claimed = [(0, float("inf"))]
            else:
                claimed.append((regions[file][region].offset, regions[file][region].offset + offset))
            late = [at for j, f, (at,) in writes if j > synced and f == file]
            assert not [at for at in late if any(a <= at < b for a, b in claimed)]
            checked += 1
    assert checked > 3  # how many there are depends on how fast the disk is
    assert ("sync", "journal.jsonl") in log


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_between_blocks_and_are_put_back(signum, source, tmp_path):
    before, done = signal.getsignal(signum), 0

    def progress(n):
        nonlocal done
        done += n
        if done > 200_000:
            signal.raise_signal(signum)

    with pytest.raises(Interrupted, match=f"stopped by {signal.Signals(signum).name}") as caught:
        write(plan(source), tmp_path / "out", max_memory=stream.PARTS * 4 * KB, job={}, progress=progress)
    assert caught.value.signum == signum
    assert "run the same command again" in str(caught.value)
    assert signal.getsignal(signum) is before
    assert write(plan(source), tmp_path / "out", max_memory=stream.PARTS * 4 * KB, job={}).resumed_bytes > 200_000


def test_it_works_in_a_thread_that_gets_no_signals(source, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(write(plan(source), tmp_path / "out", max_memory=1 << 20, job={}))
    )
    thread.start()
    thread.join()
    assert results[0].bytes > 600_000


def test_without_fsync_a_new_boot_starts_afresh(source, tmp_path, monkeypatch):
    memory = stream.PARTS * 4 * KB
    interrupted(plan(source), tmp_path / "out", 300_000, max_memory=memory, job={}, durable=False)
    with monkeypatch.context() as m:
        m.setattr(stream, "boot_id", lambda: "another")
        interrupted(plan(source), tmp_path / "out", 300_000, max_memory=memory, job={}, durable=False)
        path = hidden(tmp_path / "out")
        assert path.exists()
    m.setattr(sink, "boot_id", stream.boot_id)
    done = write(plan(source), tmp_path / "out", max_memory=memory, job={}, durable=False)
    assert done.resumed_bytes == 0
    assert done.notes


@pytest.mark.slow
def test_time_is_linear_in_the_number_of_tensors(tmp_path):
    """4 times as many take about 4 times as long (with anything done per tensor for all before it: 16 times)."""

    def seconds(n, run=0):
        ledger, one = Ledger(), InMemory(torch.ones(1))
        file = region_file("many.bin", *(ledger.tap(f"part{i}", one) for i in range(n)))
        began = time.process_time()
        write([file], tmp_path / f"{n}-{run}", max_memory=1 << 20, job={}, ledger=ledger, durable=False)
        return time.process_time() - began

    seconds(100)
    few = min(seconds(4_000, run) for run in range(2))
    assert seconds(16_000) < 8 * few
