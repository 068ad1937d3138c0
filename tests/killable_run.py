"""Runs of a recipe that are killed and repeated: see test_jobs_kill.py.

python killable_run.py calls FOLDER            # SIGKILL before and after every call that changes something
python killable_run.py random FOLDER 50        # SIGKILL at random times
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from surgery.jobs.graph import graph_of
from surgery.jobs.recipe import read_recipe
from surgery.jobs.run import chosen, run
from tests.killing import dies_at, forked, tree

RECIPE = """
inputs: {text: text}
steps:
  one:  {shell: "echo one >> count; mkdir $out; for i in 1 2 3; do cat $text > $out/$$i; sleep NAP; done"}
  two:  {matrix: {seed: [42, 666]}, shell: "echo two-$seed >> count; sleep NAP; (echo $seed; cat $one/*) > $out"}
  last: {shell: "echo last >> count; cat $two > $out; cat count > ${last.too}", outputs: {too: again}}
"""


def job():
    """All steps, as `surgery run` does them, in this process."""
    steps = graph_of(read_recipe("r.yaml"))
    board = run(steps, chosen(steps))
    if board.failure:
        raise board.failure


def finished():
    status = os.waitpid(forked(job), 0)[1]
    assert status == 0, status


def made():
    """What the steps made, but for the one that tells of earlier attempts."""
    folder = Path("runs/r")
    return {n: b for n, b in tree(folder).items() if not n.startswith("steps/") and n != "again"}


def ran():
    """The steps that ran since the last look."""
    names = Path("count").read_text().split() if Path("count").exists() else []
    Path("count").unlink(missing_ok=True)
    return names


def done():
    """The steps whose records say that they are done."""
    records = Path("runs/r/steps").glob("*.json")
    return {p.stem for p in records if json.loads(p.read_bytes()).get("state") == "done"}


def check(first, held, whole, where):
    """Go on after a kill: the same comes out, and only what was not finished is repeated."""
    finished()
    second = ran()
    assert made() == whole, where
    assert not held & set(second), (where, held, second)
    assert len(set(first) & set(second)) <= 1, (where, first, second)
    assert len(second) == len(set(second)), (where, second)
    assert done() == {"one", "two-42", "two-666", "last"}, where
    assert not [p for p in Path("runs/r").rglob("*") if ".partial" in p.name], where


def settled():
    """When the command that a killed runner started has ended, what ran until then."""
    time.sleep(0.03)
    return ran()


def kill_at_every_call():
    kills = 0
    finished()
    whole = made()
    shutil.rmtree("runs")
    ran()
    for after in (False, True):
        for n in range(1, 10_000):

            def dying(n=n, after=after):
                dies_at(n, after)
                job()

            status = os.waitpid(forked(dying), 0)[1]
            if status == 0:
                break
            assert status == signal.SIGKILL, status
            kills += 1
            held = done()
            check(settled(), held, whole, (n, after))
            shutil.rmtree("runs")
        shutil.rmtree("runs")
        ran()
    return {"kills": kills}


def kill_at_random(kills):
    """Again and again until all is done, then from the beginning."""
    began = time.monotonic()
    finished()
    whole, span, chance = made(), time.monotonic() - began, random.Random(5)
    killed, completed, held = 0, 0, done()
    ran()
    while killed < kills:
        if len(held) == 4:
            assert made() == whole
            shutil.rmtree("runs")
            held, completed = set(), completed + 1
        pid = forked(job)
        time.sleep(chance.random() * span * 0.7)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        killed += status == signal.SIGKILL
        names = settled()
        assert not held & set(names), (held, names)
        assert len(names) == len(set(names)), names
        held = done()
    finished()
    assert made() == whole
    return {"kills": killed, "completed": completed}


if __name__ == "__main__":
    mode, folder, *rest = sys.argv[1:]
    os.chdir(folder)
    Path("text").write_text("text\n")
    Path("r.yaml").write_text(RECIPE.replace("NAP", "0.05" if mode == "random" else "0"))
    outcome = kill_at_every_call() if mode == "calls" else kill_at_random(int(rest[0]))
    print(json.dumps(outcome), flush=True)
