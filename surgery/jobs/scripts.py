"""The steps of a recipe as batch jobs, and the script of each: plain text, to be read, changed and submitted by hand.

    for job in jobs_of(steps, arrays=8):
        print(job.name, job.needs)
        script_of(job, slurm, site, folder, files)

The runs of a step are jobs of their own, which makes dependencies exact; from `arrays` runs on they are one array.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from surgery.containers.text import YAML_LIMIT
from surgery.errors import ConfigError, some
from surgery.jobs.process import TORCHRUN
from surgery.jobs.schedulers import Ask, Scheduler, grace
from surgery.jobs.site import Site
from surgery.jobs.spec import Resources
from surgery.jobs.step import Step
from surgery.tensors.files import read_small

PLACE = re.compile(r"@(\w+)@")
PORT = 29500  # of torchrun's meeting point; the job's number is added, so that two jobs on a node do not meet


@dataclass(frozen=True)
class Job:
    """One script: a step, or all runs of one as an array.  `needs`: the names of jobs that must end well before."""

    name: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...]

    @property
    def resources(self) -> Resources:
        return self.steps[0].resources

    @property
    def array(self) -> int:
        """How many tasks; 0 if it is no array."""
        return len(self.steps) if len(self.steps) > 1 else 0


def jobs_of(steps: Sequence[Step], arrays: int) -> list[Job]:
    """The jobs of some steps, in their order; what is needed of other steps must be done already."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault(step.name, []).append(step)
    owner: dict[str, str] = {}
    for name, runs in groups.items():
        together = len(runs) >= arrays and all(run.resources == runs[0].resources for run in runs)
        owner |= {run.id: name if together else run.id for run in runs}
    jobs: dict[str, list[Step]] = {}
    for step in steps:
        jobs.setdefault(owner[step.id], []).append(step)
    return [Job(name, tuple(runs), _needs(runs, owner)) for name, runs in jobs.items()]


def _needs(runs: Iterable[Step], owner: dict[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(owner[need] for run in runs for need in run.needs if need in owner))


def template_of(scheduler: Scheduler, site: Site) -> str:
    """The site's own, or ours.  Raises FileError."""
    if site.template:
        return read_small(Path(site.template), YAML_LIMIT, "template").decode(errors="replace")
    return (resources.files("surgery.jobs") / "templates" / f"{scheduler.name}.sh").read_text()


def script_of(job: Job, scheduler: Scheduler, site: Site, folder: Path, files: Path) -> str:
    """The whole script.  `files` is where it is put, `folder` the run's.  Raises ConfigError for a bad template."""
    want = job.resources
    several = f"steps=({shlex.join(step.id for step in job.steps)})\nstep=${{steps[${scheduler.index}]}}"
    ask = Ask(f"{folder.name}.{job.name}", files / job.name, job.array, want)
    seconds = max(1, want.time - grace(want, site)) if want.time else None
    limit = f"timeout --foreground --preserve-status --signal=TERM {seconds} " if seconds else ""
    modules = f"module load {shlex.join(site.modules)}" if site.modules else ""
    values = {
        "directives": "\n".join(f"{scheduler.mark} {line}" for line in scheduler.lines(ask, site)),
        "about": " ".join((job.steps[0].title or job.name).split()),
        "workdir": shlex.quote(str(Path.cwd())),
        "setup": "\n".join(filter(None, [modules, site.setup.strip()])),
        "step": several if job.array else f"step={shlex.quote(job.steps[0].id)}",
        "torchrun": _torchrun(want, scheduler, site),
        "timeout": limit,
        "surgery": site.surgery,
        "folder": shlex.quote(str(folder)),
        "requeue": scheduler.requeue if site.requeue else "true",
    }  # fmt: skip
    text = template_of(scheduler, site)
    if unknown := sorted({match[1] for match in PLACE.finditer(text)} - {*values}):
        hint = f"there are {some(values, 20)}"
        raise ConfigError(f"@{unknown[0]}@ means nothing in a template", file=site.template, hint=hint)
    return re.sub(r"\n{3,}", "\n\n", PLACE.sub(lambda match: values[match[1]], text))


def _torchrun(want: Resources, scheduler: Scheduler, site: Site) -> str:
    """What lets the step's command be started by torchrun on all nodes; "" where it is one process."""
    if want.processes is None:
        return ""
    run = f"{site.interpreter} -m torch.distributed.run --nnodes={want.nodes} --nproc-per-node={want.processes}"
    if want.nodes == 1:
        return f'export {TORCHRUN}="{run} --standalone"'
    per_node = " ".join(filter(None, (site.per_node or scheduler.per_node, site.container)))
    meet = f"--rdzv-backend=c10d --rdzv-id=$number --rdzv-endpoint=$head:$(({PORT} + number % 1000))"
    return f'head=$({scheduler.head})\nnumber={scheduler.number}\nexport {TORCHRUN}="{per_node} {run} {meet}"'
