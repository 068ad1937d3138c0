"""What `surgery push` and `surgery pull` print.  Every function takes the plain data that `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from surgery.cli.console import Rows, console, notes
from surgery.storage.pull import Pulling
from surgery.storage.push import Pushing
from surgery.units import human

Json = Mapping[str, Any]


def planned(plan: Pushing) -> dict[str, Any]:
    """`surgery push --dry-run`, as data: the files in the order in which they are sent."""
    files = [{"name": i.name, "bytes": i.size, "there": i.name in plan.there} for i in plan.items]
    return {"address": str(plan.address), "bytes": plan.bytes, "bytes_to_send": plan.bytes_to_send, "files": files}


def to_pull(plan: Pulling) -> dict[str, Any]:
    """`surgery pull --dry-run`, as data."""
    files = [{"name": e.name, "bytes": e.size, "there": False} for e in plan.found.entries.values()]
    return {"address": str(plan.address), "bytes": plan.bytes, "bytes_to_send": plan.bytes, "files": files}


def plan(found: Json) -> None:
    """`surgery push --dry-run` and `surgery pull --dry-run`."""
    out = console()
    there = sum(f["there"] for f in found["files"])
    out.print(Text(found["address"], style="bold"))
    out.print(Rows([("files", f"{len(found['files'])}, {human(found['bytes'])}"),
                    ("there", f"{there} of them, equal" if there else None),
                    ("to come or go", human(found["bytes_to_send"]))]))  # fmt: skip
    for file in found["files"]:
        out.print(Text(f"  {human(file['bytes']):>9}  {file['name']}{'  (there)' if file['there'] else ''}"))


def pushed(done: Json) -> None:
    """`surgery push`."""
    out = console()
    out.print(Text(done["address"], style="bold"))
    compared = "by ETag" if not done["read_back"] else f"by ETag, {done['read_back']} of them read back"
    out.print(Rows([("sent", f"{human(done['sent_bytes'])} in {done['sent_files']} files"),
                    ("there", f"{done['files'] - done['sent_files']} files were, equal"
                     if done["files"] > done["sent_files"] else None),
                    ("compared", "by the hub's digests" if done["commit"] else compared),
                    ("commit", done["commit"]),
                    ("aborted", f"{done['aborted']} uploads that never ended" if done["aborted"] else None),
                    ("time", f"{done['seconds']:.1f} s")]))  # fmt: skip
    notes(out, done["notes"])


def pulled(done: Json) -> None:
    """`surgery pull`."""
    out = console()
    out.print(Text(done["output"], style="bold"))
    had = done["resumed_bytes"]
    out.print(Rows([("from", done["address"]),
                    ("pulled", f"{human(done['bytes'])} in {done['files']} files"),
                    ("resumed", f"{human(had)} were there" if had else None),
                    ("compared", f"{done['checked']} files by a digest, all by size and version"),
                    ("time", f"{done['seconds']:.1f} s")]))  # fmt: skip
