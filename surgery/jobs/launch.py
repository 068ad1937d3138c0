"""Submit a recipe to a cluster at once: a script for each job, and the scheduler keeps their order.

    launched = launch(recipe, steps, wanted, SCHEDULERS["slurm"], site)
    launched.jobs["train-42"].ids               # ("1207",)

The run's folder keeps the recipe as it was, the scripts beside the records, and jobs.json: which job is which.  A job
runs `surgery run FOLDER --step ID`, which looks again whether the step is done: a graph that is submitted twice is
harmless.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from surgery.containers.yaml_writer import to_yaml
from surgery.errors import FileError, UsageError
from surgery.jobs.digests import Digests
from surgery.jobs.expand import FOLDER
from surgery.jobs.keys import judge
from surgery.jobs.recipe import SNAPSHOT, Recipe
from surgery.jobs.record import Record
from surgery.jobs.run import MEMORY, with_needs
from surgery.jobs.schedulers import After, Scheduler, SchedulerError
from surgery.jobs.scripts import Job, jobs_of, script_of
from surgery.jobs.site import Site
from surgery.jobs.step import Step
from surgery.writing.atomic import atomic_file, write_json

JOBS = "jobs.json"


@dataclass(frozen=True)
class Submitted:
    """One job: its script, the steps that it runs, the jobs before it; ids, several where it is a chain."""

    script: str
    steps: tuple[str, ...]
    needs: tuple[str, ...]
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launched:
    """All jobs of a graph, by their names."""

    scheduler: str
    folder: str
    jobs: Mapping[str, Submitted] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def launch(
    recipe: Recipe,
    steps: Sequence[Step],
    wanted: Sequence[Step],
    scheduler: Scheduler,
    site: Site,
    *,
    after: Sequence[str] = (),
    write_only: Path | None = None,
) -> Launched:
    """Write a script for every job of the wanted steps that is not done, and submit them.

    after        ids of jobs that must end well before the first ones begin
    write_only   a folder for the scripts, which are then not submitted

    Raises UsageError if there is nothing to do, or a step that is not wanted would have to be done before; FileError if
    something is missing that no step makes; SchedulerError for what the scheduler refuses, when those before are
    submitted and recorded.
    """
    folder = Path(recipe.folder)
    todo = not_done(steps, wanted, everything=write_only is not None)
    jobs = jobs_of(todo, site.arrays)
    files = (write_only or folder / FOLDER).absolute()
    files.mkdir(parents=True, exist_ok=True)
    scripts = {job.name: files / f"{job.name}{scheduler.ending}" for job in jobs}
    for job in jobs:
        _write(scripts[job.name], script_of(job, scheduler, site, folder, files))
    known = {job.name: Submitted(str(scripts[job.name]), tuple(s.id for s in job.steps), job.needs) for job in jobs}
    launched = Launched(scheduler.name, str(folder), known)
    write_snapshot(recipe)
    return launched if write_only else _submit(jobs, launched, scheduler, tuple(after))


def not_done(steps: Sequence[Step], wanted: Sequence[Step], everything: bool = False) -> list[Step]:
    """The wanted steps that are not done, in their order."""
    digests, records, ids = Digests(steps[0].files / MEMORY), dict[str, Record](), {step.id for step in wanted}
    todo = []
    for step in with_needs(steps, wanted):
        verdict = None if everything else judge(step, records, digests)
        if verdict and verdict.done and verdict.record:
            records[step.id] = verdict.record
        elif step.id in ids:
            todo.append(step)
        elif verdict:
            raise UsageError(f"step {step.id} comes before and is not done: {verdict.why}", hint="launch it, too")
    if not everything:
        digests.save()
    if not todo:
        raise UsageError("all steps are done", hint="surgery run --again repeats some")
    return todo


def write_snapshot(recipe: Recipe) -> None:
    """The recipe in the run's folder, as jobs read it: changed by --set and --small, with absolute paths."""
    path = Path(recipe.folder) / SNAPSHOT
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(to_yaml(_plain(asdict(recipe))))


def _plain(value: Any) -> Any:
    """Without what is not said, lists instead of tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items() if one not in (None, (), {})}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _submit(jobs: Sequence[Job], launched: Launched, scheduler: Scheduler, after: tuple[str, ...]) -> Launched:
    """Give the scheduler all jobs, each after those that it needs."""
    for job in jobs:
        before = tuple(launched.jobs[need].ids[-1] for need in job.needs) or after
        ids: tuple[str, ...] = ()
        for _ in range(job.resources.chain):
            links = [After("afterok", before), After("afterany", ids[-1:])]
            try:
                ids += (scheduler.submit(Path(launched.jobs[job.name].script), links),)
            except SchedulerError as error:
                known = [i for j in launched.jobs.values() for i in j.ids] + [*ids]
                error.hint = f"{error.hint}; " if error.hint else ""
                error.hint += f"submitted until now: {' '.join(known) or 'nothing'}; launch again for the rest"
                raise
        jobs_now = {**launched.jobs, job.name: replace(launched.jobs[job.name], ids=ids)}
        launched = replace(launched, jobs=jobs_now)
        write_json(Path(launched.folder) / FOLDER / JOBS, launched.to_json())
    return launched


def read_launched(folder: Path) -> Launched:
    """What was launched last from a run's folder.  Raises FileError."""
    path = folder / FOLDER / JOBS
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        found = json.loads(path.read_bytes())
        names = [f.name for f in fields(Submitted)]
        jobs = {}
        for name, job in found["jobs"].items():
            script, *rest = (job[n] for n in names)
            jobs[name] = Submitted(str(script), *(tuple(map(str, part)) for part in rest))
        return Launched(str(found["scheduler"]), str(folder), jobs)
    raise FileError("does not say what was launched", file=path, hint="surgery launch RECIPE writes it")


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
    path.chmod(0o755)
