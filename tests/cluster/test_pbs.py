"""Scripts of `surgery launch` for PBS through a stand-in: ids, dependencies, arrays, variables, a failing parent."""

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


def launched(env, folder, resources, seconds=240):
    """A step that its time limit stops once, and one that comes after it; returns when both are done."""
    (folder / "slow.py").write_text(SLOW)
    (folder / "r.yaml").write_text(f"""
steps:
  slow: {{python: slow.py $out, resources: {resources}}}
  next: {{shell: "cat $slow > $out"}}
""")
    launch = [sys.executable, "-m", "surgery", "launch"]
    words = [*launch, "r.yaml", "--scheduler", "pbs"]
    subprocess.run(words, cwd=folder, env=env, capture_output=True, check=True, timeout=300)
    end, states = time.monotonic() + seconds, []
    while states != ["done", "done"]:
        assert time.monotonic() < end, states
        time.sleep(1)
        words = [*launch, "status", "r.yaml", "--json"]
        said = subprocess.run(words, cwd=folder, env=env, capture_output=True, check=True, timeout=300).stdout
        states = [line["state"] for line in json.loads(said)]


def test_the_job_of_an_operator_reruns_itself_and_the_next_one_waits_for_it(pbs, tmp_path):
    launched({**pbs, "PBS_OPERATOR": "yes"}, tmp_path, "{time: 20s}", 400)
    assert (tmp_path / "attempts").read_text().split() == ["begun", "begun"]
    jobs = json.loads((tmp_path / "runs/r/steps/jobs.json").read_text())["jobs"]
    assert [len(jobs[step]["ids"]) for step in ("slow", "next")] == [1, 1]


def test_the_next_job_of_a_chain_goes_on_where_the_time_limit_stopped_the_last_one(pbs, tmp_path):
    launched(pbs, tmp_path, "{time: 20s, chain: 2}")
    assert (tmp_path / "attempts").read_text().split() == ["begun", "begun"]
    told = [path.read_text() for path in sorted(tmp_path.glob("slow.wrapped.[oe]?"))]  # where Debian's qsub lets it go
    assert len([text for text in told if "let resources.chain be 2 or more" in text]) == 1, "the first job asked for it"


def test_selftest(pbs, tmp_path):
    words = [sys.executable, "-m", "surgery", "launch", "--selftest", "--scheduler", "pbs", "--json"]
    done = subprocess.run(words, cwd=tmp_path, env=pbs, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check["good"] for check in json.loads(done.stdout)] == [True] * 6
    jobs = json.loads((tmp_path / "runs/launch-selftest/steps/jobs.json").read_text())["jobs"]
    assert jobs["each"]["ids"][0].endswith("[].server")
