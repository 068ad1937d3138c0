"""A run that is killed, stopped or starved goes on to the same bits: see killable_midtrain.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def run(*args):
    command = [sys.executable, "-m", "tests.killable_midtrain", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def stopped(said, names):
    """With a checkpoint, and a word of how to go on."""
    assert said.keys() == {*names, "full"}
    for name in names:
        assert said[name]["status"] == 75 and said[name]["end"]["status"] == "stopped"
        assert f"stopped by {name}" in said[name]["error"] and "run the same command again" in said[name]["error"]
        assert said[name]["kept"] == ["step000000006", "step000000007"]
    assert "cannot be written: File too large" in said["full"]["error"] and said["full"]["status"] == 1
    assert said["full"]["end"]["status"] == "failed"
    assert said["full"]["kept"] == ["step000000003", "step000000006"]


@pytest.mark.slow
def test_kills_at_random_times_and_at_system_calls_signals_and_a_limit_on_files(tmp_path):
    said = run("sample", tmp_path)
    assert said["random"]["kills"] == 2
    assert said["calls"]["kills"] == 2 and said["calls"]["calls"] > 1000
    stopped(said["stops"], ["SIGINT"])


@pytest.mark.thorough
@pytest.mark.timeout(1000)
def test_sigkill_at_random_times(tmp_path):
    assert run("random", tmp_path, 10)["kills"] == 10


@pytest.mark.thorough
@pytest.mark.timeout(1000)
def test_sigkill_at_system_calls(tmp_path):
    assert run("calls", tmp_path, 10)["kills"] == 10


@pytest.mark.thorough
@pytest.mark.timeout(1000)
def test_every_signal_stops_with_a_checkpoint(tmp_path):
    stopped(run("stops", tmp_path), ["SIGTERM", "SIGUSR1", "SIGINT"])
