"""A run of `surgery data tokenize` that is killed or stopped leaves nothing visible and goes on to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.killing import tree

PROGRAM = Path(__file__).with_name("killable_tokenize.py")
TOKENIZER = PROGRAM.parent / "golden" / "tokenize" / "tokenizer.json"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}


def run(*args):
    command = [sys.executable, PROGRAM, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_sigkill_before_and_after_every_call_that_changes_something(tmp_path):
    outcome = run("calls", tmp_path, "dolma")
    assert outcome["kills"] > 60
    assert outcome["resumed"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["megatron", "messages"])
def test_sigkill_at_random_times(kind, tmp_path):
    outcome = run("random", tmp_path, kind, 20)
    assert outcome["kills"] >= 20
    assert outcome["completed"] >= 1


def start(folder, out="out"):
    words = ["data", "tokenize", "text.jsonl", out, "--tokenizer", TOKENIZER, "--eos", "0", "--workers", "2"]
    command = [sys.executable, "-m", "surgery", *map(str, words)]
    return subprocess.Popen(command, cwd=folder, env=ENV, stderr=subprocess.PIPE, text=True)


def workers_of(pid):
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [p for p in found if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def text(tmp_path):
    """Enough for some seconds."""
    line = json.dumps({"text": "renel shiostlo shi thoren lotasmi, lo um qui mi. " * 40})
    (tmp_path / "text.jsonl").write_text(f"{line}\n" * 4000)
    return tmp_path


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def grown(folder):
    """Is some of the output written?"""
    return any(p.stat().st_size for p in folder.glob(".out.surgery-partial/data/*.bin"))


@pytest.mark.slow
def test_workers_end_with_a_killed_run_and_the_next_run_gives_the_same(text):
    process = start(text, "whole")
    assert process.wait() == 0
    process = start(text)
    until(lambda: grown(text))
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    until(lambda: not any(alive(worker) for worker in workers))
    assert not (text / "out").exists()
    assert start(text).wait() == 0
    assert tree(text / "out") == tree(text / "whole")


@pytest.mark.slow
def test_a_signal_stops_in_order_and_the_next_run_resumes(text):
    process = start(text)
    until(lambda: grown(text))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT" in said and "run the same command again" in said and "Traceback" not in said
    command = [*map(str, process.args), "--json"]
    done = subprocess.run(command, cwd=text, env=ENV, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert 0 < report["resumed_tokens"] < report["tokens"]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_that_says_so(text):
    process = start(text)
    until(lambda: grown(text))
    for worker in workers_of(process.pid):
        os.kill(worker, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "a worker process was killed" in said and "--workers" in said and "Traceback" not in said
