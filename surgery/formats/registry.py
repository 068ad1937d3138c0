"""Open a checkpoint of any format, and plan one in any format.

    checkpoint = open_checkpoint("Llama-2-7b")          # recognised; nothing of the weights is read
    checkpoint.parts["layers.0.attn.q"][:4]             # four rows, read now

`FORMATS` lists every format; adding one is a folder beside this file and a line here.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from surgery.arguments import checked
from surgery.containers import hub
from surgery.containers.text import read_json
from surgery.errors import FileError, UsageError, reported, some, suggest
from surgery.formats.base import ALLOW_UNKNOWN, PROVENANCE, Checkpoint, Format, Options, run_of
from surgery.formats.hf import format as hf
from surgery.formats.megatron import dist as megatron_dist
from surgery.formats.megatron import format as megatron
from surgery.formats.meta import format as meta
from surgery.formats.neox import format as neox
from surgery.formats.olmo import format as olmo
from surgery.formats.olmo_core import format as olmo_core
from surgery.formats.unknown import ALL
from surgery.recognising import Answer, look
from surgery.recognising.missing import absent
from surgery.storage.address import is_address
from surgery.storage.mirror import folder_of
from surgery.tensors.files import watched

LOG = logging.getLogger(__name__)
FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (hf.FORMAT, meta.FORMAT, olmo.FORMAT, olmo_core.FORMAT, megatron.FORMAT, megatron_dist.FORMAT, neox.FORMAT)
}


# other names that people give to formats
ALIASES: Mapping[str, str] = {
    "huggingface": "hf", "transformers": "hf", "llama": "meta", "gpt-neox": "neox", "gptneox": "neox",
    "megatron-lm": "megatron", "mcore": "megatron", "torch-dist": "megatron-dist", "dist": "megatron-dist",
}  # fmt: skip


@reported()
def recognise(path: str | os.PathLike[str]) -> Format:
    """The format of a folder.  Raises FileError if it is none that we know, or several; it says what lies there."""
    folder = located(path)
    found = _recognising(folder)
    if len(found) == 1:
        return found[0]
    if found:
        raise FileError(f"holds checkpoints of several formats: {some(f.name for f in found)}", file=folder,
                        hint="say which with --from")  # fmt: skip
    there = describe(folder)
    hint = "; ".join(there.next) or f"known formats: {', '.join(FORMATS)} (surgery formats)"
    raise FileError(f"is no checkpoint of a known format, but {there.what}", file=folder, hint=hint)


def describe(path: str | os.PathLike[str]) -> Answer:
    """What lies at a path, whatever it is, and what to do next.  Raises FileError if nothing does."""
    return look.describe(located(path) if is_address(path) else path, known)


def known(folder: Path) -> str | None:
    """The name of the format of a folder (of several, joined by slashes); None if it is no checkpoint."""
    return "/".join(f.name for f in _recognising(folder)) or None


def _recognising(folder: Path) -> list[Format]:
    return [f for f in FORMATS.values() if f.recognise(folder)] if folder.is_dir() else []


def located(path: str | os.PathLike[str]) -> Path:
    """A path that exists: as it is given, in the local cache of the hub if it is a name there, or what stands for an
    address.  Raises FileError that says what may have been meant.
    """
    if is_address(path):
        return folder_of(path)
    place = Path(path)
    if os.fspath(path) and place.exists():
        return place
    text = os.fspath(path)
    if hub.is_name(text):
        with contextlib.suppress(FileError):
            return hub.cached(*hub.name_and_revision(text))
    raise absent(path)


def named(name: str) -> Format:
    """A format by its name, or another that people give it.  Raises UsageError if there is none of that name."""
    plain = name.lower().replace("_", "-").replace("hugging-face", "huggingface")
    name = ALIASES.get(plain, plain if plain in FORMATS else name)
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}", hint=suggest(name, FORMATS, "known formats"))
    return FORMATS[name]


def format_of(path: str | os.PathLike[str], name: str | None = None) -> Format:
    """The format of a folder: the one that is named, else the one that is recognised.

    Raises FileError if there is no such folder, or if it holds no format that we know, or several.
    """
    if name is None:
        return recognise(path)
    found = named(name)
    if not located(path).is_dir():
        raise FileError("is no folder", file=path)
    return found


def by_side(
    options: Options, reading: Iterable[Format], writing: Format | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """The options for reading any of some formats and those for writing one.  Raises UsageError for all others."""
    reading = list(reading)
    reads = {name for f in reading for name in f.option_names("read")}
    writes = writing.option_names("write") if writing else set()
    if unknown := [name for name in options if name not in reads | writes]:
        sides = [
            *dict.fromkeys(f"reading {f.name}" for f in reading),
            *([f"writing {writing.name}"] if writing else []),
        ]
        what = sides[0] + " has no" if len(sides) == 1 else f"neither {' nor '.join(sides)} has an"
        near = suggest(unknown[0], sorted(reads | writes))
        hint = near if near.startswith("did") else "`surgery formats` lists the options of every format"
        raise UsageError(f"{what} option {some(unknown)}", hint=hint)
    return {k: v for k, v in options.items() if k in reads}, {k: v for k, v in options.items() if k in writes}


def own_options(path: str | os.PathLike[str], options: Options | None) -> dict[str, str]:
    """Those of some options that are for reading a folder, for options that are given to several."""
    known = recognise(path).option_names("read") if options else ()
    return {k: v for k, v in (options or {}).items() if k in known}


def lenient(path: str | os.PathLike[str], options: Options | None) -> dict[str, str]:
    """As `own_options`, for those who only look and say what they found: what is not understood is a note to them."""
    return {ALLOW_UNKNOWN.name: ALL, **own_options(path, options)}


@checked
def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    options: Options | None = None,
    optimizer: bool = False,
) -> Checkpoint:
    """A checkpoint of any format, recognised unless `format` says it.  `options` are those of `surgery formats`.

    `optimizer`: with the state of Adam that lies there, as `Checkpoint.optimizer` (None if there is none).

    Raises SurgeryError if anything about it is broken, unknown, missing or left over.
    """
    found, folder = format_of(path, format), located(path)
    given, _ = by_side(options or {}, [found])
    with watched() as stamps:
        checkpoint = found.open(folder, found.with_defaults(given, "read"), optimizer)
        details = {**_carried(folder), **checkpoint.details}
    LOG.debug("opened %s: %s %s, %d parts in %d files", folder, checkpoint.format, checkpoint.spec.family,
              len(checkpoint.parts), len(checkpoint.files))  # fmt: skip
    return replace(checkpoint, notes=tuple(dict.fromkeys(checkpoint.notes)), details=details, stamps=stamps)


def _carried(folder: Path) -> dict[str, int]:
    """How far the run had come from which surgery wrote this folder, if it did."""
    if not (folder / PROVENANCE).is_file():
        return {}
    record = read_json(folder / PROVENANCE, PROVENANCE)
    run = record.get("run") if isinstance(record, dict) else None
    return run_of(run) if isinstance(run, dict) else {}
