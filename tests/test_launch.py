"""`surgery launch` writes plain scripts, submits each after those that it needs, and says what became of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main

GOLDEN = Path(__file__).parent / "golden" / "launch"
RECIPE = """
inputs: {text: text}
vars: {seeds: [42, 666]}
resources: {time: 1h}
steps:
  prep: {shell: "cp $text $out", about: Prepare it}
  train:
    matrix: {seed: $seeds}
    surgery: midtrain $config
    config: {model: {path: model}, data: {seed: $seed, mixture: $prep}, output: $out}
    resources: {time: 1-12:00:00, nodes: 2, gpus: 8, cpus: 32, memory: 512GB, processes: 8}
  soup: {shell: "cat $train > $out", resources: {gpus: 1, processes: 2, chain: 2}}
"""
SITE = """
account: llm
partition: gpu
directives: [--qos=high]
modules: [cuda/12.8, hpcx]
setup: |
  source ~/venv/bin/activate
  export NCCL_DEBUG=WARN
container: apptainer exec --nv image.sif
python: python3
grace: 600
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("text\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def surgery(*args, code=0):
    done = CliRunner().invoke(main, [*map(str, args)])
    assert done.exit_code == code, done.output
    return done.output


def shown(path, place):
    return path.read_text().replace(str(place), "/place").replace(sys.executable, "/venv/python")


CASES = {
    "slurm-plain": ("slurm", "", "train-42.sbatch"),
    "slurm-site": ("slurm", SITE, "train-42.sbatch"),
    "slurm-one-node": ("slurm", SITE, "soup.sbatch"),
    "slurm-array": ("slurm", SITE + "arrays: 2", "train.sbatch"),
    "pbs-site": ("pbs", SITE.replace("--qos=high", "-p 100"), "train-42.pbs"),
    "pbs-array": ("pbs", SITE.replace("--qos=high", "-p 100") + "arrays: 2", "train.pbs"),
    "pbs-plain": ("pbs", "requeue: false", "prep.pbs"),
}


@pytest.mark.parametrize("case", CASES)
def test_scripts(place, case):
    scheduler, site, name = CASES[case]
    (place / "launch.yaml").write_text(f"scheduler: {scheduler}\n{site}")
    surgery("launch", "r.yaml", "--write-only", "scripts")
    golden = GOLDEN / f"{case}.sh"
    if os.environ.get("SURGERY_GOLDEN"):
        golden.write_text(shown(place / "scripts" / name, place))
    assert shown(place / "scripts" / name, place) == golden.read_text()
    subprocess.run(["bash", "-n", place / "scripts" / name], check=True)


STAND_IN = """#!{python}
import json, os, sys
place = {place!r}
calls = open(place + "/calls").read().splitlines() if os.path.exists(place + "/calls") else []
if os.path.exists(place + "/refuse") and len(calls) == 2:
    sys.exit("no more jobs")
open(place + "/calls", "a").write(json.dumps(sys.argv[1:]) + "\\n")
print({answer})
"""


def stand_in(place, name, answer, monkeypatch):
    """A program that writes down how it is called, and answers with a number of its own."""
    (place / "bin").mkdir(exist_ok=True)
    path = place / "bin" / name
    path.write_text(STAND_IN.format(python=sys.executable, place=str(place), answer=answer))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}")


def calls(place):
    return [json.loads(line) for line in (place / "calls").read_text().splitlines()]


def test_slurm_is_given_every_job_after_those_that_it_needs(place, monkeypatch):
    stand_in(place, "sbatch", "f'{100 + len(calls)};cluster'", monkeypatch)
    surgery("launch", "r.yaml", "--scheduler", "slurm", "--after", "7", "--after", "8")
    steps = place / "runs/r/steps"
    kill = ["--parsable", "--kill-on-invalid-dep=yes"]
    assert calls(place) == [
        [*kill, "--dependency=afterok:7:8", f"{steps}/prep.sbatch"],
        [*kill, "--dependency=afterok:100", f"{steps}/train-42.sbatch"],
        [*kill, "--dependency=afterok:100", f"{steps}/train-666.sbatch"],
        [*kill, "--dependency=afterok:101:102", f"{steps}/soup.sbatch"],
        [*kill, "--dependency=afterok:101:102,afterany:103", f"{steps}/soup.sbatch"],
    ]
    jobs = json.loads((steps / "jobs.json").read_text())["jobs"]
    assert {name: job["ids"] for name, job in jobs.items()} == {
        "prep": ["100"], "train-42": ["101"], "train-666": ["102"], "soup": ["103", "104"]}  # fmt: skip


def test_pbs_and_arrays(place, monkeypatch):
    stand_in(
        place, "qsub", "f'{100 + len(calls)}' + ('[]' if 'train' in sys.argv[-1] else '') + '.server'", monkeypatch
    )
    (place / "launch.yaml").write_text("{scheduler: pbs, arrays: 2}")
    surgery("launch", "r.yaml")
    steps = place / "runs/r/steps"
    assert calls(place) == [
        [f"{steps}/prep.pbs"],
        ["-W", "depend=afterok:100.server", f"{steps}/train.pbs"],
        ["-W", "depend=afterok:101[].server", f"{steps}/soup.pbs"],
        ["-W", "depend=afterok:101[].server,afterany:102.server", f"{steps}/soup.pbs"],
    ]


