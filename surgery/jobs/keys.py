"""Is a step done?  Its key is made of all that its result depends on; its outputs must be what they were.

    verdict = judge(step, records, digests)
    verdict.done, verdict.why               # False, "its command has changed"

The key: the command and the config with names in the place of paths, the variables of the environment, the version of
surgery, and the digest of everything that is read.  Neither times nor the places of files are in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import surgery
from surgery.errors import FileError, some
from surgery.jobs.digests import Digests
from surgery.jobs.expand import OUT
from surgery.jobs.names import Thing
from surgery.jobs.record import Record, key_of, read_record
from surgery.jobs.step import Step

Records = Mapping[str, Record]  # of steps that are done, by their ids


@dataclass(frozen=True)
class Verdict:
    """Whether a step is done, why not, and what its key is made of (None while a step before it is not done)."""

    done: bool
    why: str
    record: Record | None
    parts: Mapping[str, Any] | None = None


def judge(step: Step, records: Records, digests: Digests) -> Verdict:
    """Raises FileError if something is missing that no step makes."""
    record = read_record(step)
    if lacking := [need for need in step.needs if need not in records]:
        return Verdict(False, f"after {some(lacking, 3)}", record)
    parts = parts_of(step, records, digests)
    if record is None:
        return Verdict(False, "never run", None, parts)
    if record.key != key_of(parts):
        return Verdict(False, _changed(record.parts, parts), record, parts)
    if record.state != "done":
        ended = {"failed": "failed before", "running": "was cut short", "stopped": "was stopped"}
        return Verdict(False, ended.get(record.state, "not done"), record, parts)
    changed = [t for n, t in step.outputs.items() if not holds(step, n, record, digests)]
    why = f"{changed[0].label} {'was changed' if changed[0].path.exists() else 'is gone'}" if changed else ""
    return Verdict(not changed, why, record, parts)


def parts_of(step: Step, records: Records, digests: Digests) -> dict[str, Any]:
    """All that the result of a step depends on."""
    read = {}
    for thing in step.inputs:
        if thing.maker:
            name = thing.label.removeprefix(thing.maker)[1:] or OUT
            read[thing.label] = records[thing.maker].outputs[name]
        else:
            digest = digests.sizes if thing.check == "size" else digests.tree
            read[thing.label] = digest(thing.path, entry=thing.entry).digest
    return {
        "command": [step.spec.kind, *step.command(_named)],
        "config": step.config(_named),
        "env": dict(step.env),
        "inputs": read,
        "version": surgery.__version__,
    }


def _named(thing: Thing) -> str:
    return "${%s}" % thing.label  # noqa: UP031


def outputs_of(step: Step, parts: Mapping[str, Any], digests: Digests) -> tuple[dict[str, str], int]:
    """The digest of each output, and the bytes of all.  Raises FileError if one is missing."""
    found, size = {}, 0
    for name, thing in step.outputs.items():
        found[name], nbytes = _output(thing, key_of(parts), digests)
        size += nbytes
    return found, size


def _output(thing: Thing, key: str, digests: Digests) -> tuple[str, int]:
    """Where large files count by their sizes alone, the key of the step that made them stands for their content."""
    tree = digests.tree(thing.path, large=False)
    digest = tree.digest if tree.exact else hashlib.sha256(f"{tree.digest} {key}".encode()).hexdigest()
    return digest, tree.bytes


def holds(step: Step, name: str, record: Record, digests: Digests) -> bool:
    """Is an output still what it was when it was recorded?"""
    with suppress(FileError):
        return _output(step.outputs[name], record.key, digests)[0] == record.outputs.get(name)
    return False


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In what a key differs from the one before."""
    if old.get("version") != new["version"]:
        return f"surgery {old.get('version')} made it, this is {new['version']}"
    for part in ("command", "config", "env"):
        if old.get(part) != new[part]:
            return f"its {part} has changed"
    before = old.get("inputs", {})
    other = [label for label, digest in new["inputs"].items() if before.get(label) != digest]
    return f"{some(other or ['what it reads'], 3)} has changed"
