"""How a command behaves towards its terminal: any text can be printed, SIGTERM and umasks leave nothing amiss.

lenient_streams()
with stoppable():      # SIGTERM and SIGHUP end what runs here as an exception does
    ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from surgery.cli.command import LOG, quiet
from surgery.errors import printable
from surgery.writing.progress import PROGRESS

ASIDE = "aside"  # marks records for a log file that are printed in another way


class Stopped(SystemExit):
    """A signal asked the process to end; the exit status is 128 and its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def say(text: str, err: bool = False, **style: Any) -> None:
    """Print text for people, in a style of click's; what is not printable in it is escaped."""
    if quiet() and not err:
        return
    click.secho(printable(text), err=err, **style)


def tell(text: str) -> None:
    """Say on stderr what is done on the way, unless only errors are to be printed; a log file is told as well."""
    LOG.info("%s", text)


@contextmanager
def talking() -> Iterator[None]:
    """Print what the logger `surgery` is told, to stderr, while a command runs."""
    level, handlers = LOG.level, list(LOG.handlers)
    LOG.setLevel(logging.INFO)
    LOG.addHandler(_Printed())
    try:
        yield
    finally:
        LOG.setLevel(level)
        for handler in LOG.handlers[len(handlers) :]:
            LOG.removeHandler(handler)
            handler.close()


class _Printed(logging.Handler):
    """Records as lines; not those that are for a log file, nor those of progress where there are bars."""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, ASIDE) or (hasattr(record, PROGRESS) and sys.stderr.isatty()):
            return
        say(self.format(record), err=True)


def lenient_streams() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of ending in a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise Stopped, so that temporary folders are removed.  A second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) == signal.SIG_DFL]

    def restore() -> None:
        for s in before:
            signal.signal(s, signal.SIG_DFL)

    def stop(signum: int, frame: FrameType | None) -> None:
        restore()
        raise Stopped(signum)

    for s in before:
        signal.signal(s, stop)
    try:
        yield
    finally:
        restore()


@contextmanager
def owners_rights() -> Iterator[None]:
    """A umask takes rights from others only: without their own, owners could not go on with what is written."""
    before = os.umask(0o077)
    os.umask(before & 0o077)
    try:
        yield
    finally:
        os.umask(before)
