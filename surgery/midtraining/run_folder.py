"""The folder of a run: which files it holds and what they say.

    run = read_folder("runs/anneal")            # whatever is there; a run may be going on, or be an old one
    run.metrics[-1]["loss"], run.title

run.json        what the run is, written at its start:
                format "surgery-run-1", name, started (ISO 8601), command, versions {package: version},
                device {name, count}, model {path, format, family, digest, parameters, active_parameters},
                steps, tokens (of the whole run), flops_per_token, seed, parents [digests that it began from]
config.resolved.yaml    its settings, with every default
plan.json       its data: `sources`, each with name, have, take, heldout (instances), tokens, documents; `notes`
selftests.json  a list of {name, passed, detail, seconds}
metrics.jsonl   a line for each step: step, tokens (so far), loss, ce, z, balance, router_z, lr, grad_norm, skipped,
                router {max_load, load_entropy, dead} of the worst layer, attention_router the same of attention
                experts.  Nothing in it depends on the clock: a run that is resumed writes the same.
times.jsonl     a line for each step: step, seconds, tokens_per_second, tokens_per_second_mean, seconds_mean, tflops,
                mfu, and `parts` {data, compute, optimizer ... elsewhere}; the last is what lay between the step before
                and this one, evaluations and checkpoints, and is in no other number but the means
evals.jsonl     a line for each evaluation: step, tokens, heldout {domain: {loss, bpb, tokens, bytes}},
                tasks {task: {documents, acc, acc_norm, bpb, ...}}; averages {"last" or "ema": {heldout, tasks}}
experts.jsonl   now and then: step, and a reading of `router_telemetry.py`: layers, load [layer][expert] (share of the
                choices), together [layer][expert][expert] (share of the first one's tokens), by_source {name: load},
                weight_drift [layer] ...; attention {the same of attention experts}
events.jsonl    step, level ("note" or "alarm"), text: skipped steps, alarms of routers, resumptions
checkpoints/    what a run that was stopped goes on from: see checkpoint.py
export/         models that were exported: stepNNNNNNNNN-FORMAT, -last and -ema of running means
end.json        status ("finished", "stopped" or "failed"), step, reason; missing while the run is going on
sweep.json      of --sweep: steps, and trials, each with values {key: value}, tokens_per_second, memory, loss, failed
soup.json       of a folder with several runs in it: ingredients [{name, heldout}], soup {heldout}, kept (a name);
                beside it soup/, the model, and kept, a link to the better one

Steps count from 1; step 0 is the model before the run.  Numbers that are not finite are the texts "nan" and "inf".
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.containers.text import read_json
from surgery.errors import FileError, OutputError, UsageError
from surgery.writing.locking import NO_LOCKS

RUN, PLAN, SELFTESTS, END, SOUP = "run.json", "plan.json", "selftests.json", "end.json", "soup.json"
SWEEP = "sweep.json"
CONFIG, EXPORT = "config.resolved.yaml", "export"
METRICS, TIMES, EVALS, EXPERTS, EVENTS = "metrics.jsonl", "times.jsonl", "evals.jsonl", "experts.jsonl", "events.jsonl"
LINES = (METRICS, TIMES, EVALS, EXPERTS, EVENTS)
EXPORTED = re.compile(r"step(\d{9,})-")
LINE_LIMIT, CONFIG_LIMIT = 1 << 26, 1 << 20  # bytes
Record = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """All that a run's folder says; what is not there is empty.  `lacking` names files that could not be read."""

    path: Path
    run: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    selftests: tuple[Record, ...] = ()
    metrics: tuple[Record, ...] = ()
    times: tuple[Record, ...] = ()
    evals: tuple[Record, ...] = ()
    experts: tuple[Record, ...] = ()
    events: tuple[Record, ...] = ()
    end: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Any] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return str(self.run.get("name") or self.path.resolve().name)

    @property
    def step(self) -> int:
        """The last one that is logged."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def steps(self) -> int | None:
        """Of the whole run, where it says so."""
        return _whole(self.run.get("steps"))

    @property
    def status(self) -> str:
        """ "finished", "stopped", "failed", or "running" where no end is written."""
        return str(self.end.get("status", "running"))


def read_folder(path: str | os.PathLike[str]) -> RunFolder:
    """Raises FileError if there is no such folder, UsageError if it holds no run."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileError("is no folder" if folder.exists() else "does not exist", file=folder)
    if not is_run(folder):
        raise UsageError(f"{folder} holds no run", hint=f"a run's folder holds {RUN} and {METRICS}")
    lacking: list[str] = []
    tests = _json(folder / SELFTESTS, lacking, list)
    lines = {name.partition(".")[0]: tuple(_lines(folder / name, lacking)) for name in LINES}
    return RunFolder(
        folder,
        run=_json(folder / RUN, lacking, dict),
        config=_text(folder / CONFIG, lacking),
        plan=_json(folder / PLAN, lacking, dict),
        selftests=tuple(t for t in tests if isinstance(t, dict)),
        end=_json(folder / END, lacking, dict),
        sweep=_json(folder / SWEEP, lacking, dict) if (folder / SWEEP).is_file() else {},
        lacking=tuple(lacking),
        **lines,
    )


