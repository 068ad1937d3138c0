"""Renames that take nothing away: into a free place only, or two folders for each other.

    move("data", "out", hidden, parent)         # FileExistsError if anything has the name
    exchange("data", "out", hidden, parent)     # at no moment is either name without a folder

Linux does both in one step (renameat2); where the system or the file system cannot, `move` looks and then renames,
which for a folder replaces an empty one at most, and `exchange` says False.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable

NOREPLACE, EXCHANGE = 1, 2  # linux/fs.h
CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def move(src: str, dst: str, src_folder: int, dst_folder: int) -> None:
    """Give the folder `src` of one open folder the name `dst` in another.  Raises FileExistsError, and OSError."""
    if _renameat2(src, dst, src_folder, dst_folder, NOREPLACE):
        return
    try:
        os.stat(dst, dir_fd=dst_folder, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(src, dst, src_dir_fd=src_folder, dst_dir_fd=dst_folder)
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), dst)


def exchange(a: str, b: str, a_folder: int, b_folder: int) -> bool:
    """Have `a` and `b` change places, if the system can: else False, and nothing was done."""
    return _renameat2(a, b, a_folder, b_folder, EXCHANGE)


def _renameat2(a: str, b: str, a_folder: int, b_folder: int, flag: int) -> bool:
    """False where there is no such call."""
    call = _system_call()
    if call is None:
        return False
    if call(a_folder, os.fsencode(a), b_folder, os.fsencode(b), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT:
        return False
    raise OSError(number, os.strerror(number), a, None, b)


@functools.cache
def _system_call() -> Callable[..., int] | None:
    try:
        call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]  # type: ignore[attr-defined]
    return call
