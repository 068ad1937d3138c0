"""What tells a file from another, and one save from the next.

Stamp.of(os.stat("model.safetensors")).size
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Stamp(NamedTuple):
    """The times are in nanoseconds.

    `modified` is when the content was written last and can be set by anyone; `changed` is when anything about the
    file was (content, name, rights), and the system sets it.  Of an object in a store, `inode` is made of its ETag.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, info: os.stat_result) -> Stamp:
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
