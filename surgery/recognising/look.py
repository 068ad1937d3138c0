"""Describe what lies at a path: the first kind that fits, what its files hold, what to do next.

describe("checkpoint/pytorch_model.bin").contents.tensors
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from surgery.errors import FileError, SurgeryError, reported, show, shown, some
from surgery.recognising import files
from surgery.recognising.contents import Contents, contents
from surgery.recognising.facts import family
from surgery.recognising.folder import Folder
from surgery.recognising.folders import FOLDERS, LORA, OTHER, WEAK
from surgery.recognising.kind import Answer, Kind
from surgery.recognising.missing import absent
from surgery.recognising.trainers import TRAINERS
from surgery.tensors.files import File

Known = Callable[[Path], str | None]
MOST = 200  # folders inside that are looked at
HEAD = 512  # bytes that tell a file's kind
UP = 3  # folders above a file that may be its checkpoint
WORDS = {"base": "MODEL", "family": "model", "proper": "model.safetensors"}
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@reported()
def describe(path: str | os.PathLike[str], known: Known = lambda folder: None) -> Answer:
    """What lies at a path.  `known` names the format of a folder that is a checkpoint.

    Raises FileError only if nothing is there, or the system does not let it be seen.
    """
    place, known = Path(path), _cautious(known)
    if not os.fspath(path) or not place.exists():
        raise absent(path)
    mode = place.stat().st_mode
    if stat.S_ISDIR(mode) and (format := known(place)):
        return Answer(shown(path), "checkpoint", f"a checkpoint ({format})", family(place))
    if stat.S_ISDIR(mode):
        return _folder(place, known)
    if not stat.S_ISREG(mode):
        return Answer(shown(path), "special", _SPECIAL.get(stat.S_IFMT(mode), "no regular file"))
    return _file(place, known)


def _cautious(known: Known) -> Known:
    """None for folders that may not be looked into."""

    def asked(folder: Path) -> str | None:
        with suppress(SurgeryError, OSError):
            return known(folder)
        return None

    return asked


def unread(path: Path, format: str) -> Answer:
    """What can be said of a checkpoint in a known format that cannot be opened as one."""
    held, _ = _read([path])
    return Answer(shown(path), "unread", f"a checkpoint ({format}) that cannot be read as one", family(path), (), held)


def _answer(kind: Kind, path: Path, held: Contents | None = None, problem: str | None = None,
            more: Mapping[str, str] | None = None) -> Answer:  # fmt: skip
    facts = {**(kind.facts(path) if kind.facts else {}), **(more or {})}
    place = shown(path)
    parent = os.path.dirname(place) or "."
    words = {**WORDS, **facts, "path": shlex.quote(place), "parent": shlex.quote(parent), "name": path.name}
    steps = tuple(step.format_map(words) for step in kind.next)
    told = {name: text for name, text in facts.items() if name != "proper"}
    return Answer(shown(path), kind.name, kind.what.format_map(words), told, steps, held, problem)


def _read(paths: Iterable[Path]) -> tuple[Contents | None, str | None]:
    """What files hold, or why they cannot be read."""
    paths = sorted(paths)
    if not paths:
        return None, None
    try:
        return contents(paths), None
    except SurgeryError as error:
        return None, str(error)


# --------------------------------------------------------------------------------------------------- folders


def _folder(path: Path, known: Known) -> Answer:
    folder = Folder.of(path)
    kind = _first_fit(FOLDERS, folder)
    if kind is None and (inside := _checkpoints(folder, known)):
        return _parent(path, inside)
    kind = kind or _first_fit(WEAK, folder) or OTHER
    held, problem = _read(path / name for name in _first(folder, kind))
    more = {"holds": some([*folder.folders, *folder.files], 8)} if kind is OTHER else {}
    return _answer(kind, path, held, problem, more)


def _first_fit(kinds: Iterable[Kind], folder: Folder) -> Kind | None:
    return next((kind for kind in kinds if kind.fits_folder(folder)), None)


def _parent(path: Path, inside: Mapping[str, str]) -> Answer:
    what = f"a folder of {len(inside)} checkpoints" if len(inside) > 1 else "a folder with a checkpoint in it"
    listed = some((f"{name} ({format})" for name, format in inside.items()), 8)
    step = f"surgery inspect {shlex.quote(shown(path / list(inside)[-1]))}"
    return Answer(shown(path), "parent", what, {"checkpoints": listed}, (step,))


def _first(folder: Folder, kind: Kind) -> list[str]:
    """The files of the first pattern that matches any."""
    return next((names for p in kind.weights if (names := folder.matching(p))), [])


def _checkpoints(folder: Folder, known: Known) -> dict[str, str]:
    """Folders inside, one or two levels down, that are checkpoints: their formats or kinds."""
    for depth in (1, 2):
        names = [name[:-1] for name in folder.names if name.endswith("/") and name.count("/") == depth]
        if found := {name: what for name in names[:MOST] if (what := known(folder.path / name) or _kind(folder, name))}:
            return found
    return {}


def _kind(folder: Folder, name: str) -> str | None:
    """The kind of a checkpoint of a trainer, by the names in it."""
    with suppress(FileError):
        found = _first_fit((LORA, *TRAINERS), Folder.of(folder.path / name))
        return found.name if found else None
    return None


# ----------------------------------------------------------------------------------------------------- files


def _file(path: Path, known: Known) -> Answer:
    try:
        file = File(path)
        head = file.read(0, min(file.size, HEAD), "the first bytes")
    except FileError as error:
        return Answer(shown(path), "unreadable", "a file that cannot be read", {}, (), None, str(error))
    if not file.size:
        return _answer(files.EMPTY, path)
    torch, safetensors = _is_torch(path, head), head[8:9] == b"{" and head[6:8] == b"\0\0"
    kind = None if safetensors else next((k for k in files.FILES if k.fits_file(path, head)), None)
    if kind is None and (torch or safetensors):
        return _weights(path, files.SAFETENSORS if safetensors else files.TORCH, known)
    return _answer(kind or _by_content(path, head), path)


def _is_torch(path: Path, head: bytes) -> bool:
    return (head.startswith(b"PK\3\4") and path.suffix != ".npz") or head[:1] == b"\x80"


def _weights(path: Path, kind: Kind, known: Known) -> Answer:
    """A file that can hold tensors, and the checkpoint that it is part of."""
    held, problem = _read([path])
    owner = next((p for p in list(path.absolute().parents)[:UP] if known(p)), None)
    if held and held.tensors and all(".lora_" in name for name in held.tensors):
        kind = files.ADAPTER
    answer = _answer(kind, path, held, problem, {"proper": "model.safetensors" if kind is not files.TORCH else
                                                 "pytorch_model.bin"})  # fmt: skip
    if owner:
        near, whole = os.path.relpath(owner), shown(owner)
        step = f"surgery inspect {shlex.quote(whole if near.startswith('..') else near)}"
        return Answer(answer.path, answer.kind, f"{answer.what}, part of a checkpoint ({known(owner)})", answer.facts,
                      (step,), held, problem)  # fmt: skip
    if problem:
        return Answer(answer.path, answer.kind, f"{answer.what}, damaged", answer.facts, (), None, problem)
    return answer


def _by_content(path: Path, head: bytes) -> Kind:
    """Token files, text, or what nobody knows."""
    if path.suffix in (".npy", ".ds") or (path.suffix == ".bin" and path.with_suffix(".idx").is_file()):
        return files.TOKENS
    try:
        head.rsplit(b"\n", 1)[0].decode() if b"\n" in head else head.decode("utf-8", "strict")
    except UnicodeDecodeError:
        text = False
    else:
        text = b"\0" not in head
    if text:
        return files.TEXT
    return Kind("unknown", f"a file of a kind that surgery does not know; it begins with {_plain(head[:8])}",
                facts=files.UNKNOWN.facts)  # fmt: skip


def _plain(head: bytes) -> str:
    return show(head).replace("{", "{{").replace("}", "}}")
