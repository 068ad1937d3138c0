"""Every error a user can meet, each saying what is wrong, where, and what to do.

    SurgeryError            anything the user or the file got wrong; shown without a traceback, exit status 1
    |-- FileError           a file is broken, hostile, truncated, missing, or not what its name says
    |-- LayoutError         tensors and the format's table disagree: names, shapes, dtypes, divisibility
    |   `-- NoStateError    no state of an optimizer is there, or one of a kind that is not read
    |-- ConfigError         a config file or key cannot be understood or cannot be represented in the target
    |   `-- AmbiguousError  the files can be read in several ways; `readings` are the options that decide
    |-- UsageError          flags or arguments do not fit together; exit status 2
    |-- OutputError         the destination exists, is full, or cannot be written
    `-- MismatchError       a verification found a difference

The wrong values of flags, arguments and configs (UsageError, ConfigError) are ValueErrors, too, as Python calls them.
Nothing else is raised on bad input.  `assert` is for our own mistakes only.  What the system refuses (a file, memory,
a thread) becomes one of them by `reported`; what came from a file is printed through `show`, `some` or `printable`.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 4000  # characters of one message


class SurgeryError(Exception):
    """`what` went wrong, in which `file` (`member` of an archive, `byte` offset), and a `hint` what to do.

    The text has one shape: `FILE!MEMBER @ byte N: WHAT`, then `hint: HINT` on a line of its own.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        member: str | None = None,
        byte: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.member, self.byte, self.hint = told(what), member, byte, hint and told(hint)
        self.file = None if file is None else shown(file)

    def to_json(self) -> dict[str, object]:
        """What `--json` prints of it."""
        return {"kind": type(self).__name__, "what": printable(self.what, LONGEST), "file": self.file,
                "member": self.member, "byte": self.byte, "hint": self.hint}  # fmt: skip

    def __str__(self) -> str:
        place = "" if self.file is None else ascii(self.file)[1:-1]
        if self.member is not None:
            place += f"!{ascii(self.member[:80])[1:-1]}"  # names inside a file are the file's
        if self.byte is not None:
            place += f" @ byte {self.byte}"
        text = printable(f"{place}: {self.what}" if place else self.what, LONGEST)
        return f"{text}\n  hint: {printable(self.hint, LONGEST)}" if self.hint else text


class FileError(SurgeryError):
    """A file is broken, hostile, truncated, missing, or not what its name says."""


class LayoutError(SurgeryError):
    """Tensors and the format's table disagree."""


class NoStateError(LayoutError):
    """No state of an optimizer is there, or one of a kind that is not read.  What is there may be sound."""


class ConfigError(SurgeryError, ValueError):
    """A config cannot be understood, or cannot be represented in the target format."""


class AmbiguousError(ConfigError):
    """The files can be read in several ways that they do not tell apart; `readings` are the options that decide."""

    def __init__(
        self,
        what: str,
        *,
        readings: tuple[dict[str, str], ...],
        file: str | os.PathLike[str] | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, file=file, hint=hint)
        self.readings = readings


class UsageError(SurgeryError, ValueError):
    """Flags or arguments do not fit together."""


class OutputError(SurgeryError):
    """The destination exists, is full, or cannot be written."""


class MismatchError(SurgeryError):
    """A verification found a difference."""


_ONE_SLASH = re.compile(r"^(s3|r2|gs|az|hf|https?):/(?=[^/])", re.I)  # what a Path makes of an address
_names: dict[str, str] = {}


def known_as(folder: str, name: str) -> None:
    """From now on messages and records call this folder by another name: it stands for an address."""
    _names[folder] = name


def told(text: str) -> str:
    """A text with the names of folders that stand for addresses."""
    for folder, name in _names.items():
        text = text.replace(folder, name)
    return text


def shown(path: str | os.PathLike[str]) -> str:
    """A path as messages and records call it."""
    text = os.fspath(path)
    for folder, name in _names.items():
        if text == folder or text.startswith(f"{folder}/"):
            return name + text[len(folder) :]
    return _ONE_SLASH.sub(r"\1://", text)


def show(value: object, limit: int = 80) -> str:
    """A short ASCII text of a value that came from a file: no control characters, no giant integers."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"<integer of {value.bit_length()} bits>"
    if isinstance(value, (str, bytes)):
        return ascii(value[:limit])
    if value is None or isinstance(value, (int, float, bool)):
        return ascii(value)
    return f"<{type(value).__name__}>"


def some(names: Iterable[object], limit: int = 5) -> str:
    """The first few of many names, each cut and in ASCII without control characters, and how many more there are."""
    names = list(names)
    text = ", ".join(_ascii(str(name)) for name in names[:limit])
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def suggest(wrong: object, names: Iterable[str], label: str = "known") -> str:
    """A hint for a name that there is not: the nearest right one, or else all of them."""
    names = list(names)
    near = difflib.get_close_matches(str(wrong), names, 1)
    return f"did you mean {near[0]}?" if near else f"{label}: {', '.join(names)}"


def _ascii(name: str, limit: int = 120) -> str:
    cut = name[:limit] + ("..." if len(name) > limit else "")
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in cut)


def printable(text: str, limit: int | None = None) -> str:
    """Text that a terminal may be given: controls, escape sequences and marks that turn the direction as \\x1b etc."""
    cut = text if limit is None or len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in cut)


ADVICE = {
    errno.EACCES: "look at the rights of the file and of every folder above it",
    errno.EPERM: "look at the rights of the file and of every folder above it",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room on the disk",
    errno.EMFILE: "allow the process more open files: ulimit -n 4096",
    errno.ENFILE: "allow the process more open files: ulimit -n 4096",
    errno.EIO: "the disk or the network failed; see the system's log, then try again",
    errno.ESTALE: "the disk or the network failed; see the system's log, then try again",
}
SHORT = "close other programs, allow the process more memory and threads (ulimit -a), or give a smaller --max-memory"


def shortage(error: BaseException) -> str | None:
    """What the system had no more of, if that is the error: memory or threads."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "the system allows no more threads, or has no memory for one"
    return None


@contextmanager
def reported() -> Iterator[None]:
    """What the system refuses while this runs, as a SurgeryError; also a decorator, `@reported()`.

    A file or folder that cannot be used is a FileError.  A pipe that nobody reads is left to whoever prints.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        named = error.filename if isinstance(error.filename, (str, bytes, os.PathLike)) else None
        what = f"the system refuses: {error.strerror or type(error).__name__}"
        raise FileError(what, file=None if named is None else os.fsdecode(named),
                        hint=ADVICE.get(error.errno or 0)) from error  # fmt: skip
    except ValueError as error:
        if "embedded null" not in str(error):
            raise
        raise UsageError("a file name with a NUL in it is no usable one") from error
    except (MemoryError, RuntimeError) as error:
        if (lacking := shortage(error)) is None:
            raise
        raise SurgeryError(lacking, hint=SHORT) from error
