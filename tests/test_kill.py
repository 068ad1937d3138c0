"""A run that is killed, stopped or starved leaves nothing visible and goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killable.py")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}


def run(*args):
    command = [sys.executable, PROGRAM, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_sigkill_at_random_times(tmp_path):
    outcome = run("random", tmp_path, 60)
    assert outcome["kills"] >= 60
    assert outcome["completed"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize(("renames", "least"), [("calls", 100), ("plain", 20)])
def test_sigkill_before_and_after_every_call_that_changes_something(renames, least, tmp_path):
    outcome = run(renames, tmp_path)
    assert outcome["kills"] > least
    assert outcome["resumed"] > 20


@pytest.mark.slow
def test_signals_and_limits_stop_cleanly_and_the_next_run_goes_on(tmp_path):
    outcome = run("stops", tmp_path)
    for signum in (signal.SIGINT, signal.SIGTERM):
        said = outcome[signum.name]
        assert said["signum"] == signum
        assert f"stopped by {signum.name}" in said["error"] and "run the same command again" in said["error"]
        assert said["resumed"] > 1 << 20
    assert "cannot be written: File too large" in outcome["FSIZE"]["error"]