def test_what_is_done_is_not_submitted_and_jobs_run_the_recipe_as_it_was(place, monkeypatch):
    stand_in(place, "sbatch", "100 + len(calls)", monkeypatch)
    surgery("run", "r.yaml", "--step", "prep")
    surgery("launch", "r.yaml", "--scheduler", "slurm", "--set", "seeds=[1]", "--from", "train")
    assert [Path(call[-1]).stem for call in calls(place)] == ["train-1", "soup", "soup"]
    (place / "r.yaml").write_text("no recipe any more")
    lines = json.loads(surgery("run", "runs/r", "--dry-run", "--json"))
    assert [(line["step"], line["runs"]) for line in lines] == [("prep", False), ("train-1", True), ("soup", True)]
    assert lines[0]["reads"] == {"text": str(place / "text")}
    assert "before and is not done" in surgery("launch", "runs/r", "--scheduler", "slurm", "--step", "soup", code=2)


def test_a_scheduler_that_refuses_says_what_is_submitted(place, monkeypatch):
    stand_in(place, "sbatch", "100 + len(calls)", monkeypatch)
    (place / "refuse").touch()
    said = surgery("launch", "r.yaml", "--scheduler", "slurm", code=1)
    assert "sbatch refused" in said
    assert "no more jobs" in said
    assert "submitted until now: 100 101" in said
    assert set(json.loads((place / "runs/r/steps/jobs.json").read_text())["jobs"]["train-42"]["ids"]) == {"101"}


def test_status_is_what_records_say_and_the_scheduler_of_the_rest(place, monkeypatch):
    (place / "r.yaml").write_text("""
steps:
  a: {shell: "echo made > $out"}
  b: {shell: "cat $a; exit 4; touch $out"}
  c: {shell: "cat $a > $out"}
  d: {shell: "cat $b > $out"}
""")
    stand_in(place, "sbatch", "100 + len(calls)", monkeypatch)
    stand_in(place, "squeue", "'102|PENDING\\n103|CANCELLED\\n101|FAILED'", monkeypatch)
    surgery("launch", "r.yaml", "--scheduler", "slurm")
    surgery("run", "runs/r", "--step", "a")
    surgery("run", "runs/r", "--step", "b", code=1)
    lines = json.loads(surgery("launch", "status", "r.yaml", "--json"))
    assert [(line["step"], line["state"], line["job"], line["queue"]) for line in lines] == [
        ("a", "done", "100", ""), ("b", "failed", "101", "FAILED"), ("c", "waiting", "102", "PENDING"),
        ("d", "cancelled", "103", "CANCELLED")]  # fmt: skip
    assert "cancelled" in surgery("launch", "status", "runs/r")
    record = place / "runs/r/steps/b.json"
    record.write_text(record.read_text().replace('"failed"', '"running"'))
    assert json.loads(surgery("launch", "status", "r.yaml", "--json"))[1]["state"] == "lost"


def test_own_template(place):
    template = surgery("launch", "--scheduler", "pbs", "--show-template")
    assert template.startswith("#!/bin/bash\n@directives@\n")
    (place / "mine.sh").write_text("#!/bin/sh\n@directives@\n#PBS -l rt_HF=1\n@surgery@ run @folder@ --step $step @x@")
    (place / "launch.yaml").write_text("{scheduler: pbs, template: mine.sh}")
    assert "@x@ means nothing" in surgery("launch", "r.yaml", "--write-only", "s", code=1)
    (place / "mine.sh").write_text((place / "mine.sh").read_text().replace("@x@", ""))
    surgery("launch", "r.yaml", "--write-only", "s")
    assert "#PBS -l rt_HF=1\n" in (place / "s/prep.pbs").read_text()


@pytest.mark.parametrize(("args", "match", "code"), [
    (["launch"], "which scheduler", 2),
    (["launch", "--scheduler", "slurm"], "which recipe", 2),
    (["launch", "status", "r.yaml"], "does not say what was launched|cannot be opened", 1),
    (["launch", "r.yaml", "--scheduler", "slurm"], "there is no sbatch here", 1),
])  # fmt: skip
def test_mistakes(place, monkeypatch, args, match, code):
    monkeypatch.setenv("PATH", str(place))
    assert re.search(match, surgery(*args, code=code))


@pytest.mark.parametrize("text", ["{acount: x}", "{scheduler: lsf}", "[1]", "{grace: 0}"])
def test_a_wrong_site_is_refused(place, text):
    (place / "launch.yaml").write_text(text)
    assert "launch.yaml" in surgery("launch", "r.yaml", "--scheduler", "slurm", code=1)
