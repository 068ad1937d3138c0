"""A Megatron `.idx` for token files of other programs: the same bytes under a second name, none of them copied.

    done = index_payload("part-0-00000.npy")        # writes part-0-00000.idx, links part-0-00000.bin to the .npy
    done.linked, done.documents                     # "hard", 54

dolma's `.npy`, datatrove's `.ds` and Megatron's and NeoX's `.bin` are bare ids, one after the other.  uint32, which a
Megatron index cannot say, is read as int32: the same bytes, as long as ids are below 2^31, which is checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surgery.data.files.idx import CODES, DTYPES, read_index, write_index
from surgery.data.files.npy import is_npy
from surgery.data.files.readers import open_tokens
from surgery.data.files.tokens import MASK_SUFFIX, TokenFile
from surgery.data.inspection import lengths_of
from surgery.errors import ConfigError, FileError, OutputError, UsageError
from surgery.storage.address import is_address
from surgery.tensors.files import BRING

CHUNK = 1 << 22
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Indexed:
    """What was done for one payload.  `linked`: "hard", "symbolic", or "" if it had the right name already."""

    payload: Path
    index: Path
    bin: Path
    linked: str
    dtype: str
    documents: int
    tokens: int


def payloads(place: str | os.PathLike[str]) -> list[Path]:
    """The payloads of a path: itself, or those in a folder that have no index of Megatron's.  Raises FileError."""
    if is_address(place):
        raise UsageError(f"{place}: an index is written beside its payload, on this machine", hint=BRING)
    path = Path(place)
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix in (".npy", ".ds", ".bin") and p.is_file())
    bare = [p for p in files if not p.with_suffix(".idx").exists() and not (p.suffix == ".npy" and is_npy(p))]
    if not bare:
        held = "its token files have an index, or a NumPy header" if files else "holds no token files"
        raise FileError(f"nothing to index: {held}", file=path, hint="token files end in .npy, .ds or .bin")
    return bare


def index_payload(
    path: str | os.PathLike[str],
    *,
    to: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    eos: int | None = None,
    link: str = "auto",
    progress: Progress = lambda size: None,
) -> Indexed:
    """Write the index beside a payload, or into the folder `to`, and give the payload the name that belongs to it.

    dtype   of the ids, where nothing beside the file tells it      eos   the id that ends documents, likewise
    link    "hard", "symbolic", or "auto": hard where the disk allows it

    Raises ConfigError if the dtype or the documents are unknown, FileError if the file contradicts what lies beside it,
    OutputError if the index exists or cannot be written.
    """
    payload = Path(path)
    folder = payload.parent if to is None else Path(to)
    index, name = folder / f"{payload.stem}.idx", folder / f"{payload.stem}.bin"
    if os.path.lexists(index):
        raise OutputError("exists already", file=index, hint="move it away to make it anew")
    file = _open(payload, dtype, eos)
    stored = _stored_as(file, progress)
    assert file.bounds is not None
    lengths = np.concatenate([np.zeros(0, np.int64), *lengths_of(file.bounds)])
    folder.mkdir(parents=True, exist_ok=True)
    linked = _link(payload, name, link)
    mask = payload.with_suffix(MASK_SUFFIX)
    if to is not None and mask.is_file():
        _link(mask, name.with_suffix(MASK_SUFFIX), link)
    write_index(index, stored, lengths, force=False)
    read = read_index(index)
    return Indexed(payload, index, name, linked, stored, len(read.documents) - 1, read.tokens)


def _open(payload: Path, dtype: str | None, eos: int | None) -> TokenFile:
    if payload.suffix == ".npy" and is_npy(payload):
        hint = "its ids do not begin at byte 0; training reads it as it is"
        raise ConfigError("is a NumPy file with a header, which no Megatron index can skip", file=payload, hint=hint)
    format = "datatrove" if payload.suffix == ".ds" else "dolma"  # a bare .bin has what dolma's files have: nothing
    [file] = open_tokens(payload, format, dtype=dtype, eos=eos)
    if file.bounds is None:
        hint = "say which id ends them: --eos ID"
        raise ConfigError("nothing beside it tells where documents end", file=payload, hint=hint)
    return file


def _stored_as(file: TokenFile, progress: Progress) -> str:
    """The dtype as an index says it.  Raises ConfigError if it cannot."""
    ids = file.ids.array
    if ids.dtype.name not in CODES:
        hint = f"it can say {', '.join(DTYPES.values())}"
        raise ConfigError(f"a Megatron index cannot say {ids.dtype.name}", file=file.path, hint=hint)
    stored = DTYPES[CODES[ids.dtype.name]]
    if stored != ids.dtype.name:
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            if int(chunk.max()) > np.iinfo(stored).max:
                at = start + int(np.argmax(chunk > np.iinfo(stored).max))
                raise ConfigError(f"token {at} is {ids[at]}, too large for {stored}", file=file.path)
            progress(chunk.nbytes)
    return stored


def _link(payload: Path, name: Path, link: str) -> str:
    """Give a file a second name; how that was done, "" if it is its own already.  Raises OutputError."""
    if os.path.lexists(name):
        if name.exists() and os.path.samefile(payload, name):
            return ""
        raise OutputError(f"exists already, and is not {payload.name}", file=name, hint="move it away")
    try:
        if link != "symbolic":
            with suppress(*([OSError] if link == "auto" else [])):
                os.link(payload, name)
                return "hard"
        os.symlink(payload.name if payload.parent == name.parent else os.path.abspath(payload), name)
    except OSError as error:
        hint = "--link symbolic works across disks" if link == "hard" else None
        raise OutputError(f"no link to {payload}: {error.strerror}", file=name, hint=hint) from None
    return "symbolic"
