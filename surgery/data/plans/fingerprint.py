"""What a plan stands on, as plain data: compared when the plan is opened and when a run resumes.

    before, now = fingerprint_of_files(paths), fingerprint_of_files(paths)
    differences(before, now)                    # [] or ["corpus.bin: bytes: 7878 -> 7880", ...]

Of a file its size and a digest of its two ends and of blocks spread over it: a changed dtype, another tokenizer or
other documents show; a single flipped byte may not.  Paths are no part of it: data may move.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.errors import ConfigError
from surgery.tensors.files import File

END, BLOCK, BLOCKS = 1 << 16, 1 << 12, 16
LINES = 8  # differences that are named
Facts = Mapping[str, Any]


def sampled(path: str | os.PathLike[str]) -> dict[str, Any]:
    """{"bytes": size, "sample": digest of the first and last 64 KiB and of 16 blocks of 4 KiB between}."""
    file = File(path)
    digest = hashlib.sha256()
    step = max(file.size // (BLOCKS + 1), 1)
    places = [(0, END), *((i * step, BLOCK) for i in range(1, BLOCKS + 1)), (max(file.size - END, 0), END)]
    for start, size in places:
        digest.update(file.read(min(start, file.size), max(min(size, file.size - start), 0), "sample"))
    return {"bytes": file.size, "sample": digest.hexdigest()[:32]}


def digest_of(facts: Facts) -> str:
    """One name for all of it."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(before: Facts, now: Facts) -> list[str]:
    """What changed, each as `where: old -> new`; in the order of `before`."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key}: {old.get(key, 'not there')} -> {new.get(key, 'gone')}"
        for key in old | new
        if old.get(key) != new.get(key)
    ]


def check_same(before: Facts, now: Facts, what: str) -> None:
    """Raise ConfigError, naming what changed, unless two fingerprints are the same."""
    if changed := differences(before, now):
        more = [f"and {len(changed) - LINES} more"] if len(changed) > LINES else []
        text = "\n  ".join([f"{what} changed since the plan was made:", *changed[:LINES], *more])
        raise ConfigError(text, hint="bring the old data back, or make a new plan and start a new run")


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{at}: {key}" if at else str(key))
    else:
        yield at, value
