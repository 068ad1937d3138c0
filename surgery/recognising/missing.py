"""A path that is not there: what it may have been meant to be.

absent("../lama0")          # FileError: does not exist, hint: did you mean ../llama0?
absent("ftp://host/model")  # FileError: is an address, hint: copy it here first
"""

from __future__ import annotations

import difflib
import os
import re
from glob import has_magic
from pathlib import Path

from surgery.containers import hub
from surgery.errors import FileError

MOST = 2000  # names that a wrong one is compared with
_TYPO = re.compile(r"(s3|r2|gs|az|hf|https?)(?::/*|//+)([^/:].*)", re.I)
_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]*)://?(.*)$", re.I)


def absent(path: str | os.PathLike[str]) -> FileError:
    """The error for a path that does not exist."""
    text = os.fspath(path)
    if typo := _TYPO.fullmatch(text):
        return FileError("is no path and no address", file=text, hint=f"did you mean {typo[1].lower()}://{typo[2]}?")
    if has_magic(text):
        return FileError("no file or folder has such a name", file=text,
                         hint="a pattern without quotes is for the shell; where it stands, nothing fits")  # fmt: skip
    if address := _ADDRESS.match(text):
        scheme, name = address[1].lower(), address[2].lstrip("/")
        full = f"{scheme}://{name}"
        if not name:
            return FileError("is the beginning of an address", file=full, hint="surgery inspect s3://BUCKET/PREFIX")
        if scheme == "file":
            return FileError("is a URL of a file of this machine", file=text, hint=f"did you mean /{name}?")
        how = "copy it to this machine first; read where they lie are s3://, r2://, gs://, az://, https:// and hf://"
        return FileError("is an address of a kind that is not read", file=full, hint=how)
    if not text:
        return FileError("an empty path", hint="give a file or folder, . for this one")
    if os.path.islink(text):
        return FileError("is a link to something that does not exist", file=text)
    if near := _near(Path(text)):
        return FileError("does not exist", file=text, hint=f"did you mean {near}?")
    if hub.is_name(text):
        return FileError("is neither a folder nor in the local cache of the hub", file=text,
                         hint=f"download it first: hf download {text}")  # fmt: skip
    whole = Path(os.path.abspath(text))
    there = next(p for p in whole.parents if p.exists())
    hint = None if there == whole.parent else f"of this path, {there} exists and {whole.relative_to(there)} does not"
    return FileError("does not exist", file=text, hint=hint)


def _near(path: Path) -> str | None:
    """An entry of the same folder whose name is close."""
    parent = path.parent
    try:
        names = [entry.name for entry, _ in zip(os.scandir(parent), range(MOST), strict=False)]
    except OSError:
        return None
    found = difflib.get_close_matches(path.name, names, 1, cutoff=0.75)
    return os.path.normpath(os.path.join(parent, found[0])) if found else None
