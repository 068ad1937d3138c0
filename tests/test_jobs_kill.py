"""`surgery run` that is killed at any point goes on with the step that was not finished, and repeats no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killable_run.py")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}


def run(*args):
    command = [sys.executable, PROGRAM, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.thorough)])
def test_kills_at_random_times(tmp_path, kills):
    assert run("random", tmp_path, kills)["kills"] == kills


@pytest.mark.thorough
def test_a_kill_before_and_after_every_call_that_changes_something(tmp_path):
    assert run("calls", tmp_path)["kills"] > 100
