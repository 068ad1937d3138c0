"""Records as they may leave this machine: of its paths only the last part, of its copies of the hub their names there.

    told("/home/me/models/SmolLM2")                                     # "SmolLM2"
    told(["~/.cache/huggingface/hub/models--org--name/snapshots/3fa1"]) # ["hf://org/name@3fa1"]
    published(Path("moe/surgery.json"))                                 # its bytes; None if it names no such place

Addresses, relative paths and everything else stay as they are, such as the [/INST] of a chat template.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from surgery.containers.text import json_text, read_json
from surgery.errors import SurgeryError
from surgery.writing.replaceable import PROVENANCE, TOKENS

SOUP = "soup.json"
RECORDS = (PROVENANCE, SOUP, TOKENS)
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
    """The bytes of a record to publish in place of the file; None if it names no place of this machine, or is none."""
    try:
        found = read_json(path, path.name)
    except SurgeryError:
        return None
    said = told(found)
    return None if said == found else json_text(said)