def is_run(folder: Path) -> bool:
    return (folder / RUN).is_file() or (folder / METRICS).is_file()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A folder that no other run works in meanwhile; if it was made for that and nothing came into it, it goes again.

    Raises OutputError if another run does.  On file systems that have no locks, nothing keeps two runs apart.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "wait for it, or choose another output"
            raise OutputError("another run is at work here", file=folder, hint=hint) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(fd)
        if made:
            with suppress(OSError):
                folder.rmdir()


def run_of(export: Path) -> tuple[Path, int] | None:
    """The run that a model was exported by, and after which step; None if its folder does not lie in one."""
    run, step = export.absolute().parent.parent, EXPORTED.match(export.name)
    return (run, int(step[1])) if step and is_run(run) else None


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The folders of runs that are named, or that lie in folders that are named.  Raises FileError, UsageError."""
    out: dict[Path, None] = {}
    for path in map(Path, paths):
        inner = sorted(p for p in path.iterdir() if p.is_dir() and is_run(p)) if path.is_dir() else []
        out |= dict.fromkeys([path] if is_run(path) or not inner else inner)
    return list(out)


def read_soup(folder: Path) -> Mapping[str, Any]:
    """What soup.json says, or nothing."""
    found: Mapping[str, Any] = _json(folder / SOUP, [], dict)
    return found


def _json(path: Path, lacking: list[str], kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        value = read_json(path)
    except FileError as error:
        lacking.append(f"{path.name}: {error.what}")
        return kind()
    if isinstance(value, kind):
        return value
    lacking.append(f"{path.name} holds no {'object' if kind is dict else 'list'}")
    return kind()


def _text(path: Path, lacking: list[str]) -> str:
    if not path.is_file():
        return ""
    if path.stat().st_size > CONFIG_LIMIT:
        lacking.append(f"{path.name} is larger than 1 MiB")
        return ""
    return path.read_text(errors="replace")


def _lines(path: Path, lacking: list[str]) -> Iterator[Record]:
    """The objects of a file of lines, by rising step; a last line that is not complete is being written."""
    if not path.is_file():
        return
    last, number = -1, 0
    with path.open("rb") as file:
        while (line := file.readline(LINE_LIMIT)).endswith(b"\n"):
            number += 1
            record = parse_line(line)
            step = _whole(record.get("step")) if record else None
            if record is None or step is None or step < last:
                lacking.append(f"{path.name}, line {number} is damaged or out of order")
                continue
            last = step
            yield record


def parse_line(line: bytes) -> Record | None:
    """The object in a line, None if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 62 else None
