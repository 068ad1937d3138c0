"""Small text files of a checkpoint, read strictly: JSON, YAML, and trackers of one line.

    config = read_json("config.json", "config")
    step = read_line("latest_checkpointed_iteration.txt", "tracker")

Whatever two readers could understand differently is an error: duplicate keys, NaN, aliases, endless integers.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from surgery.errors import FileError, show
from surgery.tensors.files import plain_name, read_small

JSON_LIMIT = 64 << 20  # bytes; the index of a model of 100,000 tensors has 10 MB
YAML_LIMIT = 1 << 20
LINE_LIMIT = 256
DEPTH_LIMIT = 64
ENTRIES = 500_000  # of lists and mappings: values take far more memory than their text
_DIGITS = 40


def read_json(path: str | os.PathLike[str], what: str = "JSON file", entries: int = ENTRIES) -> Any:
    """The value of a JSON file of no more than so many `entries`.  Raises FileError."""
    return parse_json(read_small(path, JSON_LIMIT, what), os.fspath(path), what, entries=entries)


def parse_json(data: bytes, file: str, what: str = "JSON", base: int = 0, entries: int = ENTRIES) -> Any:
    """The value of JSON text that begins at byte `base` of a file.  Raises FileError."""
    found = sum(map(data.count, (b",", b"[", b"{")))  # those in texts as well: it is a bound
    if found > entries:
        raise FileError(f"{what} has up to {found} entries, over the limit of {entries}", file=file)
    strict = _Strict(file, what)
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=strict.pairs,
            parse_constant=strict.constant,
            parse_int=strict.integer,
            parse_float=strict.number,
        )
    except UnicodeDecodeError as error:
        raise FileError(f"{what} is not UTF-8", file=file, byte=base + error.start) from None
    except RecursionError:
        raise FileError(f"{what} is nested too deeply", file=file) from None
    except json.JSONDecodeError as error:
        at = base + len(error.doc[: error.pos].encode())
        hint = "the file is truncated or damaged" if error.pos + 1 >= len(error.doc) else None
        place = f", line {error.lineno}, column {error.colno}" if not base and error.lineno > 1 else ""
        raise FileError(f"{what} is not valid JSON{place}: {error.msg}", file=file, byte=at, hint=hint) from None
    if nesting(value) > DEPTH_LIMIT:
        raise FileError(f"{what} is nested deeper than {DEPTH_LIMIT} levels", file=file)
    if b"\\u" in data and not _encodable(value):
        raise FileError(f"{what} holds half of a surrogate pair, which is no character", file=file)
    return value


class _Strict:
    """What json would let pass."""

    def __init__(self, file: str, what: str) -> None:
        self.file, self.what = file, what

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FileError(f"key {show(twice)} appears twice in {self.what}", file=self.file)
        return out

    def constant(self, text: str) -> Any:
        raise FileError(f"{text} in {self.what}, which is not JSON", file=self.file)

    def integer(self, text: str) -> int:
        if len(text) > _DIGITS:
            raise FileError(f"an integer of {len(text)} digits in {self.what}", file=self.file)
        return int(text)

    def number(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise FileError(f"number {show(text)} in {self.what} is too large", file=self.file)
        return value


def nesting(value: Any) -> int:
    """How many dicts and lists lie inside each other, at most."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, (dict, list))]:
        depth += 1
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return depth


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_line(path: str | os.PathLike[str], what: str = "tracker") -> str:
    """The one line of a tracker file, without its newline.  Raises FileError unless it is short and printable."""
    raw = read_small(path, LINE_LIMIT, what).strip()
    text = raw.decode("ascii", "replace")
    if not text or not raw.isascii() or not text.isprintable():
        raise FileError(f"{what} holds {show(raw)}, not one line of text", file=path)
    return text


def read_tracker(path: str | os.PathLike[str]) -> str:
    """The plain name of the folder beside it that a tracker file points to.

    `latest_checkpointed_iteration.txt` (Megatron) holds an iteration or "release", `latest` (DeepSpeed) a name.
    Raises FileError if it holds anything else.
    """
    text = read_line(path)
    if not Path(path).name.startswith("latest_checkpointed"):
        return plain_name(text, "the tracker", path)
    if text != "release" and not (text.isdigit() and len(text) < 12):
        raise FileError(f"holds {show(text)}, neither an iteration nor 'release'", file=path)
    return text if text == "release" else f"iter_{int(text):07d}"


def read_yaml(path: str | os.PathLike[str], what: str = "YAML file", aliases: bool = False) -> Any:
    """The value of a YAML file of plain scalars, lists and maps.  Raises FileError.

    No tags or repeated keys, and aliases and merge keys only if allowed.  Scalars are read as PyYAML's SafeLoader reads
    them, but 1e-05 is a number and dates stay text.
    """
    from surgery.containers.yaml_loader import parse_yaml

    return parse_yaml(read_small(path, YAML_LIMIT, what), os.fspath(path), what, aliases)


def json_text(value: object) -> bytes:
    """A value as a file of JSON, for people to read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: the same value with null where one stands."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
