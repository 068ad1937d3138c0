"""Processes that encode blocks, each with the tokenizer; or a thread, if one is enough.

    with Workers(4, document, settings) as workers:
        future = workers.encode(block)              # Future of a Result
        future = workers.check(source)              # Future of Damage or None

Processes are spawned, not forked: the tokenizers library has threads of its own.  They end when this process does, even
if it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from surgery.data.tokenizing.encoder import Encoder, Result
from surgery.data.tokenizing.settings import Settings
from surgery.data.tokenizing.sources import Source
from surgery.data.tokenizing.text import Block, Damage, check
from surgery.errors import SurgeryError

T = TypeVar("T")
_mine: list[Encoder] = []  # of this worker process, put there when it starts


class Workers:
    """`count` processes, or a thread."""

    def __init__(self, count: int, document: bytes, settings: Settings) -> None:
        self.count, self.columns = count, settings.columns
        self._pool: Executor
        self._encode: Callable[[Block], Result]
        if count == 1:
            self._encode = Encoder(document, settings).encode
            self._pool = ThreadPoolExecutor(1, "surgery-encode")
        else:
            self._encode = _encode
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, spawn, _start, (document, settings))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, block: Block) -> Future[Result]:
        return self._submit(self._encode, block)

    def check(self, source: Source) -> Future[Damage | None]:
        return self._submit(check, source, self.columns)

    def _submit(self, work: Callable[..., T], *args: object) -> Future[T]:
        with explained():
            return self._pool.submit(work, *args)


@contextmanager
def explained() -> Iterator[None]:
    """The death of a worker as a SurgeryError."""
    try:
        yield
    except BrokenProcessPool:
        hint = "it may have run out of memory: use fewer --workers; what was written is kept"
        raise SurgeryError("a worker process was killed", hint=hint) from None


def _start(document: bytes, settings: Settings) -> None:
    """In a new worker process: get ready, and end when the parent does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the work, and in order
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    _mine.append(Encoder(document, settings))


def _outlive_nobody() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(block: Block) -> Result:
    return _mine[0].encode(block)
