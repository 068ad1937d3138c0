"""Open a checkpoint of any format, and plan one in any format.

    checkpoint = open_checkpoint("Llama-2-7b")          # recognised; nothing of the weights is read
    checkpoint.parts["layers.0.attn.q"][:4]             # four rows, read now

`FORMATS` lists every format; adding one is a folder beside this file and a line here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from surgery import tokenizer
from surgery.containers.text import read_json
from surgery.errors import FileError, LayoutError, UsageError, some
from surgery.formats.base import PROVENANCE, Checkpoint, Format, Options, run_of
from surgery.formats.hf import format as hf
from surgery.formats.megatron import dist as megatron_dist
from surgery.formats.megatron import format as megatron
from surgery.formats.meta import format as meta
from surgery.formats.neox import format as neox
from surgery.formats.olmo import format as olmo
from surgery.formats.olmo_core import format as olmo_core
from surgery.model.spec import Spec
from surgery.tensors.lazy import Concat, Fill, Lazy, Slice, cast

FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (hf.FORMAT, meta.FORMAT, olmo.FORMAT, olmo_core.FORMAT, megatron.FORMAT, megatron_dist.FORMAT, neox.FORMAT)
}

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def recognise(path: str | os.PathLike[str]) -> Format:
    """The format of a folder.  Raises FileError if it is none that we know, or several."""
    folder = Path(path)
    if not folder.exists():
        hint = "a model on a hub has to be downloaded first: hf download NAME --local-dir FOLDER"
        raise FileError("does not exist", file=folder, hint=hint if str(path).count("/") == 1 else None)
    if not folder.is_dir():
        raise FileError(
            "is a file; a checkpoint is the folder that holds it", file=folder, hint=f"give {folder.parent}"
        )
    found = [f for f in FORMATS.values() if f.recognise(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        raise FileError(f"holds checkpoints of several formats: {some(f.name for f in found)}", file=folder,
                        hint="say which with --from")  # fmt: skip
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(f.recognise(p) for f in FORMATS.values()))
    raise FileError(
        "is no checkpoint of a known format",
        file=folder,
        hint=f"it holds some: {some(inside)}" if inside else f"known formats: {', '.join(FORMATS)} (surgery formats)",
    )


def open_checkpoint(
    path: str | os.PathLike[str], *, format: str | None = None, options: Options | None = None
) -> Checkpoint:
    """A checkpoint of any format, recognised unless `format` says it.  `options` are those of `surgery formats`.

    Raises SurgeryError if anything about it is broken, unknown, missing or left over.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"there is no format {format!r}", hint=f"known formats: {', '.join(FORMATS)}")
    found = FORMATS[format] if format else recognise(path)
    if format and not Path(path).is_dir():
        raise FileError("is no folder", file=path)
    given = options or {}
    unknown = given.keys() - found.option_names("read")
    if unknown:
        raise UsageError(
            f"reading {found.name} has no option {some(sorted(unknown))}", hint=f"surgery formats {found.name}"
        )
    checkpoint = found.open(Path(path), found.with_defaults(given, "read"))
    details = {**_carried(Path(path)), **checkpoint.details}
    return replace(checkpoint, notes=tuple(dict.fromkeys(checkpoint.notes)), details=details)


def _carried(folder: Path) -> dict[str, int]:
    """How far the run had come from which surgery wrote this folder, if it did."""
    if not (folder / PROVENANCE).is_file():
        return {}
    record = read_json(folder / PROVENANCE, PROVENANCE)
    run = record.get("run") if isinstance(record, dict) else None
    return run_of(run) if isinstance(run, dict) else {}


# Operations: pure functions from checkpoint to checkpoint, lazy and composable.


def to_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Every floating-point part in another dtype, rounded once."""
    parts = {name: cast(part, dtype) if _is_float(part) else part for name, part in checkpoint.parts.items()}
    return replace(checkpoint, parts=parts)


def _is_float(part: Lazy) -> bool:
    return part.dtype.startswith(("float", "bfloat"))


def to_vocab(checkpoint: Checkpoint, rows: int) -> Checkpoint:
    """The vocabulary cut, or padded with zeros, to `rows`.  Raises LayoutError if tokens would be cut."""
    spec, found = checkpoint.spec, checkpoint.tokenizer
    if rows == spec.vocab:
        return checkpoint
    tokens = spec.true_vocab or (found.vocab_size if found else None)
    if tokens is not None and rows < tokens:
        raise LayoutError(f"--vocab-size {rows} would cut tokens: the tokenizer has {tokens}")

    def fit(part: Lazy) -> Lazy:
        if rows <= spec.vocab:
            return Slice(part, 0, 0, rows)
        return Concat([part, Fill((rows - spec.vocab, *part.shape[1:]), part.dtype)], 0)

    resized = {name: fit(part) if name in ("embed", "lm_head") else part for name, part in checkpoint.parts.items()}
    verb = "cut" if rows < spec.vocab else "padded with zeros"
    note = f"the vocabulary of {spec.vocab} rows is {verb} to {rows}"
    return replace(
        checkpoint, parts=resized, spec=spec.replace(vocab=rows, true_vocab=tokens), notes=(*checkpoint.notes, note)
    )


def with_tokenizer(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint with the tokenizer of another folder or file.  Raises FileError if there is none."""
    found = tokenizer.find(Path(path), Path(path))
    if found is None:
        raise FileError(
            "holds no tokenizer", file=path, hint="give a tokenizer.json, a tokenizer.model or their folder"
        )
    return replace(checkpoint, tokenizer=found)


Operation = Callable[[Spec, Mapping[str, Lazy]], tuple[Spec, Mapping[str, Lazy]]]
