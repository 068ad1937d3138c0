"""Token files that grow: documents are appended, a full file is followed by the next, an unfinished one is cut back.

    with Shards(stage, settings, paths, state) as shards:       # goes on where `state` says
        shards.write(documents)
        shards.sync()                                           # on disk; `state` says how much

Each file of tokens has one of records beside it, and one of label masks if there are any.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np

from surgery.data.files.tokens import MASK_SUFFIX
from surgery.data.tokenizing.encoded import Encoded
from surgery.data.tokenizing.job import BAD_LINES, RECORDS, State
from surgery.data.tokenizing.settings import Settings
from surgery.writing.staging import Staging


class Growing:
    """Files by name, open for appending; `sizes` says how many bytes of each count."""

    def __init__(self, stage: Staging, sizes: dict[str, int]) -> None:
        self.stage, self.sizes = stage, sizes
        self.fds: dict[str, int] = {}

    def append(self, name: str, data: bytes | memoryview) -> None:
        if name not in self.fds:
            self.fds[name] = self._open(name)
        view = memoryview(data).cast("B")
        while view:
            written = os.write(self.fds[name], view)
            view = view[written:]
            self.sizes[name] += written

    def _open(self, name: str) -> int:
        if name not in self.sizes:
            self.sizes[name] = 0
            return self.stage.create(name, 0)
        fd = self.stage.reopen(name)
        os.ftruncate(fd, self.sizes[name])
        os.lseek(fd, 0, os.SEEK_END)
        return fd

    def sync(self) -> None:
        if self.stage.durable:
            for fd in self.fds.values():
                os.fdatasync(fd)

    def close(self, names: Sequence[str] | None = None) -> None:
        """Close these files, or all."""
        for name in list(self.fds) if names is None else names:
            if name in self.fds:
                fd = self.fds.pop(name)
                if self.stage.durable:
                    os.fdatasync(fd)
                os.close(fd)


class Shards:
    """The output of a run: token files one after the other, and the report on bad lines."""

    def __init__(self, stage: Staging, settings: Settings, paths: Sequence[str], state: State) -> None:
        self.settings, self.paths, self.state = settings, paths, state
        self.files = Growing(stage, state.sizes)
        if not state.shards:
            self._begin()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.files.close()

    def write(self, documents: Encoded) -> None:
        """Append documents.  One that is too long for any file gets a file of its own."""
        limit = self.settings.max_size
        while len(documents):
            held, count = self.state.shards[-1][1], len(documents)
            if limit is not None:
                count = int(np.searchsorted(documents.ends, limit - held, side="left"))
            if count == 0 and held:
                self.files.close(list(names(self.settings, len(self.state.shards) - 1).values()))
                self._begin()
                continue
            self._append(documents.cut(0, max(1, count)))
            documents = documents.cut(max(1, count), len(documents))

    def report(self, lines: Sequence[str]) -> None:
        """Append to the report on bad lines."""
        if lines:
            self.files.append(BAD_LINES, "".join(lines).encode())

    def sync(self) -> None:
        self.files.sync()

    def _begin(self) -> None:
        """A new file of each kind."""
        for name in names(self.settings, len(self.state.shards)).values():
            self.files.append(name, b"")
        self.state.shards.append((0, 0))

    def _append(self, documents: Encoded) -> None:
        number = len(self.state.shards) - 1
        name, (count, tokens) = names(self.settings, number), self.state.shards[number]
        self.files.append(name["tokens"], documents.ids.tobytes())
        self.files.append(name["records"], self.settings.output.record(documents, tokens, self.paths))
        if documents.mask is not None:
            self.files.append(name["mask"], documents.mask.tobytes())
        self.state.shards[number] = (count + len(documents), tokens + len(documents.ids))


def names(settings: Settings, number: int) -> Mapping[str, str]:
    """The files of a shard while it grows: "tokens", "records" and, if there are label masks, "mask"."""
    stem = settings.output.stem(number, settings.max_size is not None)
    mask = {"mask": stem + MASK_SUFFIX} if settings.masked else {}
    return {"tokens": stem + settings.output.tokens, "records": stem + RECORDS, **mask}
