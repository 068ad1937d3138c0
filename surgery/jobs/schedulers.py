"""Slurm and PBS: how each writes what a job asks for, is given jobs, and says how they are.

slurm = SCHEDULERS["slurm"]
slurm.lines(ask, site)                      # ["--job-name=demo.train", "--time=0-12:00:00", ...]
number = slurm.submit(Path("train.sbatch"), [After("afterok", ("17", "18"))])
slurm.states(["19"])                        # {"19": "PENDING"}
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import SurgeryError, UsageError
from surgery.jobs.process import SHUTDOWN
from surgery.jobs.site import Site
from surgery.jobs.spec import Resources

WAIT = 120  # seconds that a scheduler may take to answer


class SchedulerError(SurgeryError):
    """A scheduler refused what it was asked, or did not answer."""


@dataclass(frozen=True)
class Ask:
    """What one script asks for: its name, the file of its output without ending, tasks of an array or 0."""

    name: str
    output: Path
    array: int
    resources: Resources


@dataclass(frozen=True)
class After:
    """A dependency: `afterok` (all have ended well) or `afterany` (all have ended), and the ids of jobs."""

    kind: str
    jobs: tuple[str, ...]


@dataclass(frozen=True)
class Scheduler:
    """One scheduler.

    mark, ending   of directives and scripts            lines      what a job asks for, as options
    command        submits: prints an id                depends    dependencies as words of that command
    index          the variable of a task of an array   requeue    puts the job of a script back into the queue
    per_node       starts a command once on each node   head       prints the first node of a job
    number         the job's number in its script
    queue          command that says of jobs, by their ids, how they are
    """

    name: str
    mark: str
    ending: str
    lines: Callable[[Ask, Site], list[str]]
    command: tuple[str, ...]
    depends: Callable[[Sequence[After]], list[str]]
    index: str
    requeue: str
    per_node: str
    number: str
    head: str
    queue: Callable[[Sequence[str]], list[str]]
    parse: Callable[[str], Iterator[tuple[str, str]]]

    def submit(self, script: Path, after: Sequence[After]) -> str:
        """The id of the new job.  Raises SchedulerError."""
        said = answer([*self.command, *self.depends(after), os.fspath(script)])
        number = said.strip().splitlines()[-1].split(";")[0].strip() if said.strip() else ""
        if not number:
            raise SchedulerError(f"{self.command[0]} said no id", file=script)
        return number

    def states(self, jobs: Sequence[str]) -> dict[str, str]:
        """The states of those jobs that it still knows.  Of an array the states that its tasks are in."""
        if not jobs:
            return {}
        found: dict[str, dict[str, None]] = {}
        for job, state in self.parse(answer(self.queue(jobs), check=False)):
            found.setdefault(_number(job), {})[state] = None
        return {job: ", ".join(found[_number(job)]) for job in jobs if _number(job) in found}


def answer(words: Sequence[str], check: bool = True) -> str:
    """What a command prints.  Raises SchedulerError if there is none, if it fails and that is checked, or is silent."""
    try:
        done = subprocess.run(list(words), capture_output=True, text=True, check=False, timeout=WAIT)
    except FileNotFoundError:
        raise SchedulerError(f"there is no {words[0]} here", hint="--write-only DIR only writes the scripts") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{words[0]} did not answer within {WAIT} seconds") from None
    if check and done.returncode:
        raise SchedulerError(f"{words[0]} refused {words[-1]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _number(job: str) -> str:
    """12[].server, 12_3 and 12.server are of job 12."""
    digits = 0
    while digits < len(job) and job[digits].isdigit():
        digits += 1
    return job[:digits]


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def grace(want: Resources, site: Site) -> int:
    """Seconds before its end at which a job is told to stop: the site's, but never more than half of its time."""
    return min(site.grace, (want.time or site.grace * 2) // 2)


def _slurm_lines(ask: Ask, site: Site) -> list[str]:
    want = ask.resources
    options = {
        "job-name": ask.name,
        "output": f"{ask.output}-%a.out" if ask.array else f"{ask.output}.out",
        "open-mode": "append",
        "account": site.account,
        "partition": site.partition,
        "time": f"{want.time // 86400}-{_clock(want.time % 86400)}" if want.time else None,
        "nodes": want.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": want.gpus,
        "cpus-per-task": want.cpus,
        "mem": f"{-(-want.memory >> 20)}M" if want.memory else None,
        "array": f"0-{ask.array - 1}" if ask.array else None,
        "signal": f"B:TERM@{grace(ask.resources, site)}",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value]
    return [*lines, *(["--requeue"] if site.requeue else []), *site.directives]


def _pbs_lines(ask: Ask, site: Site) -> list[str]:
    want = ask.resources
    chunk = {"ncpus": want.cpus, "ngpus": want.gpus, "mpiprocs": want.processes,
             "mem": f"{-(-want.memory >> 20)}mb" if want.memory else None}  # fmt: skip
    select = ":".join([f"select={want.nodes}", *(f"{name}={value}" for name, value in chunk.items() if value)])
    output = f"{ask.output}-^array_index^.out" if ask.array else f"{ask.output}.out"
    options = {"N": ask.name, "o": output, "j": "oe", "P": site.account, "q": site.partition,
               "J": f"0-{ask.array - 1}" if ask.array else None}  # fmt: skip
    lines = [f"-{name} {value}" for name, value in options.items() if value]
    limits = [f"-l {select}", *([f"-l walltime={_clock(want.time)}"] if want.time else [])]
    return [*lines, *limits, f"-r {'y' if site.requeue else 'n'}", *site.directives]


def _depends(after: Sequence[After], between: str = ",") -> str:
    return between.join(":".join([a.kind, *a.jobs]) for a in after if a.jobs)


def _slurm_depends(after: Sequence[After]) -> list[str]:
    """A child whose parent failed would stay in the queue for ever, if it were not told to go."""
    return ["--kill-on-invalid-dep=yes", *([f"--dependency={given}"] if (given := _depends(after)) else [])]


def _pbs_depends(after: Sequence[After]) -> list[str]:
    return ["-W", f"depend={given}"] if (given := _depends(after)) else []


def _slurm_states(said: str) -> Iterator[tuple[str, str]]:
    for line in said.splitlines():
        job, bar, state = line.partition("|")
        if bar:
            yield job, state


def _pbs_states(said: str) -> Iterator[tuple[str, str]]:
    """Columns: id, name, user, time, state, queue."""
    for line in said.splitlines():
        words = line.split()
        if len(words) >= 6 and words[0][:1].isdigit():
            yield words[0], PBS_STATES.get(words[-2], words[-2])


PBS_STATES = {"Q": "queued", "R": "running", "H": "held", "W": "waiting", "E": "ending", "F": "finished",
              "B": "running", "S": "suspended", "C": "finished", "X": "finished"}  # fmt: skip

RUNS = 'squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || echo RUNNING'  # what was cancelled ends

SCHEDULERS: Mapping[str, Scheduler] = {
    "slurm": Scheduler(
        "slurm", "#SBATCH", ".sbatch", _slurm_lines, ("sbatch", "--parsable"), _slurm_depends,
        index="SLURM_ARRAY_TASK_ID",
        requeue=f'[[ $({RUNS}) != RUNNING ]] || scontrol requeue "$SLURM_JOB_ID"',
        per_node="srun --ntasks-per-node=1 --kill-on-bad-exit=1",
        number="$SLURM_JOB_ID",
        head='scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1',
        queue=lambda jobs: ["squeue", "--noheader", "--array", "--states=all", "--format=%F|%T",
                            f"--jobs={','.join(jobs)}"],
        parse=_slurm_states,
    ),
    "pbs": Scheduler(
        "pbs", "#PBS", ".pbs", _pbs_lines, ("qsub",), _pbs_depends,
        index="PBS_ARRAY_INDEX",
        requeue='qrerun "$PBS_JOBID" || echo "jobs may not rerun themselves here: let resources.chain be 2 or more"',
        per_node=f"mpirun --map-by ppr:1:node -x {SHUTDOWN}",
        number="${PBS_JOBID%%[.[]*}",
        head='head -n 1 "$PBS_NODEFILE"',
        queue=lambda jobs: ["qstat", *jobs],
        parse=_pbs_states,
    ),
}  # fmt: skip


def scheduler_of(name: str | None, site: Site) -> Scheduler:
    """Raises UsageError if nobody says which."""
    chosen = name or site.scheduler
    if not chosen:
        raise UsageError("which scheduler? give --scheduler slurm or pbs", hint="launch.yaml can say it for good")
    return SCHEDULERS[chosen]
