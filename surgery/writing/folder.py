"""A folder of a few files whose bytes are known, which appears whole or not at all.

write_folder("plan", [("plan.json", b"{}"), ("order.u64", memoryview(order))])
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from surgery.errors import OutputError
from surgery.writing.journal import State
from surgery.writing.staging import Staging


def write_folder(
    dst: str | os.PathLike[str], files: Iterable[tuple[str, bytes | memoryview]], force: bool = False
) -> None:
    """Raises OutputError if the folder holds something and not `force`, or cannot be written."""
    names = set()
    try:
        with Staging.open(Path(dst), force) as stage:
            journal, _, _ = stage.begin(uuid.uuid4().hex, State)  # nothing of another run is gone on with
            journal.close()
            try:
                for name, data in files:
                    _write(stage, name, data)
                    names.add(name)
                stage.publish(names)
            except BaseException:
                stage.discard()
                raise
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", file=dst) from None


def _write(stage: Staging, name: str, data: bytes | memoryview) -> None:
    with os.fdopen(stage.create(name, 0), "wb") as file:
        file.write(data)
        file.flush()
        if stage.durable:
            os.fsync(file.fileno())
