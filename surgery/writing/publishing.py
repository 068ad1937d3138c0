"""The last step: the hidden folder's data become the destination, and nothing of others is lost.

    refuse(dst, force)                   # OutputError if something is there that may not be replaced
    publish(stage, {"config.json"})      # looks again, and at what it took away, too
    recover(stage)                       # finishes or undoes what a kill in the middle of it left

Without --force, the name is taken only if it is free, in one step.  With it, the old folder and the new one change
places in one step, and the old one is removed when it was found to be what --force may replace.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from surgery.errors import OutputError, show, some
from surgery.writing import journal
from surgery.writing.renaming import exchange, move
from surgery.writing.replaceable import is_junk, others


class Stage(Protocol):
    """What is asked of the hidden folder: `fd` is open on it, `data` on the data in it, -1 if there are none."""

    dst: Path
    hidden: Path
    fd: int
    data: int
    force: bool
    durable: bool
    found: os.stat_result | None

    def has(self, name: str) -> bool: ...
    def read(self, name: str) -> bytes: ...
    def note(self, name: str, data: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


OURS = {"lock", "data", "old", "swap", journal.NAME}
TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
AWAY = "move it away, then run the same command again"


def refuse(dst: Path, force: bool) -> None:
    """Raise OutputError if something is at `dst` that may not be replaced."""
    if not os.path.lexists(dst) or is_empty_folder(dst):
        return
    if dst.is_symlink() or not dst.is_dir():
        raise OutputError("is no folder", file=dst, hint="choose another destination")
    here = {Path.home().absolute()}
    with suppress(FileNotFoundError):  # it was removed
        here.add(Path.cwd())
    if dst == Path(dst.anchor) or any(dst == p or dst in p.parents for p in here):
        raise OutputError("holds the working or the home folder and is never replaced", file=dst)
    if not force:
        raise OutputError("exists already", file=dst, hint="choose another destination, or --force to replace it")
    _refuse_others(dst, dst)


def _refuse_others(folder: Path, dst: Path) -> None:
    if strange := others(folder):
        what = f"holds files that are part of no checkpoint, which --force does not replace: {some(strange)}"
        raise OutputError(what, file=dst, hint="move them away, or choose another destination")


def is_empty_folder(path: Path) -> bool:
    return not path.is_symlink() and path.is_dir() and not any(path.iterdir())


def publish(stage: Stage, names: set[str]) -> None:
    """Make the data the destination: at once, and only when everything is on disk."""
    _settle(stage, names)
    if stage.durable:
        for _, _, _, folder in os.fwalk(".", dir_fd=stage.data, topdown=False):
            os.fsync(folder)
    parent = os.open(stage.dst.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _take_the_name(stage, parent)
        if stage.durable:
            os.fsync(parent)
    finally:
        os.close(parent)
    stage.remove("old")
    stage.remove("swap")


def _settle(stage: Stage, names: set[str]) -> None:
    """See that the data are the planned files and nothing else; what file managers left among them is removed."""
    planned = {name[:i] for name in names for i in range(len(name)) if name[i] == "/"}
    held, folders = set(), set()
    for at, inner, files, fd in os.fwalk(".", dir_fd=stage.data):
        links = {n for n in inner if stat.S_ISLNK(os.stat(n, dir_fd=fd, follow_symlinks=False).st_mode)}
        held |= {os.path.normpath(os.path.join(at, name)) for name in (*files, *links)}
        folders |= {os.path.normpath(os.path.join(at, name)) for name in inner if name not in links}
    if lost := names - held:
        what = f"{some(sorted(lost))} vanished while the output was written"
        raise OutputError(what, file=stage.hidden, hint="see which program removes files here, then start again")
    junk = {name for name in held - names if any(map(is_junk, name.split("/")))}
    if strange := held - names - junk:
        what = f"another program put files among the data: {some(map(show, sorted(strange)))}"
        raise OutputError(what, file=stage.hidden, hint="move them away, then run the same command again")
    for name in junk:
        with suppress(OSError):  # a file that is open on a network file system stays until it is closed
            os.unlink(name, dir_fd=stage.data)
    for name in sorted(folders - planned, reverse=True):
        with suppress(OSError):
            os.rmdir(name, dir_fd=stage.data)


def _take_the_name(stage: Stage, parent: int) -> None:
    name = stage.dst.name
    try:
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        there = None
    try:
        if there is None:
            move("data", name, stage.fd, parent)
        elif stage.found and os.path.samestat(there, stage.found) and is_empty_folder(stage.dst):
            os.rename("data", name, src_dir_fd=stage.fd, dst_dir_fd=parent)  # the system refuses if it is empty no more
        elif stage.force:
            _replace(stage, parent)
        else:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        raise OutputError("was made by another program meanwhile", file=stage.dst, hint=AWAY) from None


def _replace(stage: Stage, parent: int) -> None:
    """Change places with what is at the destination, which becomes `old`; undo it if that may not be replaced."""
    name, new = stage.dst.name, os.fstat(stage.data)
    refuse(stage.dst, force=True)
    stage.note("swap", f"{new.st_dev} {new.st_ino}\n".encode())
    if exchange("data", name, stage.fd, parent):
        try:
            _refuse_unless_old(stage, "data")
        except BaseException:
            exchange("data", name, stage.fd, parent)
            stage.remove("swap")
            raise
        os.rename("data", "old", src_dir_fd=stage.fd, dst_dir_fd=stage.fd)
        return
    stage.remove("swap")
    os.rename(name, "old", src_dir_fd=parent, dst_dir_fd=stage.fd)
    try:
        _refuse_unless_old(stage, "old")
        move("data", name, stage.fd, parent)
    except BaseException:
        move("old", name, stage.fd, parent)
        raise


def _refuse_unless_old(stage: Stage, name: str) -> None:
    """What was taken away may differ from what was looked at just before."""
    place = stage.hidden / name
    if place.is_symlink() or not place.is_dir():
        raise OutputError("was replaced by another program meanwhile", file=stage.dst, hint=AWAY)
    _refuse_others(place, stage.dst)


def recover(stage: Stage) -> None:
    """Finish or undo the renaming of a run that was killed in the middle of it.  Raises OutputError."""
    strange = {name for name in os.listdir(stage.fd) if name not in OURS and not is_junk(name)}
    if strange:
        what = f"holds {some(map(show, sorted(strange)))}: not the unfinished output of an earlier run"
        raise OutputError(what, file=stage.hidden, hint="move it away")
    if stage.has("swap"):
        if _identity(stage.dst) == stage.read("swap") and stage.has("data"):  # they have changed places
            os.rename("data", "old", src_dir_fd=stage.fd, dst_dir_fd=stage.fd)
        stage.remove("swap")
    if not stage.has("old"):
        return
    if not os.path.lexists(stage.dst):
        os.rename("old", stage.dst, src_dir_fd=stage.fd)
    elif not stage.has("data"):
        stage.remove("old")
    else:
        raise OutputError(
            f"what {stage.dst.name} was before an earlier run with --force still lies in 'old'",
            file=stage.hidden,
            hint="move it away, or back",
        )


def _identity(path: Path) -> bytes:
    try:
        info = os.stat(path, follow_symlinks=False)
    except OSError:
        return b""
    return f"{info.st_dev} {info.st_ino}\n".encode()
