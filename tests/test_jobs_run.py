"""`surgery run` does what is not done, once, whatever the clock says; what fails says where and how to go on."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main

RECIPE = """
inputs: {text: source, extra: extra.txt}
vars: {n: 2}
steps:
  one:  {shell: "echo one >> count; for i in $$(seq $n); do cat $text/*; done > $out"}
  each: {matrix: {seed: [42, 666]}, shell: "echo each-$seed >> count; (echo $seed; cat $one) > $out"}
  last: {shell: "echo last >> count; cat $each $extra > $out; wc -l < $out"}
small: {vars: {n: 1}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with a recipe whose steps write their names into the file `count`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a").write_text("a\n")
    (tmp_path / "extra.txt").write_text("extra\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def surgery(*args, code=0):
    done = CliRunner().invoke(main, ["run", *args])
    assert done.exit_code == code, done.output
    return done.output


def ran():
    """The steps that ran since the last look."""
    names = Path("count").read_text().split() if Path("count").exists() else []
    Path("count").unlink(missing_ok=True)
    return names


def aged(path):
    """Let a file look as if it had been written long ago."""
    os.utime(path, (1, 1))


def test_each_step_is_run_once(place):
    surgery("r.yaml")
    assert ran() == ["one", "each-42", "each-666", "last"]
    assert (place / "runs/r/last").read_text() == "42\na\na\n666\na\na\nextra\n"
    assert "last: unchanged" in surgery("r.yaml")
    assert ran() == []


def test_a_touched_file_reruns_nothing_and_a_changed_one_what_depends_on_it(place):
    surgery("r.yaml")
    ran()
    for path in ("source/a", "extra.txt", "runs/r/one", "runs/r/each-42", "r.yaml"):
        os.utime(path)
    surgery("r.yaml")
    assert ran() == []
    aged("extra.txt")
    surgery("r.yaml")
    (place / "extra.txt").write_text("other\n")
    aged("extra.txt")
    assert "extra has changed" in surgery("r.yaml", "--dry-run")
    surgery("r.yaml")
    assert ran() == ["last"]
    (place / "source/b").write_text("")
    surgery("r.yaml")
    assert ran() == ["one"], "what it makes is the same as before, so nothing else is run"
    (place / "source/a").rename("source/c")
    (place / "source/b").write_text("b\n")
    surgery("r.yaml")
    assert ran() == ["one", "each-42", "each-666", "last"]


def test_the_command_and_what_it_makes_count_too(place):
    surgery("r.yaml")
    ran()
    (place / "r.yaml").write_text(RECIPE.replace("wc -l", "wc -c"))
    assert "its command has changed" in surgery("r.yaml", "--dry-run")
    surgery("r.yaml")
    assert ran() == ["last"]
    (place / "runs/r/each-666").write_text("spoilt")
    assert "each-666 is kept as each-666.old-1" in surgery("r.yaml")
    assert ran() == ["each-666"]
    assert (place / "runs/r/each-666.old-1").read_text() == "spoilt"
    (place / "runs/r/one").unlink()
    surgery("r.yaml")
    assert ran() == ["one"]
    surgery("r.yaml", "--set", "n=1")
    assert ran() == ["one", "each-42", "each-666", "last"]


def test_a_run_elsewhere_with_the_same_content_has_the_same_keys(place):
    surgery("r.yaml")
    (place / "source").rename(place / "moved")
    (place / "runs/r").rename(place / "elsewhere")
    ran()
    surgery("r.yaml", "--folder", "elsewhere", "--set", "text=moved")
    assert ran() == []


def test_step_from_again(place):
    assert "one comes before and is not done: never run" in surgery("r.yaml", "--step", "last", code=2)
    surgery("r.yaml")
    ran()
    surgery("r.yaml", "--step", "each-42", "--again")
    assert ran() == ["each-42"]
    surgery("r.yaml", "--from", "each", "--again")
    assert ran() == ["each-42", "each-666", "last"]
    assert "there is no step on\n  hint: did you mean one?" in surgery("r.yaml", "--step", "on", code=2)


def test_dry_run_writes_nothing_and_says_why(place):
    said = surgery("r.yaml", "--dry-run")
    assert "4 of 4 steps would be run" in said
    assert "cat source/*" in said
    assert not (place / "runs").exists()
    surgery("r.yaml")
    lines = json.loads(surgery("r.yaml", "--dry-run", "--json"))
    assert [(line["step"], line["runs"], line["why"], line["bytes"]) for line in lines] == [
        ("one", False, "unchanged", 4), ("each-42", False, "unchanged", 7), ("each-666", False, "unchanged", 8),
        ("last", False, "unchanged", 21)]  # fmt: skip
    assert lines[3]["needs"] == ["each-42", "each-666"]


def test_a_step_that_fails_says_its_log_and_how_to_go_on(place):
    (place / "r.yaml").write_text(RECIPE.replace("cat $each", "echo so far; echo no >&2; cat none; cat $each"))
    said = surgery("r.yaml", code=1)
    assert "step last ended with status 1" in said
    assert "runs/r/steps/last.log ends with\n    so far\n    no\n    cat: none" in said
    assert "run the same command again" in said
    assert ran() == ["one", "each-42", "each-666", "last"]
    assert not (place / "runs/r/last").exists()
    (place / "none").write_text("")
    surgery("r.yaml")
    assert ran() == ["last"]


def test_a_step_that_makes_nothing_of_what_it_should_fails(place):
    (place / "r.yaml").write_text("steps: {a: {shell: 'true $out'}}")
    assert "ended well, but" in surgery("r.yaml", code=1)


def test_what_is_there_already_is_not_touched_but_may_be_accepted(place):
    (place / "runs/r").mkdir(parents=True)
    (place / "runs/r/one").write_text("mine\n")
    assert "exists already, and step one did not make it" in surgery("r.yaml", code=1)
    assert (place / "runs/r/one").read_text() == "mine\n"
    surgery("r.yaml", "--accept", "--step", "one")
    surgery("r.yaml")
    assert ran() == ["each-42", "each-666", "last"]
    assert (place / "runs/r/last").read_text() == "42\nmine\n666\nmine\nextra\n"


def test_small_goes_to_a_folder_of_its_own(place):
    surgery("r.yaml", "--small")
    assert (place / "runs/r-small/one").read_text() == "a\n"
    assert not (place / "runs/r").exists()


def test_json_and_verbose(place):
    found = json.loads(surgery("r.yaml", "--json"))
    assert [(s["step"], s["state"]) for s in found["steps"]] == [
        (name, "done") for name in ("one", "each-42", "each-666", "last")]  # fmt: skip
    assert found["steps"][-1]["says"] == "7"
    said = surgery("r.yaml", "-v", "--step", "last", "--again")
    assert "1. last\n$ echo last >> count; cat runs/r/each-42 runs/r/each-666 extra.txt > runs/r/last" in said
    assert said.endswith("7\n")


@pytest.mark.slow
def test_commands_of_surgery_and_scripts(place, tiny_hf):
    model = tiny_hf("llama")
    (place / "hello.py").write_text("import sys; print(sys.argv[1:]); open(sys.argv[1], 'w').write('hello')")
    (place / "r.yaml").write_text(f"""
inputs: {{model: {model}}}
steps:
  meta: {{surgery: convert $model $out --to meta --tp 2}}
  back: {{surgery: convert $meta $out --to hf}}
  same: {{surgery: verify $model $back --json, stdout: same.json}}
  hello: {{python: hello.py $out $n, after: same, matrix: {{n: [1, 2]}}}}
""")
    planned = json.loads(surgery("r.yaml", "--dry-run", "--json"))[0]["bytes"]
    assert abs(planned - sum(p.stat().st_size for p in model.iterdir())) < 1 << 20
    surgery("r.yaml", "-j", "2")
    assert json.loads((place / "runs/r/same.json").read_text())["verdict"] == "the same model"
    assert "['runs/r/hello-2', '2']" not in (place / "runs/r/steps/hello-2.log").read_text(), "written aside"
    assert (place / "runs/r/hello-2").read_text() == "hello"
    (place / "hello.py").write_text((place / "hello.py").read_text() + "\n")
    lines = json.loads(surgery("r.yaml", "--dry-run", "--json"))
    assert [line["step"] for line in lines if line["runs"]] == ["hello-1", "hello-2"]


COMMAND = [sys.executable, "-m", "surgery", "run", "r.yaml"]
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def test_nothing_to_do_takes_no_time(place):
    surgery("r.yaml")
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(COMMAND, check=True, capture_output=True, env=ENV)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.4, times  # seconds of one core; 0.2 where nothing else runs


def test_what_a_run_that_does_nothing_needs_not_is_not_imported(place):
    surgery("r.yaml")
    words = [sys.executable, "-X", "importtime", *COMMAND[1:]]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=ENV)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "surgery.jobs.run" in loaded
    assert not loaded & {"torch", "numpy", "rich", "importlib.metadata", "email", "surgery.conversion.request"}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_and_the_next_run_goes_on(place, signum):
    slow = "echo $$$$ > pid; touch begun; exec sleep 60; touch $out"
    (place / "r.yaml").write_text(f"steps: {{quick: {{shell: 'touch $out'}}, slow: {{shell: '{slow}', after: quick}}}}")
    child = subprocess.Popen(COMMAND, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (place / "begun").exists():
        time.sleep(0.01)
    child.send_signal(signum)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 75, said
    assert json.loads((place / "runs/r/steps/slow.json").read_text())["state"] == "stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(int((place / "pid").read_text()), 0)
    assert "was stopped" in surgery("r.yaml", "--dry-run")


def test_a_step_that_asks_to_be_repeated_stops_the_run_so_that_a_scheduler_repeats_it(place):
    (place / "r.yaml").write_text("steps: {slow: {shell: 'touch $out; exit 75'}}")
    assert "run the same command again" in surgery("r.yaml", code=75)
    assert json.loads((place / "runs/r/steps/slow.json").read_text())["state"] == "stopped"


def test_a_signal_that_comes_when_all_ends_well_stops_nothing(place):
    (place / "r.yaml").write_text("steps: {last: {shell: 'trap \"\" TERM; touch begun; sleep 1; touch $out'}}")
    child = subprocess.Popen(COMMAND, env=ENV, stdout=subprocess.DEVNULL)
    while not (place / "begun").exists():
        time.sleep(0.01)
    child.terminate()
    assert child.wait(20) == 0


def test_two_runs_do_not_do_the_same_step(place):
    (place / "r.yaml").write_text(RECIPE.replace("cat $each", "sleep 0.5; cat $each"))
    both = [subprocess.Popen(COMMAND, env=ENV, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [child.wait(60) for child in both] == [0, 0]
    assert sorted(ran()) == ["each-42", "each-666", "last", "one"]


def test_a_step_that_someone_runs_is_waited_for(place):
    surgery("r.yaml")
    (place / "runs/r/last").unlink()
    with open(place / "runs/r/steps/last.lock", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        child = subprocess.Popen(COMMAND, env=ENV, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert "waiting for process" in "".join(child.stdout.readline() for _ in range(4))
    assert child.wait(30) == 0
    child.stdout.close()
