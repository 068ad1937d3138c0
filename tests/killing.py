"""Processes that kill themselves at a given system call, and what they leave: for tests of runs that are resumed.

pid = forked(lambda: (dies_at(7, after=True), job()))       # the seventh call that changes something is the last
"""

import os
import signal
import traceback

from surgery.writing import renaming

CHANGING = "pwrite write rename replace mkdir rmdir unlink ftruncate fsync fdatasync open".split()


def tree(folder):
    """The bytes of every file, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def forked(job):
    """The process id of a child that does `job` and ends with status 0, or 1 after an error, which it prints."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            job()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def dies_at(n, after):
    """Make the n-th changing system call the last, before or after it is done; returns the count of calls."""
    count = [0]

    def wrap(place, name):
        real = getattr(place, name)

        def call(*args, **kw):
            count[0] += 1
            if count[0] == n and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kw)
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(place, name, call)

    for name in CHANGING:
        wrap(os, name)
    wrap(renaming, "_renameat2")
    return count
