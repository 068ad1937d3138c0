"""Records as they may leave this machine: of its paths only the last part, of its copies of the hub their names there.

    told("/home/me/models/SmolLM2")                                     # "SmolLM2"
    told(["~/.cache/huggingface/hub/models--org--name/snapshots/3fa1"]) # ["hf://org/name@3fa1"]
    published(Path("moe/surgery.json"))                                 # its bytes; None if it names no such place

Addresses, relative paths and everything else stay as they are, such as the [/INST] of a chat template.  A data plan
does not say its root, and names the files that lie elsewhere by as much of their paths as tells them apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from surgery.containers.text import JSON_LIMIT, json_text, read_json
from surgery.errors import FileError, SurgeryError
from surgery.writing.replaceable import PROVENANCE, TOKENS

SOUP = "soup.json"
PLAN = "plan.json"
ENTRIES = 4_000_000  # of a record: a plan of 100,000 files has 2 million
RECORDS = (PROVENANCE, SOUP, TOKENS, PLAN)
_BEFORE = r"(?<![^\s=,'\"`(\[])"  # a path, which is not relative to anything that is published
_BEGIN = rf"{_BEFORE}(?:file://|~[\w.-]*|\.\.?)?/"
_FOLDER = r"(?:[^\s/'\"<>\[\]{}]+/)"
_CACHED = re.compile(rf"{_BEGIN}(?:[^\s'\"]*/)?models--([\w.-]+?)--([\w.-]+)/snapshots/([\w.-]+)")
_WHOLE = re.compile(rf"{_BEGIN}(?:(?![:,]\s|\s[~.]*/)[^\n])*")  # no sentence that begins with a path
_WITHIN = re.compile(rf"(?:{_BEFORE}~[\w.-]*/|{_BEGIN}{_FOLDER}){_FOLDER}*(?=[^\s/])")


def told(value: Any) -> Any:
    """A text, or what JSON can hold, without the folders of this machine."""
    if isinstance(value, str):
        text = _CACHED.sub(r"hf://\1/\2@\3", value)
        return text.rstrip("/").rpartition("/")[2] if _WHOLE.fullmatch(text) else _WITHIN.sub("", text)
    if isinstance(value, list):
        return [told(one) for one in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for name, one in value.items():
        short = told(name)
        alike = sum(known == short or known.startswith(f"{short} (") for known in found)
        found[f"{short} ({alike + 1})" if alike else short] = told(one)
    return found


def published(path: Path) -> bytes | None:
    """The bytes of a record to publish in place of the file; None if it names no place of this machine, or is none.

    Raises FileError if it is too large to know.
    """
    if path.stat().st_size > JSON_LIMIT:
        raise FileError("is too large to take the folders of this machine out of it", file=path, hint="move it away")
    try:
        found = read_json(path, path.name, ENTRIES)
    except SurgeryError:
        return None
    said = told(_portable(found) if path.name == PLAN else found)
    return None if said == found else json_text(said)


def _portable(plan: Any) -> Any:
    """A data plan without its root, whose entries beyond it are the shortest ends of their paths that differ."""
    try:
        files = [entry[key] for source in plan["sources"] for entry in source["entries"] for key in ("path", "mask")]
    except (KeyError, TypeError):
        return plan  # of another kind
    named = {file for file in files if isinstance(file, str)}
    beyond = {file for file in named if os.path.isabs(file) and told(file) in file}
    ends = _ends(beyond, named - beyond)

    def entry(one: dict[str, Any]) -> dict[str, Any]:
        return {key: ends.get(value, value) if isinstance(value, str) else value for key, value in one.items()}

    sources = [{**source, "entries": [entry(one) for one in source["entries"]]} for source in plan["sources"]]
    return {**plan, "root": "", "sources": sources}


def _ends(paths: Collection[str], others: Collection[str]) -> dict[str, str]:
    """The last parts of each path, as few as tell all of them apart, and from others."""
    parts = {path: tuple(part for part in path.split("/") if part) for path in paths}
    ends: dict[str, str] = {}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        ends = {path: "/".join(found[-count:]) for path, found in parts.items()}
        if len({*ends.values()} - {*others}) == len({*parts.values()}):
            break
    return ends
