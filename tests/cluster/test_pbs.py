"""Scripts of `surgery launch` for PBS through a stand-in: ids, dependencies, arrays, variables, a failing parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import available, running_slurm

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not os.environ.get("SURGERY_SLURM"), reason="make test-slurm")


@pytest.fixture(scope="module")
def pbs(tmp_path_factory):
    assert available(), "Slurm is not installed: see make test-slurm"
    folder = tmp_path_factory.mktemp("pbs")
    for name in ("qsub", "qstat", "qrerun"):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(Path(__file__).with_name("pbs.py").read_text())
        program.chmod(0o755)
    with running_slurm(folder / "daemons", kills_children=True) as env:
        yield {**env, "PATH": f"{folder / 'bin'}:{env['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_selftest(pbs, tmp_path):
    words = [sys.executable, "-m", "surgery", "launch", "--selftest", "--scheduler", "pbs", "--json"]
    done = subprocess.run(words, cwd=tmp_path, env=pbs, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check["good"] for check in json.loads(done.stdout)] == [True] * 6
    jobs = json.loads((tmp_path / "runs/launch-selftest/steps/jobs.json").read_text())["jobs"]
    assert jobs["each"]["ids"][0].endswith("[].server")
