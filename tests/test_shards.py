"""An output by several processes has the bytes of one, in whatever order; a process that is killed loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import surgery
from surgery.cli.main import main
from surgery.containers.output import text_file
from surgery.errors import FileError, UsageError
from surgery.writing.shards import Shard, shards_of

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
OWN = ("surgery.json", "soup.json")  # they say when and how


def tree(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file() and p.name not in OWN}  # fmt: skip


def run(*args, code=0):
    done = CliRunner().invoke(main, [*map(str, args)])
    assert done.exit_code == code, done.output
    return done.output


def left(folder):
    return [p.name for p in folder.iterdir() if "surgery" in p.name]


def test_shares_are_the_files_divided_by_size():
    files = [text_file(f"{i}.bin", bytes(size)) for i, size in enumerate((5, 100, 60, 40, 1))]
    shares = [[f.name for f in Shard(i, 2).share(files)] for i in range(2)]
    assert shares == [["0.bin", "1.bin"], ["2.bin", "3.bin", "4.bin"]]
    assert Shard(2, 7).share(files[:2]) == []


@pytest.mark.parametrize("text", ["2/2", "a/2", "1", "-1/2", "0/0", "0/9999999"])
def test_a_share_that_is_none(text):
    with pytest.raises(UsageError, match="--shard"):
        Shard.parse(text)


@pytest.fixture
def whole(tmp_path, tiny_hf):
    surgery.convert(tiny_hf("mixtral"), tmp_path / "whole", to="megatron", topology=surgery.Topology(tp=2, ep=2))
    return tmp_path / "whole"


FLAGS = ["--to", "megatron", "--tp", 2, "--ep", 2]


def test_shares_in_any_order_and_the_last_one_publishes(tmp_path, tiny_hf, whole):
    model, out = tiny_hf("mixtral"), tmp_path / "out"
    said = run("convert", model, out, *FLAGS, "--shard", "2/3")
    assert "share 2 of 3 is written; still missing: 0, 1" in said
    assert json.loads(run("convert", model, out, *FLAGS, "--shard", "0/3", "--json"))["missing"] == [1]
    assert not out.exists()
    run("convert", model, out, *FLAGS, "--shard", "0/3")  # once more does nothing
    report = json.loads(run("convert", model, out, *FLAGS, "--shard", "1/3", "--json"))
    assert report["verified"]
    assert report["resumed_bytes"] > 0.5 * report["bytes"]
    assert tree(out) == tree(whole)
    assert surgery.verify(out, whole).verdict == "the same model"
    assert left(tmp_path) == []


def test_another_plan_does_not_take_the_shares(tmp_path, tiny_hf, whole):
    model, out = tiny_hf("mixtral"), tmp_path / "out"
    run("convert", model, out, *FLAGS, "--shard", "0/2", "--dtype", "fp32")
    run("convert", model, out, *FLAGS, "--shard", "1/2")
    assert tree(out) == tree(whole)
    assert left(tmp_path) == []


def test_a_share_whose_file_was_spoilt_is_written_anew_or_caught(tmp_path, tiny_hf, whole):
    model, out = tiny_hf("mixtral"), tmp_path / "out"
    run("convert", model, out, *FLAGS, "--shard", "0/2")
    (file, *_) = [p for p in shards_of(out).rglob("*.pt") if p.stat().st_size > 1000]
    file.write_bytes(file.read_bytes()[:-7])
    run("convert", model, out, *FLAGS, "--shard", "1/2")
    assert tree(out) == tree(whole)


@pytest.mark.slow
def test_workers_write_the_same_bytes(tmp_path, tiny_hf, whole):
    words = [sys.executable, "-m", "surgery", "convert", tiny_hf("mixtral"), "out", *FLAGS, "--workers", 2, "--json"]
    done = subprocess.run([*map(str, words)], cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["resumed_bytes"] > 0.9 * sum(p.stat().st_size for p in whole.rglob("*.pt"))
    assert tree(tmp_path / "out") == tree(whole)
    assert left(tmp_path) == []


SLOW = """
import os, sys, time
real = os.pwrite
def pwrite(*args):
    time.sleep({nap})
    return real(*args)
