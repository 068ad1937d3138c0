"""Scripts of `surgery launch` under a real Slurm: dependencies, an array, a failing parent, a requeue, torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.slurm import SLOW, available, running_slurm

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not os.environ.get("SURGERY_SLURM"), reason="make test-slurm")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    assert available(), "Slurm is not installed: see make test-slurm"
    with running_slurm(tmp_path_factory.mktemp("slurm") / "daemons") as env:
        yield {**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def surgery(env, cwd, *args):
    words = [sys.executable, "-m", "surgery", "launch", *map(str, args)]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)


def lines(env, cwd, recipe="r.yaml"):
    return {line["step"]: line for line in json.loads(surgery(env, cwd, "status", recipe, "--json").stdout)}


def settled(env, cwd, expected, seconds=240):
    """The lines of status, once the states are those."""
    end = time.monotonic() + seconds
    while True:
        found = lines(env, cwd)
        states = {step: line["state"] for step, line in found.items()}
        if states == expected:
            return found
        assert time.monotonic() < end, found
        time.sleep(1)


def test_selftest(slurm, tmp_path):
    done = surgery(slurm, tmp_path, "--selftest", "--scheduler", "slurm", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check["good"] for check in json.loads(done.stdout)] == [True] * 6


def test_a_graph_with_seeds_a_failure_and_a_second_launch(slurm, tmp_path):
    (tmp_path / "text").write_text("text\n")
    (tmp_path / "r.yaml").write_text("""
inputs: {text: text}
resources: {time: 5min, cpus: 1, memory: 100MB}
steps:
  prep: {shell: "sleep 1; cp $text $out"}
  train: {matrix: {seed: [42, 666]}, shell: "cat $prep; date +%s.%N > $out; test $seed = 42 -o -e mended"}
  soup: {shell: "cat $train > $out"}
  look: {shell: "wc -l < $soup"}
""")
    done = surgery(slurm, tmp_path, "r.yaml", "--scheduler", "slurm")
    assert done.returncode == 0, done.stderr
    expected = {"prep": "done", "train-42": "done", "train-666": "failed", "soup": "cancelled", "look": "cancelled"}
    settled(slurm, tmp_path, expected)
    begun = float((tmp_path / "runs/r/train-42").read_text())
    assert begun > (tmp_path / "runs/r/prep").stat().st_mtime
    (tmp_path / "mended").touch()
    again = surgery(slurm, tmp_path, "r.yaml", "--scheduler", "slurm", "--json")
    assert [*json.loads(again.stdout)["jobs"]] == ["train-666", "soup", "look"]
    found = settled(slurm, tmp_path, {"train-666": "done", "soup": "done", "look": "done"})
    assert found["look"]["says"] == "2"
    assert float((tmp_path / "runs/r/train-42").read_text()) == begun, "what was done is not done again"


def test_a_step_that_its_time_limit_stops_is_told_before_and_queued_again(slurm, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "r.yaml").write_text("steps: {slow: {python: slow.py $out, resources: {time: 1min}}}")
    (tmp_path / "launch.yaml").write_text("{scheduler: slurm, grace: 40}")
    assert surgery(slurm, tmp_path, "r.yaml").returncode == 0
    settled(slurm, tmp_path, {"slow": "done"}, seconds=400)
    assert (tmp_path / "attempts").read_text().split() == ["begun", "begun"]


def test_a_job_that_is_cancelled_does_not_come_back(slurm, tmp_path):
    step = "trap 'exit 75' TERM; touch begun; while true; do sleep 0.1; done; touch $out"  # as one that can go on
    (tmp_path / "r.yaml").write_text(json.dumps({"steps": {"slow": {"shell": step}}}))
    assert surgery(slurm, tmp_path, "r.yaml", "--scheduler", "slurm").returncode == 0
    settled(slurm, tmp_path, {"slow": "running"})
    while not (tmp_path / "begun").exists():
        time.sleep(0.1)
    subprocess.run(["scancel", lines(slurm, tmp_path)["slow"]["job"]], env=slurm, check=True)
    end = time.monotonic() + 60
    while (found := lines(slurm, tmp_path)["slow"])["queue"] != "CANCELLED":
        assert time.monotonic() < end, found
        time.sleep(1)
    assert found["state"] in ("failed", "stopped")  # Slurm tells the command at the same time as us


def test_torchrun_on_the_nodes_of_a_job(slurm, tmp_path):
    (tmp_path / "ranks.py").write_text("""
import os, pathlib, sys, torch.distributed as dist
dist.init_process_group("gloo")
found = [None] * dist.get_world_size()
dist.all_gather_object(found, dist.get_rank())
if dist.get_rank() == 0:
    pathlib.Path(sys.argv[1]).write_text(str(found))
dist.destroy_process_group()
""")
    (tmp_path / "r.yaml").write_text("steps: {ranks: {python: ranks.py $out, resources: {time: 5min, processes: 2}}}")
    assert surgery(slurm, tmp_path, "r.yaml", "--scheduler", "slurm").returncode == 0
    settled(slurm, tmp_path, {"ranks": "done"})
    assert (tmp_path / "runs/r/ranks").read_text() == "[0, 1]"
    script = tmp_path / "runs/r/steps/ranks.sbatch"
    (tmp_path / "r.yaml").write_text((tmp_path / "r.yaml").read_text().replace("processes", "nodes: 2, processes"))
    assert (
        surgery(
            slurm, tmp_path, "r.yaml", "--scheduler", "slurm", "--write-only", "two", "--folder", "other"
        ).returncode
        == 0
    )
    assert "srun" in (tmp_path / "two/ranks.sbatch").read_text()
    assert "srun" not in script.read_text()
