"""Several processes are one: divided by FSDP2, by copies, by experts; gone on with otherwise; started and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.errors import ConfigError
from surgery.midtraining import launching
from surgery.midtraining.launching import torchrun
from surgery.midtraining.mesh import small
from surgery.midtraining.run import midtrain
from surgery.midtraining.run_file import read_run
from surgery.midtraining.run_folder import read_folder
from surgery.midtraining.selftests import MOVED, TESTS
from surgery.midtraining.settings import Parallel
from surgery.midtraining.sharding import Sizes
from surgery.model.spec import Spec
from tests import tiny
from tests.test_midtrain_loop import record, settings

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def ranks(folder, how):
    words = [sys.executable, "-m", "tests.midtrain_ranks", str(folder), how]
    done = subprocess.run(words, capture_output=True, text=True, env=ENV, timeout=1400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def near(said, count):
    assert len(said) == count
    assert {name: far for name, far in said.items() if far["metrics"] > 1e-6 or far["state"] > 1e-5} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [
    ("few", 3),
    pytest.param("two", 6, marks=[pytest.mark.thorough, pytest.mark.timeout(1500)]),
])  # fmt: skip
def test_two_processes_are_one_however_the_model_is_divided(how, count, tmp_path):
    said = ranks(tmp_path, how)
    assert said.pop("the same bits")
    for text in said.pop("planted"):
        assert "self-test mesh: " in text and "of a small copy of the model differs from that of one process" in text
    near(said, count)


@pytest.mark.thorough
@pytest.mark.timeout(1500)
def test_four_processes_are_one(tmp_path):
    near(ranks(tmp_path, "four"), 5)


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_two_processes_are_one_where_the_attention_has_experts(tmp_path):
    near(ranks(tmp_path, "heads"), 2)


@pytest.mark.slow
def test_processes_of_one_host_stop_together_and_say_so(tmp_path):
    tiny.save("llama", tmp_path / "model", l=2, h=48, f=40)
    record(tmp_path / "batches.npz", masked=False, packed=False)
    value = settings(tmp_path / "model", tmp_path / "batches.npz", tmp_path / "out", micro_batch=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(value | {"skip_self_tests": [*TESTS, MOVED], "export": []}))
    words = [sys.executable, "-m", "surgery", "midtrain", str(tmp_path / "run.yaml"), "--nproc", "2"]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    run.send_signal(signal.SIGUSR1)
    told, _ = run.communicate(timeout=300)
    assert run.returncode == 75, told
    assert told.count("step=1 ") == told.count("learning rate 0.003") == 1  # the first speaks for both
    stopped = read_folder(tmp_path / "out")
    assert stopped.status == "stopped" and 1 < stopped.step < 20
    assert (tmp_path / "out" / "checkpoints" / f"step{stopped.step:09d}" / "MANIFEST.json").is_file()
    midtrain(read_run(tmp_path / "run.yaml")[0])  # one goes on
    ended = read_folder(tmp_path / "out")
    assert ended.status == "finished" and [m["step"] for m in ended.metrics] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["before", "log"])
def test_what_the_first_process_alone_refuses_ends_the_others_in_words(fault, tmp_path):
    tiny.save("llama", tmp_path / "model", l=2, h=48, f=40)
    record(tmp_path / "batches.npz", masked=False, packed=False)
    value = settings(tmp_path / "model", tmp_path / "batches.npz", tmp_path / "out", micro_batch=1)
    if fault == "before":
        (tmp_path / "batches.npz").unlink()
    else:
        (tmp_path / "out" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(value | {"skip_self_tests": [*TESTS, MOVED], "export": []}))
    words = [sys.executable, "-m", "surgery", "midtrain", str(tmp_path / "run.yaml"), "--nproc", "2"]
    done = subprocess.run(words, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert ("batches.npz" if fault == "before" else "metrics.jsonl") in done.stderr


def test_who_starts_processes_imports_no_torch():
    code = "import sys, surgery.cli.midtrain, surgery.midtraining.launching; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("flags", "handed"), [(["-q"], ["--quiet"]), (["-v"], ["--verbose"]), ([], [])])
def test_several_processes_say_as_much_as_one(flags, handed, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(launching, "launch", lambda words, nproc: started.append((words, nproc)) or 0)
    (tmp_path / "run.yaml").write_text("{model: {path: m}, data: {plan: p}, output: o}")
    words = ["midtrain", str(tmp_path / "run.yaml"), "--nproc", "2", *flags]
    for more in ([], ["--log-file", str(tmp_path / "log")]):
        done = CliRunner().invoke(main, [*words, *more], catch_exceptions=False)
        assert done.exit_code == 0
        assert started.pop() == (["midtrain", str(tmp_path / "run.yaml"), *handed, *more], 2)


def test_sizes_of_the_mesh():
    assert Sizes.of(Parallel(), 8) == Sizes(1, 8, 1)
    assert Sizes.of(Parallel(replicate=2, ep=4), 8) == Sizes(2, 4, 4)
    for wrong in (Parallel(replicate=3), Parallel(fsdp=4), Parallel(replicate=2, ep=8)):
        with pytest.raises(ConfigError):
            Sizes.of(wrong, 8)


def test_a_small_copy_keeps_what_the_mesh_divides():
    spec = Spec(family="olmoe", layers=16, width=2048, vocab=50304, kv_heads=16, group=1, head_dim=128,
                experts=64, expert_ffn=1024, top_k=8)  # fmt: skip
    found = small(spec, 8)
    assert (found.layers, found.experts, found.top_k, found.expert_ffn) == (2, 16, 8, 48)
    assert found.experts % 8 == 0 and found.width < 100
    assert small(spec.replace(moe_layers=(1, 3)), 4).moe_layers == (1,)


def test_lines_for_two_hosts():
    start = "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint $HEAD_NODE:29500 --rdzv-id $JOB_ID "
    rest = "--nproc-per-node 8 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600 -m surgery midtrain "
    assert torchrun(["midtrain", "my run.yaml"], 8, 2) == [f"{start}{rest}'my run.yaml'"] * 2
    assert torchrun(["midtrain", "r.yaml"], 2, 1)[0].startswith("torchrun --standalone --nproc-per-node 2 ")


ENDING = """
import os, sys
from surgery.cli.main import main
class Last:
    def __del__(self, write=os.write):
        write(1, b"taken down")
sys.last = Last()
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("size", "words", "status"), [("2", ["formats"], 0), ("2", ["formats", "none"], 2), ("1", ["formats"], 0)]
)
def test_one_of_several_processes_ends_without_taking_python_down(size, words, status):
    done = subprocess.run([sys.executable, "-c", ENDING, *words], env=ENV | {"WORLD_SIZE": size}, capture_output=True)
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith(b"taken down") == (size == "1")
    assert (b"megatron" in done.stdout) == (status == 0)