os.pwrite = pwrite
"""


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_parent_lose_nothing(tmp_path, tiny_hf, whole):
    """Writing is slow, so that there is time to kill; a sitecustomize makes it so in every process."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SLOW.format(nap=0.02))
    env = ENV | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ENV['PYTHONPATH']}"}
    words = [sys.executable, "-m", "surgery", "convert", tiny_hf("mixtral"), "out", *FLAGS, "--workers", 2, "--json"]
    parent = subprocess.Popen([*map(str, words)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    workers = until(lambda: [p for p in children(parent.pid) if begun(tmp_path)])
    os.kill(workers[0], signal.SIGKILL)
    said, _ = parent.communicate(timeout=300)
    assert parent.returncode == 0
    assert json.loads(said)["verified"]
    assert tree(tmp_path / "out") == tree(whole)

    (tmp_path / "out").rename(tmp_path / "first")
    parent = subprocess.Popen([*map(str, words)], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    workers = until(lambda: [p for p in children(parent.pid) if begun(tmp_path)])
    parent.kill()
    parent.wait()
    until(lambda: not [p for p in workers if alive(p)])
    done = subprocess.run([*map(str, words)], cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(whole)
    assert left(tmp_path) == []


def begun(folder):
    return list(folder.glob(".out.surgery-shards/.*/data/**/*.pt"))


def children(pid):
    """Those that write shares, which `multiprocessing` starts with spawn_main."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            stat = (place / "stat").read_text().rpartition(")")[2].split()
            command = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat[1]) == pid and b"spawn_main" in command:
            found.append(int(place.name))
    return found


def alive(pid):
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z"
    except OSError:
        return False


def until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def soup_of(tmp_path, model):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (tmp_path / "soup.yaml").write_text(f"""
merge_method: linear
models:
  - {{model: {model}, parameters: {{weight: 1}}}}
  - {{model: {other}, parameters: {{weight: 3}}}}
""")
    return tmp_path / "soup.yaml"


@pytest.mark.slow
def test_a_soup_by_shares_and_by_workers(tmp_path, tiny_hf):
    config = soup_of(tmp_path, tiny_hf("llama"))
    flags = ["--to", "meta", "--tp", 2]
    run("soup", config, tmp_path / "whole", *flags)
    run("soup", config, tmp_path / "out", *flags, "--shard", "1/2")
    run("soup", config, tmp_path / "out", *flags, "--shard", "0/2")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    surgery.soup(config, tmp_path / "two", to="meta", topology=surgery.Topology(tp=2), workers=2)
    assert tree(tmp_path / "two") == tree(tmp_path / "whole")
    assert left(tmp_path) == []


def test_what_a_worker_meets_is_raised(tmp_path, tiny_hf, monkeypatch):
    """The source is changed between the plan and the workers."""
    from surgery.conversion import convert

    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_hf("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    request = convert.Convert(to="meta", workers=2)
    plan = convert.prepare(source, request)
    (source / "model.safetensors").write_bytes(b"no more")
    with pytest.raises(FileError, match=r"model\.safetensors"):
        convert.carried_out(plan, tmp_path / "out", request, convert.task_of(source, tmp_path / "out", request))
    assert not (tmp_path / "out").exists()


def test_flags_that_exclude_each_other(tmp_path, tiny_hf):
    assert "exclude" in run(
        "convert", tiny_hf("llama"), tmp_path / "o", "--to", "meta", "--shard", "0/2", "--workers", 2, code=2
    )
    with pytest.raises(UsageError, match="share 0 of 2 is written"):
        surgery.convert(tiny_hf("llama"), tmp_path / "out", to="meta", shard="0/2")


def test_ray_writes_the_same_bytes(tmp_path, tiny_hf, whole):
    ray = pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = ENV["PYTHONPATH"]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _node_ip_address="127.0.0.1")
    try:
        run("convert", tiny_hf("mixtral"), tmp_path / "out", *FLAGS, "--workers", 2, "--engine", "ray")
        assert tree(tmp_path / "out") == tree(whole)
    finally:
        ray.shutdown()


MORTAL = """
import os, signal, time
real = os.pwrite
def pwrite(*args):
    time.sleep(0.02)
    if os.path.exists({flag!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
os.pwrite = pwrite
"""


@pytest.mark.thorough
def test_a_killed_ray_worker_loses_nothing(tmp_path, tiny_hf, whole):
    """One is killed from outside while it writes; then each kills itself, three times a share, until that is over."""
    pytest.importorskip("ray")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(MORTAL.format(flag=str(tmp_path / "flag")))
    env = {k: v for k, v in ENV.items() if k != "RAY_ADDRESS"}
    env["PYTHONPATH"] = f"{tmp_path / 'site'}{os.pathsep}{env['PYTHONPATH']}"
    words = [sys.executable, "-m", "surgery", "convert", str(tiny_hf("mixtral")), "out", *map(str, FLAGS),
             "--workers", "2", "--engine", "ray"]  # fmt: skip
    driver = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    worker = until(lambda: [p for p in titled(b"ray::_answer") if begun(tmp_path)])[0]
    os.kill(worker, signal.SIGKILL)
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    assert tree(tmp_path / "out") == tree(whole)
    assert left(tmp_path) == []

    shutil.rmtree(tmp_path / "out")
    (tmp_path / "flag").touch()
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "of 2 crashed 3 times" in done.stderr and "run the same command again" in done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "flag").unlink()
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(whole)
    assert left(tmp_path) == []


def titled(name):
    return [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if read(p).startswith(name)]


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""
