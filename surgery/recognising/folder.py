"""The names in a folder, two levels deep: all that telling its kind needs.

folder = Folder.of(Path("run"))
folder.matching("global_step*/*_model_states.pt")      # ["global_step5/mp_rank_00_model_states.pt"]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.errors import FileError

MOST = 20_000  # names; of a larger folder the first that the system lists
LEVELS = 2


@dataclass(frozen=True)
class Folder:
    """`names` are relative, with slashes; those of folders end in one.  `depths` are how many slashes are inside."""

    path: Path
    names: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> Folder:
        """Raises FileError if the folder cannot be listed; folders in it that cannot be are left out."""
        names: list[str] = []
        try:
            _list(path, "", names, LEVELS)
        except OSError as error:
            raise FileError(f"cannot be listed: {error.strerror}", file=path) from None
        return cls(path, tuple(sorted(names)))

    def matching(self, pattern: str) -> list[str]:
        """Names of the same depth that a pattern matches.  `*` stays within one level."""
        parts = pattern.split("/")
        return [name for name in self.names if _matches(name.split("/"), parts)]

    @property
    def files(self) -> list[str]:
        """Those at the top."""
        return [name for name in self.names if "/" not in name]

    @property
    def folders(self) -> list[str]:
        """Those at the top, without slashes."""
        return [name[:-1] for name in self.names if name.count("/") == 1 and name.endswith("/")]


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(fnmatchcase(n, p) for n, p in zip(name, pattern, strict=True))


def _list(path: Path, prefix: str, names: list[str], levels: int) -> None:
    below = []
    with os.scandir(path) as entries:
        for entry in entries:
            if len(names) >= MOST:
                return
            is_folder = entry.is_dir()
            names.append(prefix + entry.name + "/" * is_folder)
            if is_folder and levels > 1:
                below.append(entry)
    for entry in below:
        try:
            _list(Path(entry.path), f"{prefix}{entry.name}/", names, levels - 1)
        except OSError:
            continue
