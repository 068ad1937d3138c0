"""Does launching work on this site?  One-second jobs with everything that a graph uses, checked in a minute.

for check in selftest(SCHEDULERS["slurm"], site, Path("runs/launch-selftest")):
    print(check.what, check.good)
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.errors import OutputError
from surgery.jobs.graph import graph_of
from surgery.jobs.launch import launch
from surgery.jobs.queue import Line, status
from surgery.jobs.recipe import parsed
from surgery.jobs.schedulers import Scheduler
from surgery.jobs.site import Site

STEPS = {
    "first": {"shell": "sleep 1; hostname > $out"},
    "each": {"matrix": {"task": [1, 2]}, "shell": "sleep 1; (cat $first; echo $task) > $out"},
    "join": {"shell": "cat $each > $out"},
    "fails": {"shell": "sleep 1; exit 3"},
    "never": {"shell": "touch $out", "after": ["fails"]},
}
EXPECTED = {
    "first": "done",
    "each-1": "done",
    "each-2": "done",
    "join": "done",
    "fails": "failed",
    "never": "cancelled",
}
ABOUT = {
    "first": "a job runs, and its record is seen from here",
    "each-1": "an array after it: the first task",
    "each-2": "an array after it: the second task",
    "join": "a job after all tasks of the array",
    "fails": "a job that fails is seen to fail",
    "never": "what comes after it is not run, and leaves the queue",
}
MARK = "surgery-launch-selftest"


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it was as it should be, and what was seen."""

    what: str
    good: bool
    seen: str


def selftest(
    scheduler: Scheduler, site: Site, folder: Path, patience: float = 600.0, look: Callable[[list[Line]], None] = print
) -> Iterator[Check]:
    """Submit the jobs, wait until they have ended, and say what was seen.

    folder     is made anew; `look` is shown the lines of `status` now and then
    patience   seconds after which what is not there counts as missing

    Raises OutputError if the folder holds something else, SchedulerError.
    """
    if folder.exists() and not (folder / MARK).exists():
        raise OutputError("holds something else", file=folder, hint="choose another with --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    recipe = replace(parsed({"steps": STEPS}), folder=str(folder.absolute()))
    steps = graph_of(recipe)
    launch(recipe, steps, steps, scheduler, replace(site, arrays=2))
    began, lines = time.monotonic(), list[Line]()
    while time.monotonic() - began < patience:
        lines = list(status(folder, steps))
        look(lines)
        if all(line.state == EXPECTED[line.step] for line in lines):
            break
        time.sleep(2)
    seen = {line.step: line for line in lines}
    for step, expected in EXPECTED.items():
        yield Check(ABOUT[step], seen[step].state == expected, f"{seen[step].state} {seen[step].queue}".strip())
