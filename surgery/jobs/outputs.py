"""What a step makes: where it grows, when it is complete, and what becomes of what an earlier run made.

make_way(step, verdict, digests, tell)          # nothing that someone else made, or changed, is ever removed
is_complete(step, record, parts)                # had a run that was cut short made everything?
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from surgery.errors import OutputError, SurgeryError
from surgery.jobs.digests import Digests
from surgery.jobs.expand import OUT
from surgery.jobs.keys import Verdict, holds
from surgery.jobs.record import Record, key_of
from surgery.jobs.step import Step
from surgery.writing.atomic import sync_folder

WHOLE = {"convert", "soup", "upcycle", "experts", "data tokenize", "data plan"}  # outputs appear whole or not at all
RESUMES = {"midtrain"}  # they grow in place and are gone on with; what an earlier run of these made is never removed


def command_of(step: Step) -> str:
    """`convert`, `data plan`: which command of surgery a step runs; "" if none."""
    words = step.spec.surgery or ("",)
    return " ".join(words[:2]) if words[0] == "data" else words[0]


def partials(step: Step) -> dict[str, Path]:
    """Where outputs grow that do not appear as a whole by themselves: those of scripts, and what is printed."""
    names = [n for n in step.outputs if not step.spec.surgery or (n == OUT and step.spec.stdout)]
    return {n: p.with_name(f".{p.name}.partial") for n in names for p in [step.outputs[n].path]}


def is_complete(step: Step, record: Record, parts: Mapping[str, Any]) -> bool:
    """Whether a run that was cut short had made everything, and only could not say so."""
    command = command_of(step)
    appear = command in WHOLE or step.outputs.keys() == partials(step).keys()
    appear = appear or (command in RESUMES and _has_finished(step))
    there = bool(step.outputs) and all(os.path.lexists(t.path) for t in step.outputs.values())
    return record.state in ("running", "stopped") and record.key == key_of(parts) and appear and there


def _has_finished(step: Step) -> bool:
    """Whether a training run came to its end."""
    from surgery.midtraining.run_folder import read_folder

    with suppress(SurgeryError, KeyError):
        return read_folder(step.outputs[OUT].path).status == "finished"
    return False


def make_way(step: Step, verdict: Verdict, digests: Digests, tell: Callable[[str], None]) -> None:
    """Remove what an earlier run of the step made, or set it aside where it cost much or was changed since.

    Raises OutputError for what no run of the step made.
    """
    record, command = verdict.record, command_of(step)
    for name, thing in step.outputs.items():
        if not os.path.lexists(thing.path):
            continue
        if record is None:
            hint = (
                "move it away, or let the step write elsewhere; `surgery run --accept` takes it for the step's output"
            )
            raise OutputError(f"exists already, and step {step.id} did not make it", file=thing.path, hint=hint)
        same = verdict.parts is not None and record.key == key_of(verdict.parts)
        if command in RESUMES and same and record.state != "done":
            continue
        if command in RESUMES or (record.state == "done" and not holds(step, name, record, digests)):
            tell(f"{thing.path.name} is kept as {set_aside(thing.path).name}")
        else:
            remove(thing.path)


def set_aside(path: Path) -> Path:
    """Rename to NAME.old-1, -2, ..., the first that is free."""
    number = next(n for n in itertools.count(1) if not os.path.lexists(path.with_name(f"{path.name}.old-{n}")))
    aside = path.with_name(f"{path.name}.old-{number}")
    os.rename(path, aside)
    return aside


def remove(path: Path) -> None:
    """A file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(partial: Path, path: Path) -> None:
    """Give a complete output its name, when all of it is on disk."""
    for file in [partial] if partial.is_file() else [p for p in partial.rglob("*") if p.is_file()]:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    os.rename(partial, path)
    sync_folder(path.parent)
