"""`plan.json`: what a plan says, as strict models, and the folder that it stands in.

    plan/
      plan.json                 all that follows
      order.u64                 `source << 40 | instance`, in the order of the run
      math.0.ends.i64           document ends of file 0 of math, where finding them again would take long
      math.{firsts,starts,lengths}.i64       the table of packed instances

Files that the plan holds itself are listed with their SHA-256; they are checked when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from surgery.data.files.mapped import Array
from surgery.data.plans.mixture import Mixture, Name
from surgery.data.strict import Strict
from surgery.data.tokenizing.sources import is_url
from surgery.errors import FileError, show
from surgery.tensors.files import File, plain_name, read_small

NAME, ORDER = "plan.json", "order.u64"
FILES = (NAME, ORDER, "*.i64")  # what a plan consists of, as patterns
LIMIT = 256 << 20  # bytes; a source of 100,000 files has about 40 MB
CHUNK = 1 << 24
Whole = Annotated[int, Field(ge=0)]


class Entry(Strict):
    """A file or folder of a source, and how it was read.  Paths that lie in the plan's root are relative to it."""

    path: str
    format: str
    dtype: str | None = None
    eos: int | None = None
    mask: str | None = None
    ends: str | None = None


class PlannedSource(Strict):
    """A source as the plan takes it.  Amounts are instances, but for `tokens` and `documents`, which count all it has.

    have     instances that may be trained on      asked    what it would have given without caps
    filled   tokens that are no padding, in a mean instance, as a share of its length
    """

    name: Name
    entries: tuple[Entry, ...]
    tokens: Whole
    documents: Whole | None
    masked: bool
    heldout: Whole
    have: Whole
    take: Whole
    asked: float
    filled: float


class PlanFile(Strict):
    """All of plan.json."""

    format: Literal["surgery-plan-1"] = "surgery-plan-1"
    root: str
    mixture: Mixture
    vocab_size: int | None
    sources: tuple[PlannedSource, ...]
    notes: tuple[str, ...]
    fingerprint: dict[str, Any]
    files: dict[str, str]


def read_plan_file(folder: Path) -> PlanFile:
    """Raises FileError if there is no plan, it is damaged, or a file of its own is missing or changed."""
    path = folder / NAME
    data = read_small(path, LIMIT, "plan")
    try:
        plan = PlanFile.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"is no plan: {'.'.join(map(str, first['loc']))}: {show(first['msg'])}"
        raise FileError(what, file=path, hint="make it again: surgery data plan") from None
    kept = {e.ends for s in plan.sources for e in s.entries if e.ends is not None} | {ORDER}
    if missing := kept - plan.files.keys():
        raise FileError(f"does not list its file {show(min(missing))}", file=path, hint="make the plan again")
    for name, digest in plan.files.items():
        if sha256(folder / plain_name(name, "plan.json", path)) != digest:
            raise FileError(
                "is not what plan.json says", file=folder / name, hint="make the plan again, or copy it again"
            )
    return plan


def plan_bytes(plan: PlanFile) -> bytes:
    """As it is written."""
    return json.dumps(plan.model_dump(mode="json"), indent=1).encode() + b"\n"


def sha256(path: Path) -> str:
    """Of a whole file."""
    file, digest = File(path), hashlib.sha256()
    for start in range(0, file.size, CHUNK):
        digest.update(file.read(start, min(CHUNK, file.size - start)))
    return digest.hexdigest()


def little(array: Array) -> memoryview:
    """The bytes of an array, little endian."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data.cast("B") if array.size else memoryview(b"")


def relative(path: str, root: Path) -> str:
    """`path` as a plan of that root stores it: relative where it lies inside, so that both can be moved together."""
    if is_url(path):
        return path
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(absolute)
